# SPDX-License-Identifier: Apache-2.0
"""Calibration: all ranks together time the served model's own MoE layers, once, before the KV cache is sized.

The router's choice is replaced by expert ids made here, so that the number of tokens per rank, the PAR and the slots in
use are known; everything else (dispatch, kernels, combine, collectives) is what serves. Experts get tokens as unevenly
as in the load that was recorded last, else lognormal with sigma 0.7: kernels work in tiles, and even rows flatter them.

Every point of the grid is timed several times, in turns, so that slow drift of the machine spreads over all of them. Of
its times the shortest counts, of the slowest rank: what makes a run longer is somebody else's. Where they still differ
much, because the machine is busy, it goes on for longer. Ranks agree on each time, and so on when to stop.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..values.step_cost import StepCost

SECONDS = 5.0
"""All of it takes no longer, but for the first run of each point."""

MOST_FIRST_SECONDS = 60.0
"""First runs compile kernels, each kind once on a machine. After so long no more points are added."""

TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARS = (1.0, 1.5, 2.5)
SIGMA = 0.7

NOISY = 0.03
"""Noise from which a measurement goes on, and from which one that was kept is repeated at the next start."""

PATIENCE = 3
"""How many times as long a noisy measurement may take."""

LEAST_MILLISECONDS = 2.0
"""Of one measurement on a CPU: shorter runs are repeated within it. Devices have clocks that need no repetition."""

LEAST_TURNS = 4
"""Turns that are wanted; where they do not fit, the largest steps are left out."""

MOST_TURNS = 40
"""More make nothing more precise."""

LEAST_SLEEP, MOST_SLEEP = 2_000_000, 32_000_000
"""Cycles for which a GPU is kept busy before a measurement, so that all kernels are launched before the first one runs,
as in a captured graph: else the time of a small step is that of its launches, whatever its tokens do."""


@dataclass(frozen=True)
class LayerRuns:
    """How a served model's MoE layers are run with expert ids from outside.

    Attributes:
        subject: model, shapes, ranks and device in words; equal subjects have equal times.
        top_k: experts per token.
        sharers: ranks that route the same tokens; each of them brings that part of a batch's rows.
        most_rows: rows of the largest batch of a rank.
        num_layers: layers that one run goes through.
        prepare: takes ids, int64 [rows, top_k] of slots of a layer, on the CPU; returns what runs all layers once with
            them. All ranks call both together.
    """

    subject: str
    top_k: int
    sharers: int
    most_rows: int
    num_layers: int
    prepare: Callable[[torch.Tensor], Callable[[], None]]


class CalibrationError(RuntimeError):
    """The layers cannot be timed here; the message says why."""


def calibrate(
    runs: LayerRuns,
    *,
    num_ranks: int,
    rank: int,
    slots_per_rank: int,
    num_experts: int,
    group: Any,
    device: torch.device,
    seconds: float = SECONDS,
    skew: npt.NDArray[np.float64] | None = None,
) -> StepCost:
    """Times the grid; all ranks together. Blocks for about ``seconds``, up to ``PATIENCE`` times as long where the
    machine is busy.

    Args:
        runs: the layers.
        num_ranks, rank: of the expert-parallel group, R and this one.
        slots_per_rank: S. num_experts: E; where it is less than R * S, fewer slots in use are timed, too.
        group: process group of all ranks with a CPU backend; None for a single rank.
        device: where the layers run.
        skew: relative loads of experts from which those of slots are drawn, the same on all ranks; None for lognormal.

    Raises:
        CalibrationError: a batch has fewer tokens than ranks that share it.
    """
    few = max(1, num_experts // num_ranks)
    used = sorted({min(few, slots_per_rank), slots_per_rank})
    pars = _pars(num_ranks, used[0], runs.top_k)
    largest = runs.most_rows // runs.sharers
    if largest < 1:
        raise CalibrationError(
            f"a batch of {runs.most_rows} tokens leaves none for some of the {runs.sharers} ranks that share it; raise "
            "max_num_batched_tokens"
        )
    tokens = sorted({count for count in TOKENS if count < largest} | {largest})
    clock = _Clock(device, group)
    shortest: dict[tuple[int, float, int], list[float]] = {}
    measured = 0
    points: list[tuple[int, float, int]] = []
    # The smallest steps first: where time is short, the largest are left out, and those grow in proportion anyway.
    for count in tokens:
        row = [(count, par, use) for par, use in itertools.product(pars, used)]
        for point in row:
            run = _prepare(runs, point, num_ranks, rank, slots_per_rank, skew)
            clock.once(run)  # kernels are chosen, memory is allocated
            shortest[point] = [clock.milliseconds(run, 1) / runs.num_layers]
        points += row
        measured += 1
        turn = sum(max(LEAST_MILLISECONDS, shortest[point][0] * runs.num_layers) for point in points) / 1e3
        if clock.elapsed + LEAST_TURNS * turn > seconds or clock.first > MOST_FIRST_SECONDS:
            break
    for turns in itertools.count(1):
        turn_began = clock.elapsed
        for point in points:
            estimate = shortest[point][0] * runs.num_layers
            times = max(1, int(LEAST_MILLISECONDS / max(estimate, 1e-3))) if device.type == "cpu" else 1
            run = _prepare(runs, point, num_ranks, rank, slots_per_rank, skew)
            shortest[point].append(clock.milliseconds(run, times) / times / runs.num_layers)
        patience = PATIENCE if _noise(list(shortest.values())) > NOISY else 1
        if turns >= patience * MOST_TURNS or 2 * clock.elapsed - turn_began > patience * seconds:
            break
    shape = (measured, len(pars), len(used))
    return StepCost(
        np.array(tokens[:measured], dtype=np.float64),
        np.array(pars),
        np.array(used, dtype=np.float64),
        np.array([min(shortest[point]) for point in points]).reshape(shape),
        noise=_noise(list(shortest.values())),
        origin="measured",
        subject=runs.subject,
    )


def time_shares(
    runs: LayerRuns,
    shares: npt.NDArray[np.float64],
    tokens: Sequence[int],
    *,
    num_ranks: int,
    rank: int,
    group: Any,
    device: torch.device,
) -> npt.NDArray[np.float64]:
    """float64 [K, N]: milliseconds of a layer by how its pairs fall on the slots, and by tokens per rank; all ranks
    together. What a layer takes depends on these counts and not on which experts lie in the slots, so a placement can
    be timed that is not in force.

    Args:
        runs: the layers.
        shares: [K, P], parts of a layer's pairs, the same on all ranks.
        tokens: [N], tokens per rank.
        num_ranks, rank, group, device: as for :func:`calibrate`.
    """
    clock = _Clock(device, group)
    of_rows = 0 if runs.sharers == num_ranks else rank // runs.sharers
    best = np.full((len(shares), len(tokens)), np.inf)
    for turn in range(LEAST_TURNS):
        for at in np.ndindex(*best.shape):
            weight = _capped(shares[at[0]], float(runs.top_k))
            ids = _draw(weight, tokens[at[1]] * runs.sharers, runs.top_k, np.random.default_rng([7, of_rows]))
            run = runs.prepare(torch.from_numpy(ids))
            if not turn:
                clock.once(run)
            best[at] = min(best[at], clock.milliseconds(run, 1) / runs.num_layers)
    return best


def describe(cost: StepCost, title: str) -> str:
    """One line for the log: what imbalance and redundant slots cost."""
    small = float(min(cost.tokens, key=lambda tokens: abs(tokens - 64)))
    par, fewest, most = float(cost.pars[-1]), float(cost.slots[0]), float(cost.slots[-1])

    def more(tokens: float) -> str:
        return f"{float(cost.layer_ms(tokens, par, most) / cost.layer_ms(tokens, 1.0, most)) - 1.0:.0%}"

    ends = f"at {small:g} tokens per rank PAR {par:g} costs {more(small)} of MoE time"
    if cost.tokens[-1] > small:
        ends += f", at {cost.tokens[-1]:,.0f} {more(float(cost.tokens[-1]))}"
    if most > fewest:
        extra = float(cost.layer_ms(small, 1.0, most) / cost.layer_ms(small, 1.0, fewest)) - 1.0
        ends += f"; {most - fewest:g} redundant slots per rank cost {extra:.0%}"
    return f"{title} {cost.origin}: {ends} (differences below {cost.noise:.1%} are noise)"


def synthetic_ids(
    rows: int,
    top_k: int,
    num_ranks: int,
    slots_per_rank: int,
    used: int,
    par: float,
    seed: int,
    of_rows: int = 0,
    skew: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """int64 [rows, top_k]: slots of a layer, distinct in each row, so that rank 0 has ``par`` times the mean.

    The other ranks share the rest evenly. Within a rank tokens are lognormal with sigma 0.7, or drawn from ``skew``, as
    far as a slot can have no more than one token of each row. Giving what rank 0 has beyond the mean to its hottest
    expert alone was measured, too: it predicts real steps no better (median error 7.9 % against 7.5 %,
    benchmarks/results/virtual_ep_h200).

    Args:
        used: slots of each rank that get tokens, its first ones.
        seed: of the slots' weights. of_rows: of the choice of each row; ranks with rows of their own have their own.
        skew: loads of experts, > 0.
    """
    random = np.random.default_rng([seed, used, round(100 * par)])
    rest = (num_ranks - par) / max(num_ranks - 1, 1)
    share = np.array([par, *[rest] * (num_ranks - 1)]) * (top_k / num_ranks)
    drawn = np.exp(SIGMA * random.normal(size=(num_ranks, used)))
    if skew is not None:
        drawn = random.choice(skew, size=drawn.shape)
    weight = np.concatenate([_capped(slots, total) for slots, total in zip(drawn, share, strict=True)])
    slots = np.concatenate([rank * slots_per_rank + np.arange(used) for rank in range(num_ranks)])
    order = random.permutation(len(slots))
    own = np.random.default_rng([seed, of_rows, rows])
    return np.asarray(slots[order][_draw(weight[order], rows, top_k, own)], dtype=np.int64)


def _draw(weight: npt.NDArray[np.float64], rows: int, top_k: int, own: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64 [rows, top_k]: places of ``weight``, each entry of it <= 1 and all of them ``top_k``, distinct in a row."""
    until = np.cumsum(weight)
    until *= top_k / until[-1]
    start = own.permutation((np.arange(rows) + own.random(rows)) / max(rows, 1))
    # One token out of every stretch of length 1: a slot of weight w <= 1 is met at most once in a row, with chance w.
    chosen = np.searchsorted(until, start[:, None] + np.arange(top_k), side="right")
    return np.asarray(np.minimum(chosen, len(weight) - 1), dtype=np.int64)


