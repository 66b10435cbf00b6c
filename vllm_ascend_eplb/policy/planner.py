# SPDX-License-Identifier: Apache-2.0
"""``plan``: checks what a caller gives and lets one of the policies answer."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..placement import Placement, PlacementError
from ..plans import Plan
from . import default
from .forecast import forecast

POLICIES = ("random", "default", "incremental", "incremental")
"""The policy that stands for each of vllm-ascend's ``eplb_policy_type`` 0..3."""


LARGEST_LOAD = 1e30
"""Largest load of an expert: float32, in which the default policy works as vLLM does, sums 512 of them safely."""


class PlanInputError(ValueError):
    """An argument of ``plan`` that no policy can work with; the message says which, and what is allowed."""


def policy_from_type(policy_type: int) -> str:
    """The name of the policy for one of vllm-ascend's ``eplb_policy_type``.

    0 is "random", 1 "default" (DeepSeek's), 2 "incremental" (few moves, in place of swift) and 3 "incremental" too (in
    place of flashlb): give it the load as a series [T, L, E] and it weighs the variance between the windows.

    Raises:
        PlanInputError: the type is not 0..3.
    """
    if policy_type not in range(len(POLICIES)):
        raise PlanInputError(
            f"eplb_policy_type is {policy_type!r}; allowed are 0 (random), 1 (default), 2 and 3 (incremental)"
        )
    return POLICIES[policy_type]


def plan(
    load: npt.ArrayLike,
    physical_to_logical: npt.ArrayLike | Placement,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    policy: str = "incremental",
    *,
    target_par: float = 1.02,
    effort: str = "fast",
    time_budget: float = 0.3,
    rounds: int | None = None,
    max_moves: int | None = None,
    max_moves_per_rank: int | None = None,
    seed: int = 0,
    threads: int = 1,
) -> Plan:
    """Plans the moves from the placement in force to one that suits ``load``.

    Args:
        load: [L, E] or a series [T, L, E] (oldest window first) of tokens per logical expert; integers or floats, finite,
            not negative, at most 1e30.
        physical_to_logical: int [L, P], the placement in force; -1 marks an empty slot.
        num_ranks: ranks that share the slots evenly, R.
        num_nodes: nodes that share the ranks evenly.
        num_groups: groups of consecutive experts; "default" keeps the copies of a group's experts on one node where the
            groups can be shared evenly by the nodes.
        policy: "incremental", "default" (DeepSeek's, as vLLM runs it) or "random".
        target_par: "incremental" leaves a layer alone once its PAR is no greater.
        effort: "fast" is one descent; "thorough" goes on improving for ``time_budget`` seconds.
        time_budget: seconds of "thorough", for all layers together.
        rounds: rounds of improvement per layer in "thorough" instead of a time budget; equal rounds give equal plans.
        max_moves: most moves in the plan, over all layers.
        max_moves_per_rank: most experts that a rank receives over all layers.
        seed: of "random" and "thorough".
        threads: threads that share the layers. The plan does not depend on it.

    Returns:
        The plan; its moves are in the order in which they pay most.

    Raises:
        PlanInputError: an argument is out of range.
        PlacementError: ``physical_to_logical`` is no valid placement.
    """
    began = time.perf_counter()
    series = _checked_load(load)
    placement = _checked_placement(physical_to_logical, series.shape[1:], num_ranks)
    _check_topology(placement, num_nodes, num_groups)
    slots = placement.physical_to_logical
    if policy == "incremental":
        expected, variance = series[0].astype(np.float64), np.zeros((0, 0))
        if len(series) > 1:
            expected, variance = forecast(series.astype(np.float64))
        after, moves, par_before, par_after = _planner.plan_incremental(
            expected,
            slots,
            variance,
            num_ranks,
            target=target_par,
            thorough=effort == "thorough",
            rounds=rounds or 0,
            seconds=time_budget,
            seed=seed % 2**64,
            threads=threads,
            max_moves=-1 if max_moves is None else max_moves,
            max_moves_per_rank=-1 if max_moves_per_rank is None else max_moves_per_rank,
            least_gain=0.0,
        )
        return Plan(after, moves, par_before, par_after, policy, time.perf_counter() - began)
    total = series.sum(axis=0)
    if policy == "random":
        target = _planner.draw_placement(
            seed % 2**64, placement.num_layers, placement.num_experts, placement.num_slots, num_ranks
        )
    elif policy == "default":
        target = default.rebalance(
            total.astype(np.float32), placement.num_slots, num_groups, num_nodes, num_ranks, slots
        )
    else:
        raise PlanInputError(f"policy is {policy!r}; allowed are 'incremental', 'default' and 'random'")
    return replace(Plan.between(placement, target, total, policy), seconds=time.perf_counter() - began)


def _checked_load(load: npt.ArrayLike) -> npt.NDArray[Any]:
    """The load as an array [T, L, E] of int64 or float64."""
    try:
        array = np.asarray(load)
    except ValueError as error:  # rows of different length
        raise PlanInputError(f"load is no array: {error}") from None
    if array.dtype.kind not in "iuf":
        raise PlanInputError(f"load has dtype {array.dtype}; give integers or floats")
    if array.ndim not in (2, 3) or array.size == 0:
        raise PlanInputError(f"load has shape {array.shape}; give [layers, experts] or [windows, layers, experts]")
    if array.ndim == 2:
        array = array[None]
    bad = ~np.isfinite(array) | (array < 0) | (array > LARGEST_LOAD)
    if bad.any():
        window, layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise PlanInputError(
            f"the load of expert {expert} in layer {layer}, window {window} is {array[window, layer, expert]}; "
            f"allowed are finite numbers from 0 to {LARGEST_LOAD:g}"
        )
    return array if array.dtype == np.int64 else array.astype(np.float64)


def _checked_placement(
    physical_to_logical: npt.ArrayLike | Placement, shape: tuple[int, ...], num_ranks: int
) -> Placement:
    num_layers, num_experts = shape
    if isinstance(physical_to_logical, Placement):
        placement = physical_to_logical
        if placement.num_ranks != num_ranks:
            raise PlanInputError(f"num_ranks is {num_ranks}, but the placement is for {placement.num_ranks} ranks")
    else:
        placement = Placement(physical_to_logical, num_experts, num_ranks)
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise PlanInputError(
            f"load is for {num_layers} layers of {num_experts} experts, "
            f"the placement for {placement.num_layers} layers of {placement.num_experts}"
        )
    return placement


def _check_topology(placement: Placement, num_nodes: int, num_groups: int) -> None:
    if num_nodes < 1 or placement.num_ranks % num_nodes:
        raise PlanInputError(f"num_nodes is {num_nodes}; it must divide the {placement.num_ranks} ranks")
    if num_groups < 1 or placement.num_experts % num_groups:
        raise PlanInputError(f"num_groups is {num_groups}; it must divide the {placement.num_experts} experts")


__all__ = ["POLICIES", "PlacementError", "PlanInputError", "plan", "policy_from_type"]
