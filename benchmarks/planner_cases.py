# SPDX-License-Identifier: Apache-2.0
"""Placements in force and the loads to plan for: from files, a generator and a trace."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import loads
from benchmarks.placements import contiguous_placement, greedy_placement
from vllm_ascend_eplb.values.placement import Placement

EXPERT_BYTES = 44_000_000
"""An expert of DeepSeek-V3 in int8."""


TRACE = Path(__file__).resolve().parent.parent / "examples/tiny_moe/load_trace.npz"


SPREAD_OF_NEXT_WINDOW = 0.07
"""Standard deviation of the log ratio between the planned and the next window where the load has no next one: mild."""


Slots = npt.NDArray[np.int32]


FloatArray = npt.NDArray[np.float64]


@dataclass
class Case:
    """A placement in force, the load to plan for, and the one that comes after it."""

    name: str
    slots: Slots
    load: FloatArray
    following: FloatArray
    num_ranks: int
    target_par: float
    thorough_seconds: float = 0.3
    planned_for: FloatArray | None = None  # the load that the placement in force was made for

    @property
    def placement(self) -> Placement:
        return Placement(self.slots, self.load.shape[1], self.num_ranks)


def next_window(load: FloatArray, seed: int = 0) -> FloatArray:
    return load * np.exp(np.random.default_rng(seed).normal(0.0, SPREAD_OF_NEXT_WINDOW, load.shape))


def cases_between(first: FloatArray, second: FloatArray, third: FloatArray, short: str, kind: str) -> list[Case]:
    """EP32 and EP64 with a placement made for ``first`` when ``second`` comes, ``third`` after it."""
    made = []
    for num_ranks, num_slots, target, seconds in ((32, 288, 1.02, 0.3), (64, 320, 1.03, 1.0)):
        stale = greedy_placement(first, num_slots, num_ranks)
        name = f"EP{num_ranks}/{num_slots} {short}"
        made.append(Case(f"{name}, {target:g}", stale, second, third, num_ranks, target, seconds, first))
        if kind == "hard":
            full = 1.005 if num_ranks == 32 else 1.012
            if num_ranks == 32:
                made.append(Case(f"{name}, 1.05", stale, second, third, num_ranks, 1.05, seconds))
            made.append(Case(f"{name}, {full:g}", stale, second, third, num_ranks, full, seconds))
    return made


def cold_cases(load: FloatArray, following: FloatArray, short: str) -> list[Case]:
    num_layers, num_experts = load.shape
    made = []
    for num_ranks, num_slots, target in ((16, 272, 1.02), (32, 288, 1.01)):
        start = contiguous_placement(num_layers, num_experts, num_ranks, num_slots)
        made.append(
            Case(
                f"EP{num_ranks}/{num_slots} contiguous to {short}, {target:g}",
                start,
                load,
                following,
                num_ranks,
                target,
            )
        )
    return made


def file_cases(folder: Path, quick: bool) -> list[Case]:
    """The transitions between the files of a folder: prefill to longer prefill, prefill to decode, and cold starts;
    where the names do not tell, from each file to the next."""
    files = loads.read_folder(folder)
    if len(files) < 2:
        raise SystemExit(f"--loads {folder}: {len(files)} load files; two at least are needed")
    short, longer, decode = loads.PREFILL_1K, loads.PREFILL_4K, loads.DECODE_1000
    if {short, longer, decode} <= files.keys():
        made = cases_between(files[short], files[longer], next_window(files[longer]), "prefill 1K to 4K", "medium")
        made += cases_between(files[short], files[decode], next_window(files[decode]), "prefill 1K to decode", "hard")
        return made + cold_cases(files[decode], next_window(files[decode]), "decode")
    names = list(files)
    made = []
    for first, second in list(itertools.pairwise(names))[: 2 if quick else None]:
        made += cases_between(files[first], files[second], next_window(files[second]), f"{first} to {second}", "medium")
    return made


def generated_cases(num_layers: int) -> list[Case]:
    made = []
    for kind in ("medium", "hard"):
        generator = loads.LoadGenerator(num_layers, 256, seed=1)
        windows = [generator.window().astype(np.float64)]
        for step in (kind, "mild"):
            generator.drift(step)
            windows.append(generator.window().astype(np.float64))
        made += cases_between(*windows, f"generated {kind}", kind)
    return made + cold_cases(windows[1], windows[2], "generated")


def trace_cases(path: Path) -> list[Case]:
    """The trace's middle window after its first, on 4 ranks with one redundant expert each."""
    trace = loads.read_trace(path)
    now = len(trace) // 2
    num_experts, num_ranks = trace.shape[2], 4
    num_slots = num_experts + num_ranks
    start = greedy_placement(trace[0], num_slots, num_ranks)
    following = trace[min(now + 1, len(trace) - 1)]
    return [
        Case(f"tiny-moe trace EP{num_ranks}/{num_slots}, 1.02", start, trace[now], following, num_ranks, 1.02, 0.05)
    ]
