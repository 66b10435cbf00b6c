# SPDX-License-Identifier: Apache-2.0
"""Simulation: a recorded load, replayed through policies and settings.

For every setting the trace runs window by window. After each ``interval`` windows the policy plans from the load of
just these windows, as the server does, and the plan is carried out if it promises at least ``min_gain``; its effect
begins ``delay_steps`` steps into the next window. So no window is ever balanced with its own load.

What is not simulated: the threshold that rises after plans that did not pay, failed cycles, and load that differs
between the steps of one window.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .cost import CostModel
from .placement import FloatArray, Placement, PlacementError, peak_to_average
from .plans import EXPERT, LAYER, SLOT, Plan
from .policy import dispatch_shares, plan, shared_rank_load

PolicyChoice: TypeAlias = Literal["none", "incremental", "default", "random"]
POLICY_CHOICES: tuple[PolicyChoice, ...] = ("none", "incremental", "default", "random")

MAX_SIMULATION_BYTES = 64 << 20
MAX_WINDOWS = 100_000
NO_BETTER = 0.01
"""Settings whose gains differ by less than this part are taken for equal; the one that moves least is the best."""

_Finite: TypeAlias = Annotated[float, Field(ge=-1e15, le=1e15)]
_Series: TypeAlias = Annotated[tuple[_Finite, ...], Field(max_length=MAX_WINDOWS)]
_Counts: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=0, le=2**50)], ...], Field(max_length=MAX_WINDOWS)]
_Table: TypeAlias = Annotated[tuple[_Series, ...], Field(max_length=4096)]


class SimulationError(ValueError):
    """Settings that cannot be simulated, or a file that is no simulation."""


@dataclass(frozen=True)
class Setting:
    """One way to balance.

    Attributes:
        policy: "none" keeps the placement that the server starts with.
        interval: windows of the trace between two plans.
        redundant: redundant experts per layer.
        max_moves: most moves in one cycle; None for no limit.
        shares: splits an expert's tokens over its replicas by planned shares instead of evenly.
    """

    policy: PolicyChoice = "incremental"
    interval: int = 1
    redundant: int = 0
    max_moves: int | None = None
    shares: bool = False

    def describe(self) -> str:
        """In a few words; +n are redundant experts."""
        parts = [self.policy, f"+{self.redundant}"]
        if self.policy != "none" or self.shares:
            parts.insert(1, "every window" if self.interval == 1 else f"every {self.interval} windows")
        if self.max_moves is not None:
            parts.append(f"at most {self.max_moves} moves")
        if self.shares:
            parts.append("shares")
        return ", ".join(parts)


@dataclass(frozen=True)
class Conditions:
    """What all settings of a simulation share.

    Attributes:
        cost: the model of time.
        window_steps: forward steps in one window of the trace.
        delay_steps: steps from a window's end until its plan is in force.
        target_par, min_gain, effort: as in the server's settings of these names.
        num_groups: groups of consecutive experts that the policy "default" keeps on a node.
        threads: that plan.
    """

    cost: CostModel
    window_steps: int = 600
    delay_steps: int = 50
    target_par: float = 1.02
    min_gain: float = 0.01
    effort: str = "fast"
    num_groups: int = 1
    threads: int = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Outcome(_Frozen):
    """What came of one setting. Times are in seconds; those of steps concern the MoE layers alone.

    Attributes:
        policy, interval, redundant, max_moves, shares: the setting.
        par_mean, par_worst: PAR over layers by window: mean, worst layer.
        moves: experts moved after each window.
        cycles: plans carried out; skipped: plans that promised too little.
        bytes_moved: weights received over all ranks.
        bytes_between_nodes: the part of it that crosses nodes.
        step_seconds: of an average step. saved_seconds: of all steps of the trace, against the start placement
            without redundancy.
        receive_seconds: in which the busiest ranks received their experts; it overlaps with steps.
        commit_seconds: in which experts were copied into their slots; steps wait for it.
        net_seconds: saved - commit - exposed part of receive.
        planner_seconds: of planning, here, beside the steps.
    """

    policy: PolicyChoice
    interval: Annotated[int, Field(ge=1, le=MAX_WINDOWS)]
    redundant: Annotated[int, Field(ge=0, le=2**31)]
    max_moves: Annotated[int, Field(ge=0, le=2**50)] | None
    shares: bool
    par_mean: _Series
    par_worst: _Series
    moves: _Counts
    cycles: Annotated[int, Field(ge=0, le=MAX_WINDOWS)]
    skipped: Annotated[int, Field(ge=0, le=MAX_WINDOWS)]
    bytes_moved: _Finite
    bytes_between_nodes: _Finite
    step_seconds: _Finite
    saved_seconds: _Finite
    receive_seconds: _Finite
    commit_seconds: _Finite
    net_seconds: _Finite
    planner_seconds: _Finite

    @property
    def setting(self) -> Setting:
        return Setting(self.policy, self.interval, self.redundant, self.max_moves, self.shares)

    @property
    def mean_par(self) -> float:
        return float(np.mean(self.par_mean)) if self.par_mean else 1.0

    @property
    def total_moves(self) -> int:
        return sum(self.moves)


class Simulation(_Frozen):
    """Outcomes of one trace, and what the report shows of the best of them.

    Attributes:
        kind: what this file is; version: of the package that wrote it.
        trace: name of the trace; num_windows, num_layers, num_experts: T, L, E.
        num_ranks, num_nodes: R and N. machine, machine_source, model: of the cost model.
        expert_bytes: of one expert in one layer. batch: tokens that each rank brings into a step.
        window_steps, exposed: steps of a window; part of the transfers that steps are taken to wait for.
        interrupted: not all settings were tried.
        baseline_step_seconds: of an average step with the start placement and no redundancy.
        baseline_par_mean, baseline_par_worst: its PAR over layers by window.
        outcomes: best first, by net_seconds.
        expert_load: [L][E] load of each expert over the layer's mean, over the whole trace.
        rank_load_before, rank_load_after: [L][R] load of ranks over the mean in the last window, with the start
            placement and with the best setting's.
        replicas: [L][E] copies of each expert at the end of the best setting.
    """

    kind: Literal["vllm-ascend-eplb simulation"] = "vllm-ascend-eplb simulation"
    version: Annotated[str, Field(max_length=100)] = ""
    trace: Annotated[str, Field(max_length=500)] = ""
    num_windows: Annotated[int, Field(ge=1, le=MAX_WINDOWS)]
    num_layers: Annotated[int, Field(ge=1, le=4096)]
    num_experts: Annotated[int, Field(ge=1, le=65536)]
    num_ranks: Annotated[int, Field(ge=1, le=65536)]
    num_nodes: Annotated[int, Field(ge=1, le=65536)]
    machine: Annotated[str, Field(max_length=300)] = ""
    machine_source: Annotated[str, Field(max_length=1000)] = ""
    model: Annotated[str, Field(max_length=300)] = ""
    expert_bytes: _Finite = 0.0
    batch: _Finite = 0.0
    window_steps: Annotated[int, Field(ge=1, le=2**40)] = 1
    exposed: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    interrupted: bool = False
    seconds: _Finite = 0.0
    baseline_step_seconds: _Finite = 0.0
    baseline_par_mean: _Series = ()
    baseline_par_worst: _Series = ()
    outcomes: Annotated[tuple[Outcome, ...], Field(max_length=10_000)] = ()
    expert_load: _Table = ()
    rank_load_before: _Table = ()
    rank_load_after: _Table = ()
    replicas: Annotated[tuple[_Counts, ...], Field(max_length=4096)] = ()

    @property
    def best(self) -> Outcome | None:
        """The outcome that moves least among those that save most, within ``NO_BETTER``."""
        return _best(self.outcomes)

    def eplb_config(self) -> dict[str, object] | None:
        """The ``eplb_config`` that asks a server for the best setting; None where that is not to balance."""
        best = self.best
        if best is None or best.policy == "none":
            return None
        config: dict[str, object] = {
            "dynamic_eplb": True,
            "policy": best.policy,
            "expert_heat_collection_interval": best.interval * self.window_steps,
            "num_redundant_experts": best.redundant,
        }
        if best.max_moves is not None:
            config["max_moves_per_cycle"] = best.max_moves
        if best.shares:
            config["weighted_dispatch"] = True
        return config

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Simulation:
        """Reads what :meth:`to_json` wrote.

        Raises:
            SimulationError: the text is no simulation.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise SimulationError(f"no simulation: {where}: {first['msg']}") from None


