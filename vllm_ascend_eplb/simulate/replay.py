# SPDX-License-Identifier: Apache-2.0
"""Simulation: a recorded load, replayed through policies and settings.

For every setting the trace runs window by window. After each ``interval`` windows the policy plans from the load of
these windows, as the server does. The plan is carried out if it promises at least ``min_gain``, and takes effect
``delay_steps`` steps into the next window. So no window is balanced with its own load.

Not simulated: the threshold that rises after plans that did not pay, failed cycles, and load that differs between the
steps of one window.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..planning import dispatch_shares, plan
from ..planning.shares import shared_slot_load
from ..values.placement import FloatArray, Placement, PlacementError, peak_to_average
from ..values.plan import EXPERT, LAYER, SLOT, Plan
from .cost import CostModel
from .result import Conditions, Outcome, PolicyChoice, Setting, Simulation, SimulationError, best_outcome


def grid(
    policies: Sequence[PolicyChoice],
    intervals: Sequence[int],
    redundant: Sequence[int],
    max_moves: Sequence[int | None] = (None,),
    shares: Sequence[bool] = (False,),
) -> list[Setting]:
    """Every combination of the values, without combinations that differ only in a value that is not used."""
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
    """Groups of settings that differ in ``shares`` only: one replay serves all settings of a group."""
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
        settings: settings to try.
        conditions: what all settings share.
        exposed: part of the transfer time that steps are assumed to wait for, 0..1. Transfers overlap with steps, so 1
            is an upper bound of their cost.
        trace: name for the result. version: of the package.
        progress: called with (windows replayed so far, windows in all).

    Returns:
        The simulation. A KeyboardInterrupt ends it early: the result then has only the settings that were replayed in
        full, and ``interrupted`` is set.

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
    baseline = np.array([cost.layer_seconds(plain.slot_load(window)).sum() for window in load])  # [T]
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
    best = best_outcome([outcome for outcome, _ in outcomes])
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
    """PAR and time of one setting by window, so far."""

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
            par, seconds = _par_and_seconds(window, placement, shares if setting.shares else None, cost)
            if switched:  # the first steps of the window still run as before
                old, old_seconds = _par_and_seconds(window, before, shares_before if setting.shares else None, cost)
                seconds = delay * old_seconds + (1.0 - delay) * seconds
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

    A copy comes from the rank's own node if any rank there held the expert before the plan. It is not counted if the
    rank itself held the expert.
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


def _par_and_seconds(
    window: FloatArray, placement: Placement, shares: FloatArray | None, cost: CostModel
) -> tuple[FloatArray, FloatArray]:
    """([L], [L]): PAR and seconds in one step of each layer, with an even split where there are no shares."""
    by_slot = placement.slot_load(window) if shares is None else shared_slot_load(window, placement, shares)
    par = peak_to_average(by_slot.reshape(len(by_slot), cost.num_ranks, -1).sum(axis=2))
    return par, cost.layer_seconds(by_slot)


def _start(load: FloatArray, setting: Setting, num_ranks: int) -> Placement:
    try:
        return Placement.initial(load.shape[1], load.shape[2], num_ranks, setting.redundant)
    except PlacementError as error:
        raise SimulationError(f"{setting.redundant} redundant experts on {num_ranks} ranks: {error}") from None


def _relative(table: FloatArray) -> tuple[tuple[float, ...], ...]:
    mean = table.mean(axis=1, keepdims=True)
    ratio = np.divide(table, mean, out=np.ones_like(table), where=mean > 0)
    return tuple(tuple(row) for row in ratio.round(3).tolist())
