# SPDX-License-Identifier: Apache-2.0
"""The cycle of the balancer as one value and one pure function.

A cycle runs through these phases; between cycles the balancer only collects::

    COLLECT -> SNAPSHOT -> REDUCE -> PLAN -> BROADCAST -> MOVE -> COLLECT
    COLLECT -> LISTEN -> COLLECT   (now and then: has an order come in on EP rank 0?)
                   any failure, nothing in flight -> COLLECT (later than usual)
                   a failure with a round in flight -> DRAIN -> COLLECT
                   too many failures in a row, or a poisoned transfer group -> OFF

Where an audit of the weights is due, it comes between two cycles. If it found nothing, that is all; else a *repair*
follows, a cycle that reduces checksums instead of load and moves experts to where the placement says they are::

    COLLECT -> AUDIT -> COLLECT
    COLLECT -> AUDIT -> REDUCE -> PLAN -> BROADCAST -> MOVE -> COLLECT

Every rank holds a ``CycleState`` and calls ``advance`` once per step with the facts that all ranks have agreed on. The
function looks at nothing else, so the states of all ranks are equal at every step. What a rank knows alone (its
snapshot is ready, its staging is filled, its planner died) enters only through the ``Facts`` it posts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeAlias

from .control import Agreed, Facts


class Phase(IntEnum):
    """Where in the cycle all ranks are."""

    OFF = 0  # for good; serving goes on with the placement in force
    COLLECT = 1  # load is being counted; nothing is posted
    SNAPSHOT = 2  # every rank copies its counts to the host
    REDUCE = 3  # the counts of all ranks are being summed on EP rank 0
    PLAN = 4  # the planner of EP rank 0 is at work
    BROADCAST = 5  # the plan travels to all ranks; each checks it and prepares its first rounds
    MOVE = 6  # rounds are prepared, sent and committed
    DRAIN = 7  # after a failure: the rounds in flight arrive, then the cycle is dropped
    LISTEN = 8  # load is being counted; all ranks learn whether an operator ordered anything
    AUDIT = 9  # every rank finishes summing its live slots; then all know whether any is damaged


class Failure(IntEnum):
    """Why a cycle was dropped, or balancing switched off. The largest value that any rank reports is agreed."""

    NONE = 0
    SNAPSHOT = 1
    REDUCE = 2
    PLANNER_LATE = 3
    PLANNER_FAILED = 4
    PLANNER_DIED = 5
    PLAN_LOST = 6
    PLAN_INVALID = 7
    ROUNDS_DIFFER = 8
    PREPARE = 9
    CHECKSUM = 10
    TRANSFER = 11
    AUDIT = 12

    @property
    def text(self) -> str:
        """The failure in words, for the log."""
        return _FAILURE_TEXT[self]

    @property
    def kind(self) -> str:
        """The failure as a label of the metrics."""
        return self.name.lower()


_FAILURE_TEXT = {
    Failure.NONE: "no failure",
    Failure.SNAPSHOT: "the load could not be copied to the host",
    Failure.REDUCE: "the load could not be summed over the ranks",
    Failure.PLANNER_LATE: "the planner did not answer within the steps it had",
    Failure.PLANNER_FAILED: "the planner answered with an error",
    Failure.PLANNER_DIED: "the planner process died",
    Failure.PLAN_LOST: "the plan did not arrive intact on every rank",
    Failure.PLAN_INVALID: "the plan is not valid for the placement in force",
    Failure.ROUNDS_DIFFER: "ranks cut the same plan into different rounds",
    Failure.PREPARE: "a rank could not prepare a round",
    Failure.CHECKSUM: "expert weights arrived damaged again and again",
    Failure.TRANSFER: "a transfer failed or did not end",
    Failure.AUDIT: "the weights in the slots could not be summed",
}


class Command(IntEnum):
    """What an operator may order while the server runs (orders.py). Numbers travel in ``Facts.order_command``."""

    NONE = 0
    PAUSE = 1  # begin no more cycles; one under way is completed
    RESUME = 2  # begin cycles again, after a whole interval of collecting
    CYCLE = 3  # one cycle now, paused or not
    RESTORE = 4  # back to the placement the server started with, and pause there
    INTERVALS = 5  # other intervals from now on


class Do(IntEnum):
    """What a rank has to do at a step; ``Action.round`` says with which round where one is meant."""

    SNAPSHOT = 1  # begin to copy the counts to the host
    REDUCE = 2  # post the sum of the counts
    REQUEST_PLAN = 3  # EP rank 0 hands the load to the planner
    BROADCAST = 4  # post the broadcast of the agreed plan
    PREPARE = 5  # everything of a round that can throw
    ISSUE = 6  # send and receive: nothing but the call
    COMMIT = 7  # staging to slots, maps in place
    FINISH = 8  # the cycle is complete (also when there was nothing to move)
    DROP = 9  # forget the rest of the cycle
    SWITCH_OFF = 10  # for good
    OBEY = 11  # an order took effect: note it
    NEW_WINDOW = 12  # forget the load counted so far
    REDUCE_SUMS = 13  # post the sums of all slots, one of which is damaged
    PLAN_REPAIR = 14  # EP rank 0 finds the damaged slots, and good copies of what belongs there
    END_AUDIT = 15  # nothing is damaged; the next pass over the slots begins


@dataclass(frozen=True)
class Action:
    do: Do
    round: int = -1
    failure: Failure = Failure.NONE


Actions: TypeAlias = tuple[Action, ...]


class AgreementError(RuntimeError):
    """Ranks that must be equal are not. Going on could give wrong answers, so the rank stops."""


def early(collect_steps: int) -> int:
    """Steps before the first cycle. It comes after a quarter of the interval, as in vLLM, whose counter starts at three
    quarters: a cold placement is the worst one."""
    return max(1, collect_steps // 4)


@dataclass(frozen=True)
class CycleSettings:
    """The settings that steer the clock; equal on all ranks (checked at start-up).

    Attributes:
        collect_steps: steps of collecting before a cycle begins.
        execution_steps: earliest steps from the snapshot to the first round.
        first_collect_steps: the same as ``collect_steps``, for the first cycle.
        max_failures: cycles dropped in a row after which balancing is switched off.
        buffers: staging buffers, that is rounds that may be in flight at a time (1 or 2). More are prepared ahead,
            so that one can be issued at every step at which a buffer is free, whatever the lag.
        max_resends: how often one round may be sent again after a checksum did not match.
        listen_steps: steps between two times at which all ranks learn of orders; 0 for never.
        cut_after: steps, or one collect interval if that is longer, after which a plan that is still being carried out
            gives way to a newer one, at a round boundary; 0 for never.
        least_plan_age: steps that a plan always has, however short the interval: over so few, load does not drift.
        audit_steps: steps from one audit of the weights to the next; 0 for none.
        synchronous: the whole cycle takes place within one step. ``advance`` is called again and again while the
            state is active, with facts agreed at once; the step does not count on meanwhile.
    """

    collect_steps: int
    execution_steps: int
    first_collect_steps: int
    max_failures: int = 5
    buffers: int = 1
    max_resends: int = 2
    least_plan_age: int = 0
    cut_after: int = 0
    listen_steps: int = 0
    audit_steps: int = 0
    synchronous: bool = False


@dataclass(frozen=True)
class CycleState:
    """The agreed state of the balancer; equal on all ranks at every step.

    Attributes:
        phase: where in the cycle we are.
        epoch: number of phase changes so far. Facts posted in an older epoch are stale.
        step: steps so far.
        cycle: number of the cycle under way, or of the last one.
        due: step at which the next cycle begins (phase COLLECT).
        collect_steps, execution_steps: the intervals in force; those of the settings until an order changes them.
        listen_at: step at which orders are next asked for (phase COLLECT).
        order: number of the last order taken; 0 before the first.
        paused: whether cycles begin only when ordered.
        wanted: the cycle that was ordered and is not yet over: CYCLE, RESTORE or NONE.
        entered: step at which the phase was entered.
        snapshot_at: step of the snapshot of this cycle.
        plan_length, plan_digest: of the agreed plan, in bytes and as a hash.
        rounds: rounds of the agreed plan.
        prepared, issued, committed: rounds so far; committed <= issued <= prepared <= rounds.
        resends: how often the oldest round in flight was sent again.
        failures: cycles dropped in a row.
        failure: why the last cycle was dropped or is being drained.
        audit_due: step at which the next audit is to be agreed on (phase COLLECT); -1 for never.
        repair: whether the cycle under way repairs slots that an audit found damaged.
    """

    phase: Phase = Phase.COLLECT
    epoch: int = 0
    step: int = 0
    cycle: int = 0
    due: int = 0
    collect_steps: int = 1
    execution_steps: int = 1
    listen_at: int = 0
    order: int = 0
    paused: bool = False
    wanted: Command = Command.NONE
    entered: int = 0
    snapshot_at: int = 0
    plan_length: int = 0
    plan_digest: int = 0
    rounds: int = 0
    prepared: int = 0
    issued: int = 0
    committed: int = 0
    resends: int = 0
    failures: int = 0
    failure: Failure = Failure.NONE
    audit_due: int = -1
    repair: bool = False

    @classmethod
    def start(cls, settings: CycleSettings) -> CycleState:
        return cls(
            due=settings.first_collect_steps,
            collect_steps=settings.collect_steps,
            execution_steps=settings.execution_steps,
            listen_at=settings.listen_steps,
            audit_due=settings.audit_steps or -1,
        )

    @property
    def active(self) -> bool:
        """Whether facts are posted at this step."""
        return self.phase not in (Phase.OFF, Phase.COLLECT)

    @property
    def in_flight(self) -> int:
        """Rounds that were issued and not yet committed. A cycle that was dropped leaves its counts behind."""
        return self.issued - self.committed if self.phase in (Phase.MOVE, Phase.DRAIN) else 0

    def plan_age_limit(self, settings: CycleSettings) -> int:
        """Steps from the snapshot after which a plan that has not arrived is dropped."""
        return max(self.collect_steps, settings.least_plan_age) + self.execution_steps


def advance(state: CycleState, agreed: Agreed | None, settings: CycleSettings) -> tuple[CycleState, Actions]:
    """One step of the balancer, or one turn within a step where the cycle is synchronous.

    Args:
        state: the state after the last step.
        agreed: the facts posted ``lag`` steps ago, minimum and maximum over all ranks; None where none were posted.
        settings: equal on all ranks.

    Returns:
        The state of this step, and what every rank has to do now, in order.

    Raises:
        AgreementError: ranks disagree about the step, the phase or the placement.
    """
    if not (settings.synchronous and state.active):
        state = replace(state, step=state.step + 1)
    if state.phase is Phase.OFF:
        return state, ()
    if agreed is not None:
        _check_lock_step(agreed)
        if agreed.max.poisoned:
            return _switch_off(state, Failure.TRANSFER)
        if agreed.max.epoch != state.epoch:
            agreed = None  # posted before the last change of phase: says nothing about this one
    if state.phase is Phase.COLLECT:
        return _collect(state, settings)
    if agreed is None:
        return _waiting(state, settings)
    if agreed.max.failure and state.phase is not Phase.DRAIN:
        return _fail(state, Failure(agreed.max.failure), settings)
    return _ON_FACTS[state.phase](state, agreed, settings)


def abandon(state: CycleState, settings: CycleSettings) -> CycleState:
    """The state after all ranks, at the same step and with nothing in flight, dropped whatever was under way and went
    back to the initial placement."""
    if state.phase is Phase.OFF:
        return state
    wanted = Command.NONE if state.wanted is Command.RESTORE else state.wanted
    return replace(
        _enter(state, Phase.COLLECT),
        due=state.step + state.collect_steps,
        audit_due=state.step + settings.audit_steps if settings.audit_steps else state.audit_due,
        committed=state.issued,
        wanted=wanted,
        repair=False,
    )


def _check_lock_step(agreed: Agreed) -> None:
    for name in ("step", "epoch", "placement"):
        low, high = getattr(agreed.min, name), getattr(agreed.max, name)
        if low != high:
            raise AgreementError(
                f"expert-parallel ranks disagree about the {name}: {low:#x} against {high:#x}; "
                "this rank stops, because a server with different placements on its ranks gives wrong answers"
            )


def _enter(state: CycleState, phase: Phase) -> CycleState:
    return replace(state, phase=phase, epoch=state.epoch + 1, entered=state.step)


def _collect(state: CycleState, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if settings.listen_steps and state.step >= state.listen_at:
        return _enter(state, Phase.LISTEN), ()
    cycle = state.step >= state.due and (state.wanted is not Command.NONE or not state.paused)
    audit = 0 <= state.audit_due <= state.step
    if cycle and not (audit and state.audit_due < state.due):  # what was due first, so that neither starves
        return _begin(state, Phase.SNAPSHOT), (Action(Do.SNAPSHOT),)
    return (_enter(state, Phase.AUDIT), ()) if audit else (state, ())


def _listen(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    # EP rank 0 alone hears of orders, and all other ranks post zeros: the maximum is what it heard.
    actions: Actions = ()
    if agreed.max.order > state.order:
        state, actions = _obey(state, agreed.max)
    return replace(_enter(state, Phase.COLLECT), listen_at=state.step + settings.listen_steps), actions


def _obey(state: CycleState, order: Facts) -> tuple[CycleState, Actions]:
    state, noted = replace(state, order=order.order), (Action(Do.OBEY),)
    later = state.step + state.collect_steps
    command = Command(order.order_command)
    if command is Command.PAUSE:
        return replace(state, paused=True, wanted=Command.NONE), noted
    if command is Command.RESUME:
        resumed = replace(state, paused=False, wanted=Command.NONE, due=later)
        return resumed, (Action(Do.NEW_WINDOW), *noted)
    if command is Command.CYCLE:
        return replace(state, wanted=command, due=state.step), noted
    if command is Command.RESTORE:
        return replace(state, wanted=command, due=state.step, paused=True), noted
    collect_steps = order.order_collect_steps or state.collect_steps
    changed = replace(
        state,
        collect_steps=collect_steps,
        execution_steps=order.order_execution_steps or state.execution_steps,
        due=state.step + collect_steps,
    )
    return changed, (Action(Do.NEW_WINDOW), *noted)


def _begin(state: CycleState, phase: Phase, repair: bool = False) -> CycleState:
    return replace(
        _enter(state, phase),
        cycle=state.cycle + 1,
        snapshot_at=state.step,
        plan_length=0,
        plan_digest=0,
        rounds=0,
        prepared=0,
        issued=0,
        committed=0,
        resends=0,
        failure=Failure.NONE,
        repair=repair,
    )


def _audit(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if not agreed.min.ready:
        return state, ()
    state = replace(state, audit_due=state.step + settings.audit_steps)
    if not agreed.max.damaged:
        return _enter(state, Phase.COLLECT), (Action(Do.END_AUDIT),)
    return _begin(state, Phase.REDUCE, repair=True), (Action(Do.REDUCE_SUMS),)


def _waiting(state: CycleState, settings: CycleSettings) -> tuple[CycleState, Actions]:
    """Deadlines, counted in steps and so agreed by themselves. Rounds have none: what was issued must arrive. Nor has a
    synchronous cycle: the planner's own time limit ends the wait."""
    late = state.step - state.snapshot_at > state.plan_age_limit(settings)
    if late and state.phase in (Phase.SNAPSHOT, Phase.REDUCE, Phase.PLAN, Phase.BROADCAST):
        return _fail(state, _LATE[state.phase], settings)
    return state, ()


