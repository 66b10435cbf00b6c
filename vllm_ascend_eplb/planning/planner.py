# SPDX-License-Identifier: Apache-2.0
"""``plan``: checks what a caller gives and lets one of the policies answer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import EMPTY, FloatArray, Int32Array, Placement
from ..values.plan import Plan
from . import default
from .forecast import forecast

POLICIES = ("random", "default", "incremental", "incremental")
"""The policy that stands for each of vllm-ascend's ``eplb_policy_type`` 0..3."""


EFFORTS = ("fast", "thorough")


LARGEST_LOAD = 1e30
"""Largest load of an expert: sums of it still fit into float32, in which the default policy works as vLLM does."""


MOST_RANKS = 1024


MOST_SLOTS = 65535


FRUGAL_ATTEMPTS = 7
"""Where ``max_moves`` binds, a target that can be reached with so many moves is sought by so many bisections."""


class PlanInputError(ValueError):
    """An argument of ``plan`` that no policy can work with; the message says which, and what is allowed."""


@dataclass(frozen=True)
class _Limits:
    """The keyword arguments of ``plan``, checked; see there."""

    target_par: float
    effort: str
    time_budget: float
    rounds: int | None
    max_moves: int | None
    max_moves_per_rank: int | None
    min_gain: float
    count_noise: bool
    bytes_per_expert: float | None
    bandwidth: float | None
    bandwidth_between: float | None
    seconds_per_token: float | None
    horizon: float
    seed: int
    threads: int

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float = math.inf, optional: bool = True) -> None:
            value = getattr(self, name)
            if value is None and optional:
                return
            if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not low <= value <= high:
                bound = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise PlanInputError(f"{name} is {value!r}; allowed are numbers {bound}")

        if self.effort not in EFFORTS:
            raise PlanInputError(f"effort is {self.effort!r}; allowed are 'fast' and 'thorough'")
        tiny = 1e-300
        check("target_par", 1.0, 1e6, optional=False)
        check("time_budget", 0.0, 86400.0, optional=False)
        check("rounds", 1, 1e6)
        check("max_moves", 0, 2**62)
        check("max_moves_per_rank", 0, 2**62)
        check("min_gain", 0.0, 1.0, optional=False)
        check("horizon", tiny, 1e300, optional=False)
        check("threads", 1, 1024, optional=False)
        for name in ("bytes_per_expert", "bandwidth", "bandwidth_between", "seconds_per_token"):
            check(name, tiny, 1e300)
        if self.seconds_per_token is not None and (self.bytes_per_expert is None or self.bandwidth is None):
            raise PlanInputError(
                "seconds_per_token needs bytes_per_expert and bandwidth: together they are the cost model"
            )

    def far_cost(self) -> float:
        """What a receipt from another node costs, in receipts from the same node."""
        if self.bandwidth is None or self.bandwidth_between is None:
            return 1.0
        return max(1.0, self.bandwidth / self.bandwidth_between)

    def least_gain(self, num_ranks: int) -> float:
        """Tokens that one receipt must take off the busiest rank to be worth its bytes; ranks receive side by side."""
        if self.seconds_per_token is None or self.bytes_per_expert is None or self.bandwidth is None:
            return 0.0
        seconds = self.bytes_per_expert / self.bandwidth / num_ranks
        return seconds / (self.seconds_per_token * self.horizon)


