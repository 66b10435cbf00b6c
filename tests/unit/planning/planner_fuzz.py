# SPDX-License-Identifier: Apache-2.0
"""Call the C++ planner with valid and broken arrays: ``python -m tests.unit.planning.planner_fuzz --seconds 60``.

Use a build with AddressSanitizer (``make fuzz``). Every call must return a result or raise ValueError, TypeError or
OverflowError, and never crash. The exit status is 1 if a plan makes a layer worse; an invalid plan raises.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def load_module(path: Path) -> Any:
    """Load the C++ module at ``path`` instead of the package's own."""
    name = "vllm_ascend_eplb._planner"
    spec = importlib.util.spec_from_file_location(
        name, path, loader=importlib.machinery.ExtensionFileLoader(name, str(path))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def broken(rng: np.random.Generator, value: Any) -> Any:
    """A mutation of ``value``, possibly invalid."""
    if not isinstance(value, np.ndarray):
        return rng.choice([0, -1, 1, 7, 2**31 - 1, -(2**31)]).item()
    choice = rng.integers(7)
    if choice == 0:
        return value[..., : max(0, value.shape[-1] - int(rng.integers(1, 4)))]
    if choice == 1:
        return value[0] if len(value) else value
    if choice == 2:
        return value.T
    if choice == 3:
        return np.zeros((0,) * value.ndim, value.dtype)
    out = value.copy()
    if out.size:
        where = int(rng.integers(out.size))
        out.reshape(-1)[where] = rng.choice([-(2**31), -2, -1, 2**31 - 1, int(out.size)])
        if choice == 4 and out.dtype.kind == "f":
            out.reshape(-1)[where] = rng.choice([np.nan, np.inf, -np.inf, 1e300, 5e-324])
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", type=Path, help="the C++ module to test; default the package's")
    arguments = parser.parse_args()
    if arguments.module:
        load_module(arguments.module)
    from tests.unit.planning.planner_inputs import LOAD_KINDS, draw_load, draw_slots
    from vllm_ascend_eplb import _planner
    from vllm_ascend_eplb.values.placement import Placement
    from vllm_ascend_eplb.values.plan import Plan

    rng = np.random.default_rng(arguments.seed)
    end = time.monotonic() + arguments.seconds
    answered = refused = 0
    while time.monotonic() < end:
        ranks = int(rng.choice([1, 2, 3, 4, 8, 16, 33]))
        experts = int(rng.integers(1, 80))
        slots_per_rank = -(-experts // ranks) + int(rng.integers(0, 4))
        layers, num_slots = int(rng.integers(1, 4)), slots_per_rank * ranks
        load = draw_load(str(rng.choice(LOAD_KINDS)), rng, layers, experts).astype(np.float64)
        slots = draw_slots(rng, layers, experts, num_slots, empty=True)
        nodes = int(rng.choice([n for n in (1, 2, 4) if ranks % n == 0]))
        incremental: dict[str, Any] = {
            "load": load, "slots": slots, "variance": load**2 * 0.1 if rng.random() < 0.5 else np.zeros((0, 0)),
            "target": np.full(layers, rng.choice([1.0, 1.02, 1.3, 1e6])), "num_ranks": ranks, "num_nodes": nodes,
            "thorough": bool(rng.random() < 0.5), "rounds": int(rng.integers(1, 8)), "seconds": 0.001,
            "seed": int(rng.integers(2**63)), "threads": int(rng.integers(1, 4)),
            "max_moves": int(rng.integers(-1, 20)),
            "max_moves_per_rank": int(rng.integers(-1, 5)), "max_moves_between_nodes": int(rng.integers(-1, 5)),
            "far_cost": float(rng.choice([1.0, 4.0])), "stay_near": bool(rng.random() < 0.2),
            "series": np.stack([load, load[:, ::-1]] * int(rng.integers(1, 9)))
            if rng.random() < 0.3
            else np.zeros((0, 0, 0)),
            "pars": rng.uniform(1.0, 3.0, (2, layers)),
            "speed": rng.uniform(0.001, 2.0, ranks) if rng.random() < 0.3 else np.zeros(0),
        }  # fmt: skip
        packing = {"weight": load, "order": np.argsort(-load, axis=1), "packs": int(rng.integers(1, 5))}
        series = np.stack([load * rng.uniform(0.5, 2.0, load.shape) for _ in range(int(rng.integers(1, 12)))])
        of_windows = {"series": series, "slots": slots, "num_ranks": ranks, "speed": incremental["speed"]}
        drawing = {"seed": 1, "num_layers": 2, "num_experts": experts, "num_slots": num_slots, "num_ranks": ranks}
        calls: list[tuple[Any, dict[str, Any]]] = [
            (_planner.plan_incremental, incremental),
            (_planner.dispatch_shares, {"load": load, "slots": slots, "num_ranks": ranks, "tolerance": 1e-3}),
            (_planner.replicate, {"weight": load, "copies": num_slots}),
            (_planner.pack_balanced, packing),
            (_planner.preserve_slots, {"slots": slots, "old": slots[:, ::-1].copy(), "num_ranks": ranks}),
            (_planner.draw_placement, drawing),
            (_planner.forecast, {"series": series, "at_rest": rng.random(layers) < 0.3}),
            (_planner.pars_of_windows, of_windows),
        ]
        function, good = calls[0 if rng.random() < 0.5 else int(rng.integers(len(calls)))]
        spoil = rng.random() < 0.4
        given = dict(good)
        if spoil:
            name = str(rng.choice(list(good)))
            if name not in ("threads", "rounds", "copies", "num_slots", "num_experts", "num_layers"):
                given[name] = broken(rng, good[name])
        try:
            result = function(**given)
        except (ValueError, TypeError, OverflowError):
            refused += 1
            continue
        answered += 1
        if function is _planner.plan_incremental and not spoil:
            after, moves, before_par, after_par, *_ = result
            Plan(after, moves, before_par, after_par).check(Placement(slots, experts, ranks))
            if (after_par > before_par * (1 + 1e-5)).any():
                print("a layer got worse:", given)
                return 1
    print(f"{answered} answers, {refused} refusals, no crash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
