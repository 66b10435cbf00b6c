# SPDX-License-Identifier: Apache-2.0
"""Gain of balancing in a served model on a CPU: ``python -m benchmarks.served_cpu --json PATH``.

Two engines of vLLM serve the tiny model on two expert-parallel CPU ranks: one with a static placement, and one with the
balancer, started from the same placement, with the times of layers measured at start-up. Both stay in memory and take
turns, so that drift of the machine affects both alike. Two placements are tried: the one that vLLM loads (its load is
nearly even), and one whose first rank has the experts with the most tokens. Steps are timed as in
``benchmarks.served_cuda``, and the result is the mean of the pairs' ratios with its confidence interval, also for the
median step and for a step that nothing disturbs. The exit status is 1 if the balancer moved nothing under skewed load.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.served import RANKS, balancer_report, cpu_engine
from benchmarks.served_turns import OFF, Engines, Turn, all_over_off, answer, describe, rates, timed

LOADS = ("balanced", "skewed")
KINDS: dict[str, tuple[Any, ...]] = {"prefill": ("prefill",), "decode": ("decode",)}
REDUNDANT, REQUESTS, PROMPT, CHUNK, INTERVAL = 4, 48, 256, 2048, 200
PASSES, STEPS = 3, 100
"""Of a turn: passes over the prompts that prefill, and steps that decode."""


def skewed_placement() -> Any:
    """All of the hottest experts of English prompts on rank 0."""
    from examples.tiny_moe.expert_load import FOLDER
    from vllm_ascend_eplb import Placement

    with np.load(FOLDER / "expert_load_histogram.npz") as archive:
        load = archive["loads"][list(archive["domains"]).index("english")]
    order = np.argsort(-load, axis=1)
    half = load.shape[1] // 2
    hot, cold, spare = order[:, :half], order[:, half:], REDUNDANT // 2
    slots = np.concatenate([hot, cold[:, -spare:], cold, hot[:, -spare:]], axis=1)
    return Placement(slots, load.shape[1], RANKS)


class Engine:
    """vLLM's engine in this process.

    Args:
        load: whether the placement at the start is "balanced" or "skewed".
        mode: "on" with the balancer; OFF with the same placement, static.
        folder: for the map.
        calibration: the file with times of layers, which the first engine that balances writes.
    """

    def __init__(self, load: str, mode: str, folder: str, calibration: Path) -> None:
        from vllm.utils.gc_utils import freeze_gc_heap

        from examples.tiny_moe.expert_load import read_prompts
        from vllm_ascend_eplb import Placement
        from vllm_ascend_eplb.files.expert_map import write_expert_map

        start = skewed_placement() if load == "skewed" else Placement.initial(6, 64, RANKS, REDUNDANT)
        write_expert_map(f"{folder}/map.json", start)
        settings: dict[str, Any] = {"expert_map_path": f"{folder}/map.json"}
        if mode != OFF:
            settings |= {
                "dynamic_eplb": True,
                "expert_heat_collection_interval": INTERVAL,
                "algorithm_execution_interval": 2,
                "calibration_path": str(calibration),
            }
        self._llm = cpu_engine(REQUESTS, settings, max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
        words = self._llm.get_tokenizer().encode(" ".join(read_prompts("english")))
        self._prompts = [words[31 * at : 31 * at + PROMPT] for at in range(REQUESTS)]
        assert all(len(prompt) == PROMPT for prompt in self._prompts)
        freeze_gc_heap()  # as vLLM's server does

    def prefill(self) -> dict[str, float]:
        """Of whole chunks, see :func:`rates`; the first one is not timed."""
        steps = [seconds for seconds, _ in timed(self._llm.llm_engine, PASSES * self._prompts, 1)]
        return rates(steps[1:], CHUNK)

    def decode(self) -> dict[str, float]:
        """Of the steps in which all requests got a token, see :func:`rates`."""
        steps = timed(self._llm.llm_engine, [prompt[:16] for prompt in self._prompts], STEPS)
        return rates([seconds for seconds, rows in steps if rows == REQUESTS], REQUESTS)

    def balanced(self) -> dict[str, Any]:
        """What its balancer did."""
        return balancer_report()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def serve(connection: Connection, mode: str, load: str, calibration: Path) -> None:
    """A process with an engine."""
    from examples.demo.server import cpu_environment

    os.setpgrp()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**cpu_environment(RANKS), "EPLB_STATS_FILE": f"{folder}/stats.json"}
        answer(connection, lambda: Engine(load, mode, folder, calibration))


def compare(load: str, pairs: int, calibration: Path) -> dict[str, Any]:
    """Both engines in turns. The first turn does not count: kernels are warmed up, and the balancer finds its
    placement."""
    engines = Engines([[OFF], ["on"]], serve, load, calibration)
    rounds: list[Turn] = []
    try:
        engines.start(lambda line: print(f"{load}, {line}", flush=True))
        for mode in engines.modes:
            for call in KINDS.values():
                engines.ask(mode, *call)
        for pair in range(pairs):
            rounds.append(engines.turn(KINDS, pair))
            print(json.dumps({"load": load, **rounds[-1]}), flush=True)
        report = {
            **all_over_off(rounds),
            "balanced": engines.ask("on", "balanced"),
            "rounds": rounds,
        }
        for mode in engines.modes:
            engines.ask(mode, "close")
    finally:
        engines.end()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results; may be a pipe")
    parser.add_argument("--pairs", type=int, default=30, help="turns of the engines without and with the balancer")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--calibration", type=Path, help="file with times of layers; without it they are measured once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calibration = arguments.calibration or Path(folder) / "step_cost.json"
        loads = {load: compare(load, arguments.pairs, calibration) for load in arguments.loads}
    report = {
        "benchmark": "served_cpu",
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "ranks": RANKS,
        "redundant": REDUNDANT,
        "loads": loads,
    }
    text = json.dumps(report, indent=1)
    print(text)
    for load, found in loads.items():
        describe(found, f"{load} load, ")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int("skewed" in loads and not loads["skewed"]["balanced"]["moved"])


if __name__ == "__main__":
    sys.exit(main())