def policy_from_type(policy_type: int) -> str:
    """The name of the policy for one of vllm-ascend's ``eplb_policy_type``.

    0 is "random", 1 "default" (DeepSeek's), 2 "incremental" (in place of swift: give it the load of one window, [L, E],
    for fewest moves) and 3 "incremental" (in place of flashlb: give it a series [T, L, E], and it also weighs the
    variance between the windows).

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
    min_gain: float = 0.0,
    count_noise: bool = False,
    bytes_per_expert: float | None = None,
    bandwidth: float | None = None,
    bandwidth_between: float | None = None,
    seconds_per_token: float | None = None,
    horizon: float = 1.0,
    seed: int = 0,
    threads: int = 1,
    rank_speed: npt.ArrayLike | None = None,
) -> Plan:
    """Plans the moves from the placement in force to one that suits ``load``.

    Args:
        load: [L, E] or a series [T, L, E] (oldest window first) of tokens per logical expert; integers or floats,
            finite, not negative, at most 1e30. From a series "incremental" forecasts the next window and its variance
            (``forecast.forecast``) and makes a plan that ages well; from one window it makes the fewest moves. The
            other policies add the windows up.
        physical_to_logical: int [L, P], the placement in force; -1 marks an empty slot.
        num_ranks: ranks that share the slots evenly, R.
        num_nodes: nodes that share the ranks evenly.
        num_groups: groups of consecutive experts. Where the nodes can share them evenly "default" keeps all copies of a
            group on one node, and "incremental" does where the placement in force does.
        policy: "incremental", "default" (DeepSeek's, as vLLM runs it) or "random". The keyword arguments below, but
            ``seed``, are for "incremental" only.
        target_par: a layer is left alone once its PAR is no greater.
        effort: "fast" is one descent, and up to 128 slots per layer a few rounds of improvement; "thorough" goes on
            improving for ``time_budget`` seconds.
        time_budget: seconds of "thorough", for all layers together.
        rounds: rounds of improvement per layer in "thorough" instead of a time budget; equal rounds give equal plans.
        max_moves: most moves in the plan, over all layers; spent where they bring most.
        max_moves_per_rank: most experts that a rank receives over all layers.
        min_gain: the plan is empty unless it takes at least this part off the busiest ranks, summed over layers.
        count_noise: the load is counts of tokens; do not plan for differences that counting alone explains.
        bytes_per_expert: bytes of one expert's weights in one layer.
        bandwidth: bytes/s that a rank receives from ranks of its node.
        bandwidth_between: bytes/s that a rank receives from other nodes; default the same.
        seconds_per_token: what one token less on the busiest rank of a layer saves. With the three above it makes the
            cost model: moves that save less, over ``horizon`` windows like this one, than the time in which their bytes
            are received (all ranks receive side by side) are left out.
        horizon: windows for which the plan is expected to hold.
        seed: of "random" and of improvement.
        threads: threads that share the layers. The plan does not depend on it.
        rank_speed: numbers [R], 0.001..1000 of each other: how fast the ranks are; only their ratios count. A rank of
            twice the speed is to get twice the load, and PARs are of load over speed. Default: all alike.

    Returns:
        The plan. Its moves come in small groups, those that pay most per byte first; after every group the placement
        is valid and no layer's PAR is above what it was before the plan. PARs are predicted for an even split over
        replicas, with "incremental" and a series under the forecast.

    Raises:
        PlanInputError: an argument is out of range.
        PlacementError: ``physical_to_logical`` is no valid placement.
    """
    began = time.perf_counter()
    limits = _Limits(
        target_par, effort, time_budget, rounds, max_moves, max_moves_per_rank, min_gain, count_noise,
        bytes_per_expert, bandwidth, bandwidth_between, seconds_per_token, horizon, seed, threads,
    )  # fmt: skip
    series = _checked_load(load)
    placement = _checked_placement(physical_to_logical, series.shape[1], series.shape[2], num_ranks)
    _check_topology(placement, num_nodes, num_groups)
    speed = _checked_speed(rank_speed, placement.num_ranks, policy)
    if policy == "incremental":
        made = _incremental(series, placement, num_nodes, num_groups, limits, speed)
    elif policy in ("default", "random"):
        total = series.sum(axis=0)
        if policy == "default":
            after = default.rebalance(
                total.astype(np.float32), placement.num_slots, num_groups, num_nodes, num_ranks, placement.slots
            )
        else:
            after = _planner.draw_placement(
                seed % 2**64, placement.num_layers, placement.num_experts, placement.num_slots, num_ranks
            )
        made = _all_at_once(placement, after, np.asarray(total, dtype=np.float64), policy)
    else:
        raise PlanInputError(f"policy is {policy!r}; allowed are 'incremental', 'default' and 'random'")
    return replace(made, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class _InForce:
    """A placement that was found valid; the fields of ``Placement`` that planning needs, without what it derives."""

    slots: Int32Array
    num_experts: int
    num_ranks: int

    @property
    def num_layers(self) -> int:
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.slots.shape[1])


def _all_at_once(placement: _InForce, after: Int32Array, load: FloatArray, policy: str) -> Plan:
    """The plan that changes every slot in which ``after`` differs, one group per layer."""
    layers, slots = np.nonzero(placement.slots != after)
    moves = np.empty((len(layers), 4), dtype=np.int32)
    moves[:, 0], moves[:, 1], moves[:, 2] = layers, slots, after[layers, slots]
    moves[:, 3] = np.cumsum(np.diff(layers, prepend=layers[:1]) != 0)
    before, then = (_planner.par(load, each, placement.num_ranks) for each in (placement.slots, after))
    return Plan(after, moves, before, then, policy)


def _incremental(
    series: npt.NDArray[Any],
    placement: _InForce,
    num_nodes: int,
    num_groups: int,
    limits: _Limits,
    speed: FloatArray,
) -> Plan:
    if placement.num_ranks > MOST_RANKS or placement.num_slots > MOST_SLOTS:
        raise PlanInputError(
            f"{placement.num_ranks} ranks with {placement.num_slots} slots per layer; the policy 'incremental' "
            f"works with at most {MOST_RANKS} ranks and {MOST_SLOTS} slots"
        )
    expected, variance = np.asarray(series[-1], dtype=np.float64), np.zeros((0, 0))
    if len(series) > 1:
        expected, variance = forecast(series.astype(np.float64))
    slots = placement.slots
    floor = np.full(placement.num_layers, limits.target_par)
    if limits.count_noise:
        floor = np.maximum(
            floor, noise_par(expected * len(series), Placement(slots, placement.num_experts, placement.num_ranks))
        )

    def attempt(target: FloatArray) -> Plan:
        after, moves, par_before, par_after = _planner.plan_incremental(
            expected,
            slots,
            variance,
            target,
            num_ranks=placement.num_ranks,
            num_nodes=num_nodes,
            thorough=limits.effort == "thorough",
            rounds=limits.rounds or 0,
            seconds=limits.time_budget,
            seed=limits.seed % 2**64,
            threads=limits.threads,
            max_moves=-1 if limits.max_moves is None else limits.max_moves,
            max_moves_per_rank=-1 if limits.max_moves_per_rank is None else limits.max_moves_per_rank,
            far_cost=limits.far_cost(),
            stay_near=num_nodes > 1 and num_groups > 1 and _groups_have_nodes(placement, num_nodes, num_groups),
            least_gain=limits.least_gain(placement.num_ranks),
            **({"speed": speed} if len(speed) else {}),
        )
        made = Plan(after, moves, par_before, par_after, "incremental")
        return _without_losers(made, slots) if len(speed) else made

    mean = expected.sum(axis=1) / placement.num_ranks  # tokens of a rank in each layer; times PAR: of the busiest
    best = attempt(floor)
    if limits.max_moves is not None and best.num_moves > 0.9 * limits.max_moves and limits.effort == "fast":
        # A plan for a nearer target spends no moves on the way to a far one. Nearer by part of the way to the start:
        low, high = 0.0, 1.0
        for _ in range(FRUGAL_ATTEMPTS):
            part = 0.5 * (low + high)
            other = attempt(floor + part * np.maximum(best.par_before - floor, 0.0))
            if mean @ other.par_after < mean @ best.par_after:
                best = other
            if other.num_moves > 0.95 * limits.max_moves:
                low = part
            else:
                high = part
    if mean @ (best.par_before - best.par_after) < limits.min_gain * (mean @ best.par_before):
        return Plan(slots.copy(), np.zeros((0, 4), dtype=np.int32), best.par_before, best.par_before, "incremental")
    return best


def _without_losers(made: Plan, slots: Int32Array) -> Plan:
    """Without the layers that the plan leaves worse. The search compares loads beside a rank's speed, not over it, and
    the two differ where the target is out of reach."""
    worse = made.par_after > made.par_before
    if not worse.any():
        return made
    after = np.where(worse[:, None], slots, made.physical_to_logical)
    return replace(
        made,
        physical_to_logical=after,
        moves=made.moves[~worse[made.moves[:, 0]]],
        par_after=np.where(worse, made.par_before, made.par_after),
    )


def _checked_speed(rank_speed: npt.ArrayLike | None, num_ranks: int, policy: str) -> FloatArray:
    """The speeds with a mean of 1; empty where all ranks are alike."""
    if rank_speed is None:
        return np.zeros(0)
    speed = np.asarray(rank_speed, dtype=np.float64)
    if speed.shape != (num_ranks,) or not (np.isfinite(speed).all() and speed.min() > 0):
        raise PlanInputError(f"rank_speed has shape {speed.shape}; give one number > 0 for each of {num_ranks} ranks")
    if speed.max() > 1000 * speed.min():
        raise PlanInputError(f"rank_speed is {speed.min():g}..{speed.max():g}; ranks may differ by a factor of 1000")
    if policy != "incremental":
        raise PlanInputError(f"the policy {policy!r} knows no rank_speed; use 'incremental', or leave rank_speed out")
    return np.zeros(0) if speed.min() == speed.max() else speed / speed.mean()


def noise_par(counts: npt.ArrayLike, placement: Placement) -> FloatArray:
    """float64 [L]: the PAR that counting tokens shows although all ranks are equally loaded.

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


def _groups_have_nodes(placement: _InForce, num_nodes: int, num_groups: int) -> bool:
    """Whether all copies of each group of experts are on one node, in every layer."""
    slots = placement.slots
    group = np.where(slots == EMPTY, -1, slots // (placement.num_experts // num_groups))
    by_node = group.reshape(placement.num_layers, num_nodes, -1)
    return all(int(((by_node == g).any(axis=2)).sum(axis=1).max()) <= 1 for g in range(num_groups))


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
    lowest, highest = array.min(), array.max()
    if not (lowest >= 0 and highest <= LARGEST_LOAD):  # NaN fails both
        bad = ~((array >= 0) & (array <= LARGEST_LOAD))
        window, layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise PlanInputError(
            f"the load of expert {expert} in layer {layer}, window {window} is {array[window, layer, expert]}; "
            f"allowed are finite numbers from 0 to {LARGEST_LOAD:g}"
        )
    return array if array.dtype == np.int64 else array.astype(np.float64)


def _checked_placement(
    physical_to_logical: npt.ArrayLike | Placement, num_layers: int, num_experts: int, num_ranks: int
) -> _InForce:
    if isinstance(physical_to_logical, Placement):
        placement = physical_to_logical
        if placement.num_ranks != num_ranks:
            raise PlanInputError(f"num_ranks is {num_ranks}, but the placement is for {placement.num_ranks} ranks")
    else:
        try:
            array = np.asarray(physical_to_logical)
        except ValueError as error:
            raise PlanInputError(f"physical_to_logical is no array: {error}") from None
        if not isinstance(num_ranks, (int, np.integer)):
            raise PlanInputError(f"num_ranks is {num_ranks!r}; give an integer")
        if array.dtype == np.int32 and array.ndim == 2 and len(array) == num_layers and 0 < num_ranks < 2**31:
            slots = np.ascontiguousarray(array)
            if _planner.is_valid(slots, num_experts, int(num_ranks)):
                return _InForce(slots, num_experts, int(num_ranks))
        placement = Placement(array, num_experts, int(num_ranks))  # says what is wrong
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise PlanInputError(
            f"load is for {num_layers} layers of {num_experts} experts, "
            f"the placement for {placement.num_layers} layers of {placement.num_experts}"
        )
    return _InForce(placement.physical_to_logical, num_experts, int(num_ranks))


def _check_topology(placement: _InForce, num_nodes: int, num_groups: int) -> None:
    if num_nodes < 1 or placement.num_ranks % num_nodes:
        raise PlanInputError(f"num_nodes is {num_nodes}; it must divide the {placement.num_ranks} ranks")
    if num_groups < 1 or placement.num_experts % num_groups:
        raise PlanInputError(f"num_groups is {num_groups}; it must divide the {placement.num_experts} experts")
