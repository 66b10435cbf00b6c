# SPDX-License-Identifier: Apache-2.0
"""Hash plans, so that the plans of two processors can be compared.

    python -m tests.aarch64.plans write FILE    # the benchmark's loads and placements
    python -m tests.aarch64.plans hash FILE     # a line per case and policy

Both processors read the inputs from a file: NumPy's random numbers and exponentials may differ between processors.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from vllm_ascend_eplb import plan

POLICIES = {
    "incremental": {},
    "incremental, thorough": {"effort": "thorough", "rounds": 20},
    "incremental, 40 moves": {"max_moves": 40},
    "incremental, slow ranks": {"speed": True},
    "incremental, series": {"series": True},
    "default": {"policy": "default", "ties": False},
    "random": {"policy": "random", "seed": 3},
}


def write(path: Path) -> None:
    from benchmarks.planner_checks import TRACE, generated_cases, trace_cases

    arrays = {}
    for number, case in enumerate([*generated_cases(8), *trace_cases(TRACE)]):
        arrays[f"{number}.load"] = np.stack([case.load, case.following])
        arrays[f"{number}.slots"] = case.slots
        arrays[f"{number}.ranks"] = np.array(case.num_ranks)
        arrays[f"{number}.target"] = np.array(case.target_par)
        arrays[f"{number}.name"] = np.array(case.name)
    np.savez(path, **arrays)


def hashes(path: Path) -> list[str]:
    """One line per case and policy: SHA-256 of the placement and the moves, and the names."""
    lines = []
    with np.load(path) as arrays:
        for number in range(sum(name.endswith(".name") for name in arrays.files)):
            load, slots, ranks, target, name = (
                arrays[f"{number}.{field}"] for field in ("load", "slots", "ranks", "target", "name")
            )
            for policy, chosen in POLICIES.items():
                options = {"policy": "incremental", "target_par": float(target), **chosen}
                if options.pop("speed", False):
                    options["rank_speed"] = np.where(np.arange(ranks) % 4 == 0, 0.75, 1.0)
                if options["policy"] != "incremental":
                    del options["target_par"]
                wanted = load if options.pop("series", False) else load[0]
                if not options.pop("ties", True):
                    # "default" uses NumPy's argsort, as vLLM does; its order of equal loads depends on the processor.
                    wanted = wanted * 1024 + np.arange(wanted.shape[-1])
                made = plan(wanted, slots, int(ranks), **options)
                digest = hashlib.sha256(np.ascontiguousarray(made.physical_to_logical, dtype=np.int32).tobytes())
                digest.update(np.ascontiguousarray(made.moves, dtype=np.int64).tobytes())
                lines.append(f"{digest.hexdigest()[:32]}  {name}: {policy}")
    return lines


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        print("\n".join(hashes(Path(sys.argv[2]))))
