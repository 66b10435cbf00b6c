# SPDX-License-Identifier: Apache-2.0
"""``plan``: checks a load and a placement, and plans with one of the policies."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import EMPTY, FloatArray, Int32Array, Placement
from ..values.plan import Plan
from . import default
from .forecast import forecast
from .inputs import InForce, check_topology, checked_load, checked_placement, checked_speed, total_of
from .options import PlanInputError, PlanOptions

MOST_RANKS = 1024
MOST_SLOTS = 65535

FRUGAL_ATTEMPTS = 7
"""Bisection steps for a target PAR that can be reached with ``max_moves``, where that limit binds."""


def plan(
    load: npt.ArrayLike,
    physical_to_logical: npt.ArrayLike | Placement,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    policy: str = "incremental",
    *,
    rank_speed: npt.ArrayLike | None = None,
    **options: Any,
) -> Plan:
    """Plans the moves from the placement in force to one that suits ``load``.

    Args:
        load: [L, E] or a series [T, L, E] (oldest window first) of tokens per logical expert; integers or floats,
            finite, not negative, at most 1e30. From a series "incremental" forecasts the next window and its variance
            (``forecast.forecast``). A layer with constant load gets the plan with the fewest moves, as from one window.
            A layer that drifts gets a plan that ages well. A layer whose experts are hot at different times, in both
            halves of the series, gets the plan with the lowest mean PAR over the windows. The other policies add the
            windows up.
        physical_to_logical: int [L, P], the placement in force; -1 marks an empty slot.
        num_ranks: ranks that share the slots evenly, R.
        num_nodes: nodes that share the ranks evenly.
        num_groups: groups of consecutive experts. Where the nodes can share them evenly "default" keeps all copies of a
            group on one node, and "incremental" does where the placement in force does.
        policy: "incremental", "default" (DeepSeek's, as vLLM runs it) or "random". ``rank_speed`` and ``options``,
            except ``seed``, are for "incremental" only.
        rank_speed: numbers [R], 0.001..1000 of each other: relative speeds of the ranks. A rank of twice the speed gets
            twice the load, and PARs are of load over speed. Default: all alike.
        options: fields of ``PlanOptions``: target_par, effort, limits on moves, ...

    Returns:
        The plan. Its moves come in small groups, highest gain per byte first. After every group the placement is valid,
        and no layer's PAR is above its PAR before the plan. PARs are predicted for an even split over replicas; with
        "incremental" and a series, for the forecast load. PARs of layers that were planned window by window are means
        over the windows. With a series, ``p95_before`` and ``p95_after`` are the PARs of bad windows.

    Raises:
        PlanInputError: an argument is out of range.
        PlacementError: ``physical_to_logical`` is not a valid placement.
        TypeError: no option has the name given.
    """
    began = time.perf_counter()
    checked = PlanOptions(**options)
    series = checked_load(load)
    placement = checked_placement(physical_to_logical, series.shape[1], series.shape[2], num_ranks)
    check_topology(placement, num_nodes, num_groups)
    speed = checked_speed(rank_speed, placement.num_ranks, policy)
    if policy == "incremental":
        made = _incremental(series, placement, num_nodes, num_groups, checked, speed)
    elif policy in ("default", "random"):
        total = total_of(series)
        if policy == "default":
            after = default.rebalance(
                total.astype(np.float32), placement.num_slots, num_groups, num_nodes, num_ranks, placement.slots
            )
        else:
            after = _planner.draw_placement(
                int(checked.seed) % 2**64,
                placement.num_layers,
                placement.num_experts,
                placement.num_slots,
                placement.num_ranks,
            )
        made = _all_at_once(placement, after, np.asarray(total, dtype=np.float64), policy)
    else:
        raise PlanInputError(f"policy is {policy!r}; allowed are 'incremental', 'default' and 'random'")
    return replace(made, seconds=time.perf_counter() - began)


def _all_at_once(placement: InForce, after: Int32Array, load: FloatArray, policy: str) -> Plan:
    """The plan that changes every slot in which ``after`` differs, one group per layer."""
    layers, slots = np.nonzero(placement.slots != after)
    moves = np.empty((len(layers), 4), dtype=np.int32)
    moves[:, 0], moves[:, 1], moves[:, 2] = layers, slots, after[layers, slots]
    moves[:, 3] = np.cumsum(np.diff(layers, prepend=layers[:1]) != 0)
    before, then = (_planner.par(load, slots, placement.num_ranks) for slots in (placement.slots, after))
    return Plan(after, moves, before, then, policy)


def _incremental(
    series: npt.NDArray[Any],
    placement: InForce,
    num_nodes: int,
    num_groups: int,
    options: PlanOptions,
    speed: FloatArray,
) -> Plan:
    if placement.num_ranks > MOST_RANKS or placement.num_slots > MOST_SLOTS:
        raise PlanInputError(
            f"{placement.num_ranks} ranks with {placement.num_slots} slots per layer; the policy 'incremental' "
            f"works with at most {MOST_RANKS} ranks and {MOST_SLOTS} slots"
        )
    slots = placement.slots
    windows = series.astype(np.float64, copy=False)
    expected, variance, pars = windows[0], np.zeros((0, 0)), np.zeros((2, 0))
    if len(series) > 1:
        pars = _planner.pars_of_windows(windows, slots, placement.num_ranks, speed)
        # What is at the target in every window is so in any sum of windows.
        expected, variance = forecast(windows, pars[1] <= options.target_par - _planner.SEARCH_ROUNDING)
        if not variance.any():
            variance = np.zeros((0, 0))
    else:
        windows = np.zeros((0, 0, 0))
    floor = np.full(placement.num_layers, float(options.target_par))
    if options.count_noise:
        floor = np.maximum(
            floor, noise_par(expected * len(series), Placement(slots, placement.num_experts, placement.num_ranks))
        )

    def attempt(target: FloatArray, thorough: bool) -> Plan:
        after, moves, par_before, par_after, *p95_after = _planner.plan_incremental(
            expected,
            slots,
            variance,
            target,
            num_ranks=placement.num_ranks,
            num_nodes=num_nodes,
            thorough=thorough,
            rounds=options.rounds or 0,
            seconds=float(options.time_budget),
            seed=int(options.seed) % 2**64,
            threads=options.threads,
            max_moves=-1 if options.max_moves is None else options.max_moves,
            max_moves_per_rank=-1 if options.max_moves_per_rank is None else options.max_moves_per_rank,
            max_moves_between_nodes=-1 if options.max_moves_between_nodes is None else options.max_moves_between_nodes,
            far_cost=float(options.price_between_nodes),
            stay_near=num_nodes > 1 and num_groups > 1 and _groups_have_nodes(placement, num_nodes, num_groups),
            speed=speed,
            series=windows,
            pars=pars,
        )
        made = Plan(after, moves, par_before, par_after, "incremental")
        return replace(made, p95_before=pars[0].copy(), p95_after=p95_after[0]) if p95_after else made

    mean = expected.sum(axis=1) / placement.num_ranks  # tokens of a rank in each layer; times PAR: of the busiest
    thorough = options.effort == "thorough"
    best = attempt(floor, thorough)
    if options.max_moves is not None and best.num_moves > 0.9 * options.max_moves:
        # A plan for a nearer target needs fewer moves. The target is part of the way from the floor to the start:
        low, high = 0.0, 1.0
        for _ in range(FRUGAL_ATTEMPTS):
            part = 0.5 * (low + high)
            nearer = attempt(floor + part * np.maximum(best.par_before - floor, 0.0), False)
            if mean @ nearer.par_after < mean @ best.par_after:
                best = nearer
            if nearer.num_moves > 0.95 * options.max_moves:
                low = part
            else:
                high = part
    if mean @ (best.par_before - best.par_after) < options.min_gain * (mean @ best.par_before):
        return replace(
            best,
            physical_to_logical=slots.copy(),
            moves=np.zeros((0, 4), dtype=np.int32),
            par_after=best.par_before,
            p95_after=best.p95_before,
        )
    return best


def noise_par(counts: npt.ArrayLike, placement: Placement) -> FloatArray:
    """float64 [L]: the PAR that token counts show by chance when all ranks are equally loaded.

    The counts of independent tokens are Poisson: their variance is their mean. The largest of R normal variables is
    about sqrt(2 ln R) standard deviations above the mean.

    Args:
        counts: [L, E] tokens per logical expert.
        placement: the placement under which they were counted.
    """
    count = np.asarray(counts, dtype=np.float64)
    total = count.sum(axis=1)
    variance = (count / placement.replica_count).sum(axis=1) / placement.num_ranks  # of a rank, on average
    mean = total / placement.num_ranks
    deviation = np.divide(np.sqrt(variance), mean, out=np.zeros_like(mean), where=mean > 0)
    return np.asarray(1.0 + math.sqrt(2.0 * math.log(max(placement.num_ranks, 1))) * deviation)


def _groups_have_nodes(placement: InForce, num_nodes: int, num_groups: int) -> bool:
    """Whether all copies of each group of experts are on one node, in every layer."""
    slots = placement.slots
    group = np.where(slots == EMPTY, -1, slots // (placement.num_experts // num_groups))
    by_node = group.reshape(placement.num_layers, num_nodes, -1)
    return all(int(((by_node == g).any(axis=2)).sum(axis=1).max()) <= 1 for g in range(num_groups))