def _capped(weight: npt.NDArray[np.float64], total: float) -> npt.NDArray[np.float64]:
    """``weight`` scaled to sum ``total``, no entry above 1."""
    capped = np.zeros(len(weight), dtype=bool)
    for _ in range(len(weight)):
        free = total - capped.sum()
        scaled = np.where(capped, 1.0, weight * (free / max(weight[~capped].sum(), 1e-300)))
        if not (over := (scaled > 1.0) & ~capped).any():
            break
        capped |= over
    return np.asarray(np.minimum(scaled, 1.0))


def _pars(num_ranks: int, used: int, top_k: int) -> list[float]:
    """The PARs that can be had: one rank has no more than all pairs, and a slot no more than one per token."""
    most = min(float(num_ranks), used * num_ranks / top_k)
    return sorted({1.0, *(min(par, max(1.0, most)) for par in PARS)})


def _prepare(
    runs: LayerRuns,
    point: tuple[int, float, int],
    num_ranks: int,
    rank: int,
    slots_per_rank: int,
    skew: npt.NDArray[np.float64] | None,
) -> Callable[[], None]:
    tokens, par, used = point
    of_rows = 0 if runs.sharers == num_ranks else rank // runs.sharers
    ids = synthetic_ids(tokens * runs.sharers, runs.top_k, num_ranks, slots_per_rank, used, par, 7, of_rows, skew)
    return runs.prepare(torch.from_numpy(ids))