_LATE = {
    Phase.SNAPSHOT: Failure.SNAPSHOT,
    Phase.REDUCE: Failure.REDUCE,
    Phase.PLAN: Failure.PLANNER_LATE,
    Phase.BROADCAST: Failure.PLAN_LOST,
}


def _snapshot(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if not agreed.min.ready:
        return _waiting(state, settings)
    return _enter(state, Phase.REDUCE), (Action(Do.REDUCE),)


def _reduce(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if not agreed.min.ready:
        return _waiting(state, settings)
    return _enter(state, Phase.PLAN), (Action(Do.PLAN_REPAIR if state.repair else Do.REQUEST_PLAN),)


def _plan(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if agreed.max.plan_number != state.cycle:
        return _waiting(state, settings)
    if agreed.max.plan_length == 0:
        return _finish(state, settings)  # nothing worth moving
    wait = not (settings.synchronous or state.repair)
    if wait and state.step - state.snapshot_at < state.execution_steps:
        return state, ()
    known = replace(state, plan_length=agreed.max.plan_length, plan_digest=agreed.max.plan_digest)
    return _enter(known, Phase.BROADCAST), (Action(Do.BROADCAST),)


def _broadcast(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if not agreed.min.ready:
        return _waiting(state, settings)
    if agreed.min.rounds != agreed.max.rounds:
        return _fail(state, Failure.ROUNDS_DIFFER, settings)
    if agreed.max.rounds == 0:
        return _finish(state, settings)
    # Ready means that a round for each buffer is prepared, too: those that build on no other go out at once.
    rounds = agreed.max.rounds
    first = min(rounds, settings.buffers)
    issued, prepared = min(agreed.min.rounds_ready, first), min(rounds, first + 1)
    actions = [Action(Do.ISSUE, number) for number in range(issued)]
    actions += [Action(Do.PREPARE, number) for number in range(first, prepared)]
    return replace(_enter(state, Phase.MOVE), rounds=rounds, prepared=prepared, issued=issued), tuple(actions)


def _move(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    actions: Actions = ()
    if state.in_flight and agreed.min.rounds_intact > state.committed:
        actions += (Action(Do.COMMIT, state.committed),)
        state = replace(state, committed=state.committed + 1, resends=0)
    elif state.in_flight and agreed.min.rounds_done > state.committed:
        return _send_again(state, agreed, settings)
    if state.committed == state.rounds:
        state, done = _finish(state, settings)
        return state, actions + done
    if _outdated(state, settings):
        if state.in_flight:
            return state, actions
        state, done = _finish(state, settings)
        return replace(state, due=state.step + 1), actions + done
    if agreed.min.rounds_ready > state.issued and state.in_flight < settings.buffers:
        actions += (Action(Do.ISSUE, state.issued),)
        state = replace(state, issued=state.issued + 1)
    if state.prepared < state.rounds and state.prepared - state.committed < 2 * settings.buffers + 2:
        actions += (Action(Do.PREPARE, state.prepared),)
        state = replace(state, prepared=state.prepared + 1)
    return state, actions


def _outdated(state: CycleState, settings: CycleSettings) -> bool:
    """Whether moving has taken so long that the rest of the plan gives way to one for newer load. What was committed
    so far is worth having: moves are ordered by gain."""
    if not settings.cut_after or state.wanted is Command.RESTORE or state.repair:
        return False
    return state.step - state.entered >= max(settings.cut_after, state.collect_steps)


def _send_again(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    """The oldest round in flight arrived everywhere, but damaged somewhere: back to before it was prepared."""
    if agreed.min.rounds_done < state.issued:
        return state, ()  # a later round is still in flight; staging must not be reused before it arrived
    if state.resends >= settings.max_resends:
        return _drop(replace(state, failure=Failure.CHECKSUM), settings)
    oldest = state.committed
    again = replace(_enter(state, Phase.MOVE), issued=oldest, prepared=oldest + 1, resends=state.resends + 1)
    return again, (Action(Do.PREPARE, oldest),)


def _drain(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    if agreed.min.rounds_done < state.issued:
        return state, ()
    return _drop(state, settings)


def _fail(state: CycleState, failure: Failure, settings: CycleSettings) -> tuple[CycleState, Actions]:
    state = replace(state, failure=failure)
    if state.in_flight:
        return _enter(state, Phase.DRAIN), ()
    return _drop(state, settings)


def _drop(state: CycleState, settings: CycleSettings) -> tuple[CycleState, Actions]:
    failures = state.failures + 1
    state = replace(state, failures=failures)
    if failures >= settings.max_failures:
        return _switch_off(state, state.failure)
    pause = state.collect_steps * min(2**failures, 16)
    audit_due = state.audit_due
    if state.repair or state.phase is Phase.AUDIT:
        audit_due = state.step + max(pause, settings.audit_steps)
    elif settings.audit_steps and state.failure is Failure.CHECKSUM:
        audit_due = state.step  # the slot that it was sent from may be damaged
    dropped = replace(_enter(state, Phase.COLLECT), due=state.step + pause, audit_due=audit_due, repair=False)
    return dropped, (Action(Do.DROP, failure=state.failure),)


def _finish(state: CycleState, settings: CycleSettings) -> tuple[CycleState, Actions]:
    done = replace(_enter(state, Phase.COLLECT), repair=False)
    if not state.repair:  # a repair leaves the window of load, orders and the count of failures as they are
        done = replace(done, due=state.step + state.collect_steps, failures=0, wanted=Command.NONE)
    return done, (Action(Do.FINISH),)


def _switch_off(state: CycleState, failure: Failure) -> tuple[CycleState, Actions]:
    return replace(_enter(state, Phase.OFF), failure=failure), (Action(Do.SWITCH_OFF, failure=failure),)


_ON_FACTS = {
    Phase.LISTEN: _listen,
    Phase.SNAPSHOT: _snapshot,
    Phase.REDUCE: _reduce,
    Phase.PLAN: _plan,
    Phase.BROADCAST: _broadcast,
    Phase.MOVE: _move,
    Phase.DRAIN: _drain,
    Phase.AUDIT: _audit,
}
