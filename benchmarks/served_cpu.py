# SPDX-License-Identifier: Apache-2.0
"""Gain of balancing in a served model on a CPU: ``python -m benchmarks.served_cpu --json PATH``.

An engine of vLLM serves the tiny model on two expert-parallel CPU ranks, with the times of layers measured at start-up.
In every second turn its runner has no balancer, as with a static placement, and experts are where they were at the
start: two processes would differ by 2 % without any balancing, and the machine drifts. Two placements are tried: the
one that vLLM loads (its load is nearly even), and one whose first rank has the experts with the most tokens. Where
nothing has moved, a turn is only a few steps long. Steps are timed as in ``benchmarks.served_cuda``, and the result is
the mean of the pairs' ratios with its confidence interval, also for the median step and for a step that nothing
disturbs. Cycles of the balancer are in its turns if nothing has moved; else they are paused, because the orders that
move experts to and fro pause them. The exit status is 1 if nothing moved under skewed load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.served import RANKS, balancer_report, cpu_engine
from benchmarks.served_turns import OFF, Served, Turn, all_over_off, answer, describe, rates, timed

LOADS = ("balanced", "skewed")
KINDS = {"prefill": 0, "decode 48": 48, "decode 256": 256}
"""Requests that decode at a time, by kind of step."""

REDUNDANT, PROMPTS, PROMPT, CHUNK = 4, 48, 256, 2048
PASSES, STEPS = 5, 60
"""Of a turn: passes over the prompts that prefill, and steps that decode."""

SHORT, SETTLE = 10, 2
"""Steps of a turn where nothing has moved, and those of them that are not timed, because the switch is in them."""

MOST_WAITS = 100
"""Times that requests are served for a few steps until experts are where they are wanted."""


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


def placed(worker: Any) -> tuple[bool, bool]:
    """In a worker: whether experts are where they were at the start, and whether no cycle is under way."""
    updator = worker.model_runner.eplb_state.updator
    return updator.placement == updator.parts.start, not updator.state.active


def take_out(worker: Any) -> None:
    """In a worker: the runner has no balancer any more."""
    state = worker.model_runner.eplb_state
    state.updator.pause_recording()
    worker.taken_out, state.updator = state.updator, None


def put_back(worker: Any) -> None:
    """In a worker: the runner has its balancer again."""
    worker.model_runner.eplb_state.updator = worker.taken_out


class Engine:
    """vLLM's engine in this process, with its balancer.

    Args:
        load: whether the placement at the start is "balanced" or "skewed".
        folder: for the map.
        calibration: the file with times of layers, which the first engine writes.
    """

    def __init__(self, load: str, folder: str, calibration: Path) -> None:
        from vllm.utils.gc_utils import freeze_gc_heap

        from examples.tiny_moe.expert_load import read_prompts
        from vllm_ascend_eplb import Placement
        from vllm_ascend_eplb.files.expert_map import write_expert_map

        start = skewed_placement() if load == "skewed" else Placement.initial(6, 64, RANKS, REDUNDANT)
        write_expert_map(f"{folder}/map.json", start)
        settings: dict[str, Any] = {
            "expert_map_path": f"{folder}/map.json",
            "dynamic_eplb": True,
            "algorithm_execution_interval": 2,  # ordered cycles are short
            "calibration_path": str(calibration),
        }
        self._llm = cpu_engine(max(KINDS.values()), settings, max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
        words = self._llm.get_tokenizer().encode(" ".join(read_prompts("english")))
        self._prompts = [words[31 * at : 31 * at + PROMPT] for at in range(PROMPTS)]
        self._short = [words[at : at + 16] for at in range(max(KINDS.values()))]
        assert all(len(prompt) == PROMPT for prompt in self._prompts)
        self._mode, self._moved = "on", False
        freeze_gc_heap()  # as vLLM's server does

    def warm_up(self) -> None:
        """Serves until kernels are warm and the balancer has found its placement."""
        for _ in range(3):
            for kind in KINDS:
                list(self._steps(kind))
        self._moved = not self._placed()[0]

    def both(self, kind: str, first: str) -> dict[str, dict[str, float]]:
        """A pair of turns of one kind of steps: what :func:`rates` says by mode.

        Args:
            first: the mode of the first turn.
        """
        times: dict[str, list[float]] = {OFF: [], "on": []}
        next_mode = {OFF: "on", "on": OFF}
        self._switch(first)
        if self._moved:
            for mode in (first, next_mode[first]):
                self._switch(mode)
                times[mode] = list(self._steps(kind))
        else:
            for number, seconds in enumerate(self._steps(kind)):
                if number % SHORT >= SETTLE:
                    times[self._mode].append(seconds)
                if number % SHORT == SHORT - 1:
                    self._switch(next_mode[self._mode])
        return {mode: rates(of_mode, KINDS[kind] or CHUNK) for mode, of_mode in times.items()}

    def _switch(self, mode: str) -> None:
        """With the balancer and the placement that it found, or without both (OFF)."""
        if mode == self._mode:
            return
        if mode == OFF:
            if self._moved:
                self._order("restore", at_start=True)
            self._llm.collective_rpc(take_out)
        else:
            self._llm.collective_rpc(put_back)
            if self._moved:
                self._order("reapply", at_start=False)
        self._mode = mode

    def _placed(self) -> tuple[bool, bool]:
        (found,) = set(map(tuple, self._llm.collective_rpc(placed)))  # equal on all ranks
        return found

    def _order(self, command: Literal["restore", "reapply"], *, at_start: bool) -> None:
        """Gives an order, and serves until it has taken effect and the cycle that it orders is done."""
        from vllm_ascend_eplb.balancer.orders import Order, orders_path, write_order
        from vllm_ascend_eplb.observe.stats_file import read_stats, stats_path

        path = stats_path()
        assert path is not None
        order = Order(command=command)
        write_order(orders_path(path), order)
        for _ in range(MOST_WAITS):
            list(timed(self._llm.llm_engine, self._short[:PROMPTS], 16))
            stats = read_stats(path)
            if stats is not None and stats.order == order.id and self._placed() == (at_start, True):
                return
        raise TimeoutError(f"{command} took no effect")

    def _steps(self, kind: str) -> Iterator[float]:
        """Seconds of steps with whole chunks, without the first one; or of those in which all requests got a token."""
        engine, requests = self._llm.llm_engine, KINDS[kind]
        if not requests:
            return (seconds for seconds, _ in itertools.islice(timed(engine, PASSES * self._prompts, 1), 1, None))
        return (seconds for seconds, rows in timed(engine, self._short[:requests], STEPS) if rows == requests)

    def balanced(self) -> dict[str, Any]:
        """What its balancer did."""
        return balancer_report()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def serve(connection: Connection, load: str, calibration: Path) -> None:
    """A process with an engine."""
    from examples.demo.server import cpu_environment

    os.setpgrp()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            **cpu_environment(RANKS),
            "EPLB_STATS_FILE": f"{folder}/stats.json",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that run in workers
        }
        answer(connection, lambda: Engine(load, folder, calibration))


def compare(load: str, pairs: int, calibration: Path) -> dict[str, Any]:
    """The engine without and with its balancer, in turns. Before the first of them kernels are warmed up, and the
    balancer finds its placement."""
    engine = Served(serve, load, calibration)
    rounds: list[Turn] = []
    try:
        engine.start()
        engine.wait()
        print(f"{load}: serves", flush=True)
        engine.ask("warm_up")
        found = engine.ask("balanced")
        for pair in range(pairs):
            first = OFF if pair % 2 == 0 else "on"
            rounds.append({kind: engine.ask("both", kind, first) for kind in KINDS})
            print(json.dumps({"load": load, **rounds[-1]}), flush=True)
        engine.ask("close")
    finally:
        engine.end()
    return {**all_over_off(rounds), "balanced": found, "rounds": rounds}


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
