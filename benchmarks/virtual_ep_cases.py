# SPDX-License-Identifier: Apache-2.0
"""Counts for ``virtual_ep``: the tokens of every slot of every rank in a step, for several ways to balance.

This module needs NumPy and the planner, not torch, so cases can be made on any machine. No step is balanced with its
own load: a plan is made from one recorded load, and the steps are drawn from another.

Words as in the package: E logical experts, R ranks, S slots per rank, P = R * S; PAR is peak over average rank load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.loads import DECODE_1000, DECODE_1500, PREFILL_1K, PREFILL_2K, read_counts
from benchmarks.primaries import with_redundant

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DECODE_TOKENS = (1, 8, 32, 64, 128, 256, 512)
PREFILL_TOKENS = (1024, 4096)

GRID_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GRID_PARS = (1.0, 1.5, 2.5)
GRID_SIGMA = 0.7
"""Standard deviation of the log load of experts in the calibration grid, as in DeepSeek-V3's recorded loads."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one MoE layer: E experts, top_k of them per token, hidden size, intermediate size of an expert."""

    model: str
    experts: int
    top_k: int
    hidden: int
    width: int


DEEPSEEK_V3 = Shape("DeepSeek-V3", 256, 8, 7168, 2048)
QWEN3_235B = Shape("Qwen3-235B-A22B", 128, 8, 4096, 1536)
TINY = Shape("tiny", 32, 4, 64, 32)


@dataclass(frozen=True)
class Scenario:
    """One model on R ranks, with the redundant experts per layer that are tried. The first is the least possible."""

    shape: Shape
    ranks: int
    redundant: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.shape.model} EP{self.ranks}"


SCENARIOS = (
    Scenario(DEEPSEEK_V3, 32, (0, 32, 64)),
    Scenario(DEEPSEEK_V3, 144, (32,)),
    Scenario(DEEPSEEK_V3, 64, (0, 64)),
    Scenario(QWEN3_235B, 32, (0, 32)),
    Scenario(DEEPSEEK_V3, 320, (64,)),
)
TINY_SCENARIOS = (Scenario(TINY, 4, (0, 4)),)

PRIMARY_SCENARIOS = tuple(
    Scenario(shape, ranks, (-shape.experts % ranks, -shape.experts % ranks + ranks))
    for shape, ranks in ((DEEPSEEK_V3, 32), (DEEPSEEK_V3, 64), (DEEPSEEK_V3, 144), (DEEPSEEK_V3, 320), (QWEN3_235B, 32))
)
"""Where one redundant expert per rank is compared with steps that leave its slot alone."""

PRIMARY_MODES = ("ours", "all slots", "primaries alone")
PRIMARY_TOKENS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """One way to balance one layer at one number of tokens per rank.

    Attributes:
        scenario: its name. layer: of the model; -1 for the calibration grid.
        stage: "decode", "prefill" or "grid". tokens: that each rank brings into the step.
        mode: how it is balanced. redundant: experts per layer; slots: of a rank.
        par: expected, of the load that the steps are drawn from.
        counts: int32 [1 + steps, R, S] tokens per slot; entry 0 is the expectation, rounded. The grid has one rank, the
            busiest.
    """

    scenario: str
    layer: int
    stage: str
    tokens: int
    mode: str
    redundant: int
    slots: int
    par: float
    counts: npt.NDArray[np.int32]


def split(pairs: IntArray, slots: IntArray, shares: FloatArray, random: np.random.Generator) -> IntArray:
    """int64 [P]: the tokens of each expert, ``pairs`` [E], given to ``slots`` [P] by ``shares`` [P].

    Systematic sampling: every slot gets its share of its expert's tokens, rounded up or down, and exactly in the mean.
    """
    order = np.argsort(slots, kind="stable")
    expert, share = slots[order], shares[order]
    first = np.r_[True, expert[1:] != expert[:-1]]
    total = np.cumsum(share)
    before = total - share - np.repeat((total - share)[first], np.diff(np.r_[np.flatnonzero(first), len(expert)]))
    before[first] = 0.0
    last = np.r_[first[1:], True]
    until = np.where(last, 1.0, np.r_[before[1:], 0.0])
    start = random.random(len(pairs))[expert]
    counts = np.empty(len(slots), dtype=np.int64)
    counts[order] = np.floor(until * pairs[expert] + start) - np.floor(before * pairs[expert] + start)
    return counts