def grid(
    policies: Sequence[PolicyChoice],
    intervals: Sequence[int],
    redundant: Sequence[int],
    max_moves: Sequence[int | None] = (None,),
    shares: Sequence[bool] = (False,),
) -> list[Setting]:
    """Every combination, without those that only differ in what they do not use."""
    settings: dict[Setting, None] = {}
    for policy, interval, extra, most, share in itertools.product(policies, intervals, redundant, max_moves, shares):
        if share and not extra:
            continue  # every expert has one copy
        if policy == "none":
            settings[Setting(policy, interval if share else 1, extra, None, share)] = None
        else:
            settings[Setting(policy, interval, extra, most if policy == "incremental" else None, share)] = None
    return list(settings)


def replays(settings: Sequence[Setting]) -> list[tuple[Setting, ...]]:
    """The settings, those together that differ in ``shares`` only: one replay answers both."""
    groups: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings:
        key = (setting.policy, setting.interval, setting.redundant, setting.max_moves)
        groups.setdefault(key, []).append(setting)
    return [tuple(group) for group in groups.values()]


def simulate(
    load: FloatArray,
    settings: Sequence[Setting],
    conditions: Conditions,
    *,
    exposed: float = 1.0,
    trace: str = "",
    version: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Replays a trace through every setting.

    Args:
        load: float64 [T, L, E], T >= 2.
        settings: what to try.
        conditions: what they share.
        exposed: part of the time of transfers that steps are taken to wait for, 0..1. They overlap with steps, so 1
            is an upper bound of what they cost.
        trace: name for the result. version: of the package.
        progress: called with (windows replayed so far, windows in all).

    Returns:
        The simulation. A KeyboardInterrupt ends it early: the settings that were tried to their end are in it, and
        ``interrupted`` is set.

    Raises:
        SimulationError: the trace has fewer than two windows, or a setting does not fit model and ranks.
    """
    if load.ndim != 3 or len(load) < 2:
        raise SimulationError(
            f"the trace has shape {load.shape}; at least 2 windows [T, layers, experts] are needed, one to plan from "
            f"and one to see what the plan brings"
        )
    for setting in settings:
        _start(load, setting, conditions.cost.num_ranks)
        if setting.interval < 1 or setting.interval >= len(load):
            raise SimulationError(
                f"an interval of {setting.interval} windows; a trace of {len(load)} windows allows 1..{len(load) - 1}"
            )
    began = time.perf_counter()
    cost = conditions.cost
    plain = Placement.initial(load.shape[1], load.shape[2], cost.num_ranks)
    baseline_par = peak_to_average(np.stack([plain.rank_load(window) for window in load]))
    baseline = cost.layer_seconds(baseline_par, plain.slots_per_rank).sum(axis=1)  # [T]
    outcomes: list[tuple[Outcome, Placement]] = []
    interrupted = False
    groups = replays(settings)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(groups) * len(load))

    try:
        for group in groups:
            outcomes += _replay(load, group, conditions, baseline, exposed, tick)
    except KeyboardInterrupt:
        interrupted = True
    outcomes.sort(key=lambda pair: -pair[0].net_seconds)
    mean = load.sum(axis=0)
    best = _best([outcome for outcome, _ in outcomes])
    final = next((placement for outcome, placement in outcomes if outcome is best), plain)
    return Simulation(
        version=version,
        trace=trace[:500],
        num_windows=len(load),
        num_layers=load.shape[1],
        num_experts=load.shape[2],
        num_ranks=cost.num_ranks,
        num_nodes=cost.num_nodes,
        machine=cost.machine.title,
        machine_source=cost.machine.source,
        model=cost.shape.name,
        expert_bytes=cost.expert_bytes,
        batch=cost.batch,
        window_steps=conditions.window_steps,
        exposed=exposed,
        interrupted=interrupted,
        seconds=time.perf_counter() - began,
        baseline_step_seconds=float(baseline.mean()),
        baseline_par_mean=tuple(baseline_par.mean(axis=1).round(5).tolist()),
        baseline_par_worst=tuple(baseline_par.max(axis=1).round(5).tolist()),
        outcomes=tuple(outcome for outcome, _ in outcomes),
        expert_load=_relative(mean),
        rank_load_before=_relative(plain.rank_load(load[-1])),
        rank_load_after=_relative(final.rank_load(load[-1])),
        replicas=tuple(tuple(row) for row in final.replica_count.tolist()),
    )


@dataclass
class _Tally:
    """What one setting has cost so far."""

    par_mean: list[float]
    par_worst: list[float]
    step_seconds: list[float]


def _replay(
    load: FloatArray,
    group: Sequence[Setting],
    conditions: Conditions,
    baseline: FloatArray,
    exposed: float,
    tick: Callable[[], None],
) -> Iterator[tuple[Outcome, Placement]]:
    """One replay; yields the outcome of each setting of ``group``, which differ in ``shares`` only."""
    cost, first = conditions.cost, group[0]
    placement = before = _start(load, first, cost.num_ranks)
    delay = min(1.0, conditions.delay_steps / conditions.window_steps)
    shares: FloatArray | None = None
    shares_before: FloatArray | None = None
    tallies = {setting: _Tally([], [], []) for setting in group}
    moves = [0] * len(load)
    cycles = skipped = 0
    crossed = 0
    receive = commit = planner = 0.0
    switched = False
    for t, window in enumerate(load):
        for setting, tally in tallies.items():
            par = _par(window, placement, shares if setting.shares else None, cost.num_ranks)
            seconds = cost.layer_seconds(par, placement.slots_per_rank)
            if switched:  # the first steps of the window still run as before
                old = _par(window, before, shares_before if setting.shares else None, cost.num_ranks)
                seconds = delay * cost.layer_seconds(old, placement.slots_per_rank) + (1.0 - delay) * seconds
                par = delay * old + (1.0 - delay) * par
            tally.par_mean.append(float(par.mean()))
            tally.par_worst.append(float(par.max()))
            tally.step_seconds.append(float(seconds.sum()))
        switched = False
        if (t + 1) % first.interval == 0 and t + 1 < len(load):
            seen = load[t + 1 - first.interval : t + 1].sum(axis=0)
            before, shares_before = placement, shares
            if first.policy != "none":
                made = _plan(seen, placement, first, conditions, t)
                planner += made.seconds
                gain = float(made.par_before.mean() - made.par_after.mean())
                if made.num_moves and (
                    gain >= conditions.min_gain * made.par_before.mean() or first.policy == "random"
                ):
                    near, far = receipts(made, placement, cost.num_nodes)
                    receive += cost.receive_seconds(near, far)
                    commit += cost.commit_seconds(near + far)
                    crossed += int(far.sum())
                    moves[t] = made.num_moves
                    placement = Placement(made.physical_to_logical, placement.num_experts, placement.num_ranks)
                    cycles += 1
                else:
                    skipped += 1
            if any(setting.shares for setting in group):
                shares = dispatch_shares(seen, placement, cost.num_ranks)
            switched = True
        tick()
    for setting, tally in tallies.items():
        saved = float(np.sum(baseline - np.asarray(tally.step_seconds))) * conditions.window_steps
        yield (
            Outcome(
                policy=setting.policy,
                interval=setting.interval,
                redundant=setting.redundant,
                max_moves=setting.max_moves,
                shares=setting.shares,
                par_mean=tuple(round(x, 5) for x in tally.par_mean),
                par_worst=tuple(round(x, 5) for x in tally.par_worst),
                moves=tuple(moves),
                cycles=cycles,
                skipped=skipped,
                bytes_moved=sum(moves) * cost.expert_bytes,
                bytes_between_nodes=crossed * cost.expert_bytes,
                step_seconds=float(np.mean(tally.step_seconds)),
                saved_seconds=saved,
                receive_seconds=receive,
                commit_seconds=commit,
                net_seconds=saved - commit - exposed * receive,
                planner_seconds=planner,
            ),
            placement,
        )


def receipts(made: Plan, start: Placement, num_nodes: int) -> tuple[FloatArray, FloatArray]:
    """([R], [R]): experts that each rank receives from its own node, and from other nodes.

    A copy comes from the own node where any rank there held the expert before the plan, and costs nothing where the
    rank itself did.
    """
    ranks, per_node = start.num_ranks, start.num_ranks // num_nodes
    layers, slots, experts = (made.moves[:, column].astype(np.int64) for column in (LAYER, SLOT, EXPERT))
    rank = slots // start.slots_per_rank
    held = np.zeros((start.num_layers, start.num_experts + 1, ranks), dtype=bool)
    held[
        np.arange(start.num_layers)[:, None],
        start.physical_to_logical,
        np.arange(start.num_slots)[None, :] // start.slots_per_rank,
    ] = True
    by_node = held.reshape(start.num_layers, start.num_experts + 1, num_nodes, per_node)
    on_node: npt.NDArray[np.bool_] = np.logical_or.reduce(by_node, axis=3)
    own = held[layers, experts, rank]
    near = on_node[layers, experts, rank // per_node] & ~own
    far = ~on_node[layers, experts, rank // per_node]
    return (
        np.bincount(rank[near], minlength=ranks).astype(np.float64),
        np.bincount(rank[far], minlength=ranks).astype(np.float64),
    )


def _plan(seen: FloatArray, placement: Placement, setting: Setting, conditions: Conditions, number: int) -> Plan:
    cost = conditions.cost
    if setting.policy == "incremental":
        return plan(
            seen,
            placement,
            cost.num_ranks,
            cost.num_nodes,
            conditions.num_groups,
            target_par=conditions.target_par,
            effort=conditions.effort,
            max_moves=setting.max_moves,
            threads=conditions.threads,
        )
    return plan(
        seen, placement, cost.num_ranks, cost.num_nodes, conditions.num_groups, policy=setting.policy, seed=number
    )


def _par(window: FloatArray, placement: Placement, shares: FloatArray | None, num_ranks: int) -> FloatArray:
    if shares is None:
        return placement.par(window)
    return peak_to_average(shared_rank_load(window, placement, shares, num_ranks))


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    if not outcomes:
        return None
    most = max(outcome.net_seconds for outcome in outcomes)
    return min(
        (outcome for outcome in outcomes if outcome.net_seconds >= most - NO_BETTER * abs(most)),
        key=lambda outcome: (outcome.bytes_moved, -outcome.net_seconds),
    )


def _start(load: FloatArray, setting: Setting, num_ranks: int) -> Placement:
    try:
        return Placement.initial(load.shape[1], load.shape[2], num_ranks, setting.redundant)
    except PlacementError as error:
        raise SimulationError(f"{setting.redundant} redundant experts on {num_ranks} ranks: {error}") from None


def _relative(table: FloatArray) -> tuple[tuple[float, ...], ...]:
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.ones_like(table), where=mean > 0)
    return tuple(tuple(row) for row in ratio.round(3).tolist())
