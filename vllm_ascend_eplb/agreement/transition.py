# SPDX-License-Identifier: Apache-2.0
"""The cycle of the balancer as one value and one pure function.

A cycle runs through these phases; between cycles the balancer only collects::

    COLLECT -> SNAPSHOT -> REDUCE -> PLAN -> BROADCAST -> MOVE -> COLLECT
    COLLECT -> LISTEN -> COLLECT   (every ``listen_steps`` steps: does EP rank 0 have an order?)
                   any failure, nothing in flight -> COLLECT (later than usual)
                   a failure with a round in flight -> DRAIN -> COLLECT
                   too many failures in a row, or a poisoned transfer group -> OFF

A due audit of the weights comes between two cycles. If it finds damage, a *repair* follows: a cycle that reduces
checksums instead of load, and copies experts again into the slots where the placement has them::

    COLLECT -> AUDIT -> COLLECT
    COLLECT -> AUDIT -> REDUCE -> PLAN -> BROADCAST -> MOVE -> COLLECT

Every rank holds a ``CycleState`` and calls ``advance`` once per step with the facts that all ranks have agreed on. The
function looks at nothing else, so the states of all ranks are equal at every step. Knowledge of a single rank (its
snapshot is ready, its staging is filled, its planner died) enters only through the ``Facts`` it posts.
"""

from __future__ import annotations

from dataclasses import replace

from .channel import Agreed, Facts
from .phases import Action, Actions, AgreementError, Command, CycleSettings, CycleState, Do, Failure, Phase


def advance(state: CycleState, agreed: Agreed | None, settings: CycleSettings) -> tuple[CycleState, Actions]:
    """One step of the balancer, or one turn within a step if the cycle is synchronous.

    Args:
        state: the state after the last step.
        agreed: the facts posted ``lag`` steps ago, minimum and maximum over all ranks; None if none were posted.
        settings: equal on all ranks.

    Returns:
        The state of this step, and the actions of every rank, in order.

    Raises:
        AgreementError: ranks disagree about the step, the phase or the placement.
    """
    if not (settings.synchronous and state.active):
        state = state.next_step()
    if state.phase is Phase.OFF:
        return state, ()
    if agreed is not None:
        _check_lock_step(agreed)
        if agreed.max.poisoned:
            return _switch_off(state, Failure.TRANSFER)
        if agreed.max.epoch != state.epoch:
            agreed = None  # posted before the last change of phase: stale
    if state.phase is Phase.COLLECT:
        return _collect(state, settings)
    if agreed is None:
        return _waiting(state, settings)
    if agreed.max.failure and state.phase is not Phase.DRAIN:
        return _fail(state, Failure(agreed.max.failure), settings)
    return _ON_FACTS[state.phase](state, agreed, settings)


def abandon(state: CycleState, settings: CycleSettings) -> CycleState:
    """The state after all ranks dropped what was under way, at the same step and with nothing in flight. They may have
    gone back to the start placement."""
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
    if cycle and not (audit and state.audit_due < state.due):  # the one due first goes first, so that neither starves
        return _begin(state, Phase.SNAPSHOT), (Action(Do.SNAPSHOT),)
    return (_enter(state, Phase.AUDIT), ()) if audit else (state, ())


def _listen(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    # Only EP rank 0 has orders, and all other ranks post zeros: the maximum is the order.
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
    if command in (Command.CYCLE, Command.REAPPLY):
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
    """Fails the cycle at its deadline. Deadlines are counted in steps, so all ranks meet them at the same step. Rounds
    have none: an issued round must arrive. A synchronous cycle has none: the planner's own time limit ends the wait."""
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
    # Ready includes a prepared round for each buffer; those that depend on no other round are issued at once.
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
    """Whether moving has taken so long that the rest of the plan gives way to a plan for newer load. The rounds
    committed so far keep their value, because moves are ordered by gain."""
    if not settings.cut_after or state.wanted in (Command.RESTORE, Command.REAPPLY) or state.repair:
        return False
    return state.step - state.entered >= max(settings.cut_after, state.collect_steps)


def _send_again(state: CycleState, agreed: Agreed, settings: CycleSettings) -> tuple[CycleState, Actions]:
    """Prepares the oldest round in flight again: it arrived on all ranks, but damaged on one."""
    if agreed.min.rounds_done < state.issued:
        return state, ()  # a later round is still in flight; its staging must not be reused yet
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
        audit_due = state.step  # the source slot may be damaged
    dropped = replace(_enter(state, Phase.COLLECT), due=state.step + pause, audit_due=audit_due, repair=False)
    return dropped, (Action(Do.DROP, failure=state.failure),)


def _finish(state: CycleState, settings: CycleSettings) -> tuple[CycleState, Actions]:
    done = replace(_enter(state, Phase.COLLECT), repair=False)
    if not state.repair:  # a repair does not change the window of load, orders and the count of failures
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