def _ways(scenario: Scenario, planned: FloatArray) -> Iterator[tuple[str, int, npt.NDArray[np.int32], FloatArray]]:
    """(mode, redundant, slots [L, P], shares [L, P]) of each way to balance, made from the load ``planned`` [L, E]."""
    from vllm_ascend_eplb import Placement, dispatch_shares, plan

    layers, experts = planned.shape
    load = np.round(planned * 1e6).astype(np.int64)

    def even(slots: npt.NDArray[np.int32]) -> FloatArray:
        count = Placement(slots, experts, scenario.ranks).replica_count
        return 1.0 / np.take_along_axis(count, slots.astype(np.int64), axis=1)

    for redundant in scenario.redundant:
        start = Placement.initial(layers, experts, scenario.ranks, redundant)
        slots = start.physical_to_logical
        if redundant == scenario.redundant[0]:
            yield "none", redundant, slots, even(slots)
        theirs = plan(load, start, scenario.ranks, policy="default").physical_to_logical
        yield "default", redundant, theirs, even(theirs)
        ours = plan(load, start, scenario.ranks, policy="incremental").physical_to_logical
        yield "ours", redundant, ours, even(ours)
        if redundant:
            yield "ours weighted", redundant, ours, dispatch_shares(load, ours, scenario.ranks)
        if redundant == scenario.redundant[0]:
            least = ours
        elif (more := redundant - scenario.redundant[0]) % scenario.ranks == 0:
            filled = with_redundant(least.astype(np.int64), scenario.ranks, planned, more // scenario.ranks)
            both = filled.astype(np.int32)
            yield "all slots", redundant, both, even(both)
            alone = np.zeros((layers, scenario.ranks, both.shape[1] // scenario.ranks))
            alone[:, :, : least.shape[1] // scenario.ranks] = even(least).reshape(layers, scenario.ranks, -1)
            yield "primaries alone", redundant, both, alone.reshape(layers, -1)


def _perfect(pairs: int, ranks: int, slots: int) -> npt.NDArray[np.int32]:
    """int32 [R, S]: all slots alike."""
    places = np.arange(ranks * slots + 1) * pairs // (ranks * slots)
    return np.diff(places).reshape(ranks, slots).astype(np.int32)


def cases_of(
    scenario: Scenario, loads: dict[str, tuple[FloatArray, FloatArray]], tokens: dict[str, tuple[int, ...]], steps: int
) -> Iterator[Case]:
    """All cases of a scenario.

    Args:
        loads: for "decode" and "prefill" the load [L, E] that plans are made from, and the one that is served; each
            layer sums to 1.
        tokens: of a rank, for both.
        steps: drawn per case, the same for every way to balance.
    """
    shape = scenario.shape
    for stage, (planned, served) in loads.items():
        for mode, redundant, slots, shares in _ways(scenario, planned):
            width = slots.shape[1] // scenario.ranks
            for layer in range(len(served)):
                row = slots[layer].astype(np.int64)
                by_rank = (served[layer][row] * shares[layer]).reshape(scenario.ranks, -1).sum(axis=1)
                for count in tokens[stage]:
                    pairs = count * scenario.ranks * shape.top_k
                    draws = np.random.default_rng([layer, count]).multinomial(pairs, served[layer], size=steps)
                    expected = np.round(served[layer][row] * shares[layer] * pairs).astype(np.int64)
                    random = np.random.default_rng([layer, count, 1])
                    drawn = [split(draw, row, shares[layer], random) for draw in draws]
                    counts = np.array([expected, *drawn], dtype=np.int32).reshape(1 + steps, scenario.ranks, width)
                    par = float(by_rank.max() / by_rank.mean())
                    yield Case(scenario.name, layer, stage, count, mode, redundant, width, par, counts)
        least = scenario.redundant[0]
        width = (shape.experts + least) // scenario.ranks
        for count in tokens[stage]:
            even = _perfect(count * scenario.ranks * shape.top_k, scenario.ranks, width)[None, :1]
            yield Case(scenario.name, 0, stage, count, "perfect", least, width, 1.0, np.repeat(even, 2, axis=0))


def grid_of(scenario: Scenario, largest: int, draws: int = 3) -> Iterator[Case]:
    """The calibration grid: the busiest rank alone, tokens per rank x PAR x slots, rows skewed as real ones."""
    random = np.random.default_rng(7)
    for redundant in scenario.redundant:
        width = (scenario.shape.experts + redundant) // scenario.ranks
        for par in GRID_PARS:
            for count in (tokens for tokens in GRID_TOKENS if tokens <= largest):
                pairs = round(par * count * scenario.shape.top_k)
                weight = np.exp(GRID_SIGMA * random.normal(size=(draws, width)))
                weight /= weight.sum(axis=1, keepdims=True)
                drawn = [np.round(weight[0] * pairs), *(random.multinomial(pairs, shares) for shares in weight)]
                counts = np.array(drawn, dtype=np.int32)[:, None, :]
                yield Case(scenario.name, -1, "grid", count, "grid", redundant, width, par, counts)


def pick_layers(load: FloatArray, ranks: int, redundant: int, count: int) -> IntArray:
    """Layers at even quantiles of the PAR without balancing, so that they stand for all."""
    from vllm_ascend_eplb import Placement

    par = Placement.initial(len(load), load.shape[1], ranks, redundant).par(load)
    places = (2 * np.arange(count) + 1) * len(load) // (2 * count)
    return np.argsort(par)[places]


def recorded_loads(folder: Path) -> dict[str, tuple[FloatArray, FloatArray]]:
    """DeepSeek-V3's recorded loads: planned from one file, served from the next.

    Raises:
        ValueError, OSError: a file is missing or holds no load.
    """
    names = {"decode": (DECODE_1500, DECODE_1000), "prefill": (PREFILL_2K, PREFILL_1K)}
    return {
        stage: (read_counts(folder / f"{planned}.json"), read_counts(folder / f"{served}.json"))
        for stage, (planned, served) in names.items()
    }


def drawn_loads(experts: int, layers: int = 24, seed: int = 1) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Lognormal loads (sigma 0.7), the served one drifted from the planned one (correlation of the log load 0.97)."""
    random = np.random.default_rng(seed)
    loads = {}
    for stage in ("decode", "prefill"):
        latent = random.normal(size=(layers, experts))
        drifted = 0.97 * latent + np.sqrt(1 - 0.97**2) * random.normal(size=(layers, experts))
        pair = [np.exp(GRID_SIGMA * logarithm) for logarithm in (latent, drifted)]
        loads[stage] = (pair[0] / pair[0].sum(axis=1, keepdims=True), pair[1] / pair[1].sum(axis=1, keepdims=True))
    return loads


def primary_cases(scenarios: tuple[Scenario, ...], folder: Path | None, layers: int, steps: int) -> list[Case]:
    """Decode steps with one redundant expert per rank, with all slots and with primaries alone, and without any. The
    same layer and tokens in all ways stand beside each other, so that a run that is cut off compares like with like."""
    cases: list[Case] = []
    for scenario in scenarios:
        recorded = folder is not None and scenario.shape is DEEPSEEK_V3
        loads = recorded_loads(folder) if recorded and folder is not None else drawn_loads(scenario.shape.experts)
        planned, served = loads["decode"]
        chosen = pick_layers(served, scenario.ranks, scenario.redundant[0], layers)
        made = cases_of(
            scenario, {"decode": (planned[chosen], served[chosen])}, {"decode": PRIMARY_TOKENS, "prefill": ()}, steps
        )
        cases += [case for case in made if case.mode in PRIMARY_MODES]
    return sorted(cases, key=lambda case: (case.layer, case.tokens not in (32, 64, 128), case.scenario, case.tokens))


def make_cases(
    scenarios: tuple[Scenario, ...], folder: Path | None, layers: int, steps: int, grid_only: bool = False
) -> list[Case]:
    """Cases of all scenarios, in the order in which they are timed."""
    tiny = scenarios is TINY_SCENARIOS
    tokens = {"decode": (1, 8), "prefill": (32,)} if tiny else {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}
    cases: list[Case] = []
    for scenario in scenarios:
        recorded = folder is not None and scenario.shape is DEEPSEEK_V3
        loads = recorded_loads(folder) if recorded and folder is not None else drawn_loads(scenario.shape.experts)
        picked = {}
        for stage, (planned, served) in loads.items():
            chosen = pick_layers(served, scenario.ranks, scenario.redundant[0], layers)
            picked[stage] = planned[chosen], served[chosen]
        if not grid_only:
            cases += cases_of(scenario, picked, tokens, steps)
        cases += grid_of(scenario, tokens["prefill"][-1])
    return cases


def save_cases(path: Path, scenarios: tuple[Scenario, ...], cases: list[Case]) -> None:
    """One .npz: ``about`` (JSON of scenarios and of every case without counts) and an array per case."""
    about = [{name: value for name, value in vars(case).items() if name != "counts"} for case in cases]
    text = json.dumps({"scenarios": [asdict(scenario) for scenario in scenarios], "cases": about})
    np.savez_compressed(path, about=np.str_(text), **{f"c{i}": case.counts for i, case in enumerate(cases)})


def read_cases(path: Path) -> tuple[list[dict[str, Any]], list[Case]]:
    """What ``save_cases`` wrote: scenarios as dictionaries, and cases."""
    with np.load(path, allow_pickle=False) as archive:
        about = json.loads(str(archive["about"]))
        return about["scenarios"], [Case(**fields, counts=archive[f"c{i}"]) for i, fields in enumerate(about["cases"])]
