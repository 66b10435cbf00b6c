# SPDX-License-Identifier: Apache-2.0
"""Gain of balancing in a served model on a CPU: ``python -m benchmarks.served_cpu --json PATH``.

Two engines of vLLM serve the tiny model on two expert-parallel CPU ranks: one with a static placement, and one with the
balancer, started from the same placement, with the times of layers measured at start-up. Both stay in memory and take
turns, so that drift of the machine affects both alike. Two placements are tried: the one that vLLM loads (its load is
nearly even), and one whose first rank has the experts with the most tokens. The result is the mean of the pairs' ratios
with its confidence interval. The exit status is 1 if the balancer moved nothing under skewed load.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.served import RANKS, balancer_report, cpu_engine, describe_ratio
from benchmarks.served_turns import OFF, Engines, Turn, answer, over_off

LOADS = ("balanced", "skewed")
KINDS: dict[str, tuple[Any, ...]] = {"prefill": ("prefill",), "decode": ("decode",)}
REDUNDANT, REQUESTS, CHUNK, INTERVAL = 4, 48, 2048, 20


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
        seconds: least time of a measurement.
        folder: for the map.
        calibration: the file with times of layers, which the first engine that balances writes.
    """

    def __init__(self, load: str, mode: str, seconds: float, folder: str, calibration: Path) -> None:
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
        text = " ".join(read_prompts("english"))
        self._prompts = [text[97 * at : 97 * at + 1200] for at in range(REQUESTS)]
        self._seconds = seconds

    def prefill(self) -> dict[str, float]:
        """Tokens of prompts per second."""
        return self._rate(self._prompts, 1)

    def decode(self) -> dict[str, float]:
        """Tokens of answers per second."""
        return self._rate([prompt[:60] for prompt in self._prompts], 100)

    def _rate(self, prompts: list[str], tokens: int) -> dict[str, float]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        done, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < self._seconds or not done:
            for given in self._llm.generate(prompts, sampling, use_tqdm=False):
                done += len(given.prompt_token_ids or ()) if tokens == 1 else tokens
        return {"tokens_per_s": done / took}

    def balanced(self) -> dict[str, Any]:
        """What its balancer did."""
        return balancer_report()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def serve(connection: Connection, mode: str, load: str, seconds: float, calibration: Path) -> None:
    """A process with an engine."""
    from examples.demo.server import cpu_environment

    os.setpgrp()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**cpu_environment(RANKS), "EPLB_STATS_FILE": f"{folder}/stats.json"}
        answer(connection, lambda: Engine(load, mode, seconds, folder, calibration))


def compare(load: str, pairs: int, seconds: float, calibration: Path) -> dict[str, Any]:
    """Both engines in turns. The first turn does not count: kernels are warmed up, and the balancer finds its
    placement."""
    engines = Engines([[OFF], ["on"]], serve, load, seconds, calibration)
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
            "on_over_off": over_off(rounds, "tokens_per_s"),
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
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--calibration", type=Path, help="file with times of layers; without it they are measured once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calibration = arguments.calibration or Path(folder) / "step_cost.json"
        loads = {load: compare(load, arguments.pairs, arguments.seconds, calibration) for load in arguments.loads}
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
        for name, ratio in found["on_over_off"].items():
            print(describe_ratio(f"{load} load, {name}", ratio))
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int("skewed" in loads and not loads["skewed"]["balanced"]["moved"])


if __name__ == "__main__":
    sys.exit(main())