def _noise(times: Sequence[Sequence[float]]) -> float:
    """By how much the shortest times of odd and of even turns differ, in parts: nine in ten points by less. A median
    would say nothing of the few points that a busy machine spoils."""
    differ = [abs(min(turns[0::2]) / min(turns[1::2]) - 1.0) for turns in times if len(turns) > 1]
    return float(np.clip(np.quantile(differ, 0.9), 0.001, 0.5)) if differ else 0.05


class _Clock:
    """Times runs on a device; every time is that of the slowest rank, and the same on all."""

    def __init__(self, device: torch.device, group: Any) -> None:
        self._device, self._group = device, group
        self._sleep = LEAST_SLEEP
        self._began = time.perf_counter()
        self.elapsed = self.first = 0.0
        """Seconds since the start without first runs, and those of first runs, as agreed with the last measurement."""

    def once(self, run: Callable[[], None]) -> None:
        """The first run of its kind."""
        self._agree(0.0)
        before = self.elapsed
        run()
        self._wait()
        self._agree(0.0)
        self.first += self.elapsed - before
        self.elapsed = before

    def milliseconds(self, run: Callable[[], None], times: int) -> float:
        if self._device.type == "cpu":
            self._agree(0.0)  # no rank starts before the last one is there
            began = time.perf_counter()
            for _ in range(times):
                run()
            return self._agree(1e3 * (time.perf_counter() - began))[0]
        module = torch.get_device_module(self._device)
        sleep = module._sleep if self._device.type == "cuda" else None
        while True:
            start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            self._agree(0.0)
            if sleep is not None:
                sleep(self._sleep)
            start.record()
            for _ in range(times):
                run()
            launched_late = sleep is not None and start.query()
            end.record()
            self._wait()
            took, late = self._agree(start.elapsed_time(end), launched_late)
            if not late or self._sleep >= MOST_SLEEP:
                return took
            self._sleep = min(MOST_SLEEP, self._sleep + self._sleep // 2)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()

    def _agree(self, milliseconds: float, late: bool = False) -> tuple[float, bool]:
        """The longest time of all ranks, and whether any of them launched late."""
        all_three = torch.tensor([milliseconds, time.perf_counter() - self._began, late], dtype=torch.float64)
        if self._group is not None:
            torch.distributed.all_reduce(all_three, op=torch.distributed.ReduceOp.MAX, group=self._group)
        longest, since_start, any_late = all_three.tolist()
        self.elapsed = since_start - self.first
        return longest, bool(any_late)
