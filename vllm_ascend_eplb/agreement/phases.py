# SPDX-License-Identifier: Apache-2.0
"""Types of the cycle: phases, failures, commands, actions, and the agreed state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias


class Phase(IntEnum):
    """The phase of the cycle, equal on all ranks."""

    OFF = 0  # permanent; serving goes on with the placement in force
    COLLECT = 1  # load is being counted; nothing is posted
    SNAPSHOT = 2  # every rank copies its counts to the host
    REDUCE = 3  # the counts of all ranks are being summed on EP rank 0
    PLAN = 4  # the planner of EP rank 0 is at work
    BROADCAST = 5  # the plan travels to all ranks; each checks it and prepares its first rounds
    MOVE = 6  # rounds are prepared, sent and committed
    DRAIN = 7  # after a failure: the rounds in flight arrive, then the cycle is dropped
    LISTEN = 8  # load is being counted; all ranks learn whether an operator ordered anything
    AUDIT = 9  # every rank finishes summing its live slots; then all ranks know whether a slot is damaged


class Failure(IntEnum):
    """The reason why a cycle was dropped, or balancing switched off. The largest value of any rank is agreed."""

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
    """Orders that an operator may give while the server runs (orders.py). ``Facts.order_command`` holds the number."""

    NONE = 0
    PAUSE = 1  # begin no more cycles; one under way is completed
    RESUME = 2  # begin cycles again, after a whole interval of collecting
    CYCLE = 3  # one cycle now, paused or not
    RESTORE = 4  # back to the placement the server started with, and pause there
    INTERVALS = 5  # other intervals from now on
    REAPPLY = 6  # back to the placement that was in force before experts went to their start slots


class Do(IntEnum):
    """Tasks of a rank at a step. ``Action.round`` is the round number for PREPARE, ISSUE and COMMIT, else -1."""

    SNAPSHOT = 1  # begin to copy the counts to the host
    REDUCE = 2  # post the sum of the counts
    REQUEST_PLAN = 3  # EP rank 0 hands the load to the planner
    BROADCAST = 4  # post the broadcast of the agreed plan
    PREPARE = 5  # everything of a round that can throw
    ISSUE = 6  # send and receive: nothing but the call
    COMMIT = 7  # staging to slots, maps in place
    FINISH = 8  # the cycle is complete (also when there was nothing to move)
    DROP = 9  # forget the rest of the cycle
    SWITCH_OFF = 10  # permanently
    OBEY = 11  # note that an order took effect
    NEW_WINDOW = 12  # forget the load counted so far
    REDUCE_SUMS = 13  # post the checksums of all slots, because a slot is damaged
    PLAN_REPAIR = 14  # EP rank 0 finds the damaged slots, and good copies of their experts
    END_AUDIT = 15  # nothing is damaged; the next pass over the slots begins


@dataclass(frozen=True)
class Action:
    do: Do
    round: int = -1
    failure: Failure = Failure.NONE


Actions: TypeAlias = tuple[Action, ...]


class AgreementError(RuntimeError):
    """Ranks disagree about a fact that must be equal. Wrong answers could follow, so the rank stops."""


def early(collect_steps: int) -> int:
    """Steps before the first cycle: a quarter of the interval, as in vLLM, whose counter starts at three quarters. The
    start placement does not follow the load, so waiting longer costs most there."""
    return max(1, collect_steps // 4)


@dataclass(frozen=True)
class CycleSettings:
    """The settings that control the timing of cycles; equal on all ranks (checked at start-up).

    Attributes:
        collect_steps: steps of collecting before a cycle begins.
        execution_steps: least steps from the snapshot to the first round.
        first_collect_steps: the same as ``collect_steps``, for the first cycle.
        max_failures: cycles dropped in a row after which balancing is switched off.
        buffers: staging buffers: rounds that may be in flight at a time (1 or 2). More rounds are prepared ahead, so
            that a round can be issued at every step at which a buffer is free, whatever the lag.
        max_resends: most times that a round is sent again after a checksum mismatch.
        listen_steps: steps between two steps at which all ranks learn of orders; 0 for never.
        cut_after: steps, or one collect interval if that is longer, after which a plan that is still being carried out
            gives way to a newer plan, at a round boundary; 0 for never.
        least_plan_age: age in steps up to which a plan is never dropped, however short the interval.
        audit_steps: steps from one audit of the weights to the next; 0 for none.
        synchronous: whether the whole cycle takes place within one step. ``advance`` is then called repeatedly while
            the state is active, with facts agreed at once; the step number does not change meanwhile.
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
        phase: phase of the cycle.
        epoch: number of phase changes so far. Facts posted in an older epoch are stale.
        step: steps so far.
        cycle: number of the cycle under way, or of the last one.
        due: step at which the next cycle begins (phase COLLECT).
        collect_steps, execution_steps: the intervals in force; those of the settings until an order changes them.
        listen_at: step at which ranks next learn of orders (phase COLLECT).
        order: number of the last order taken; 0 before the first.
        paused: whether cycles begin only when ordered.
        wanted: the ordered cycle that has not ended yet: CYCLE, RESTORE, REAPPLY or NONE.
        entered: step at which the phase was entered.
        snapshot_at: step of the snapshot of this cycle.
        plan_length, plan_digest: bytes and hash of the agreed plan.
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

    def next_step(self) -> CycleState:
        """The same state one step later, without ``dataclasses.replace``, which takes most of a step between cycles."""
        following = object.__new__(CycleState)
        following.__dict__.update(self.__dict__, step=self.step + 1)
        return following

    @property
    def active(self) -> bool:
        """Whether facts are posted at this step."""
        return self.phase not in (Phase.OFF, Phase.COLLECT)

    @property
    def in_flight(self) -> int:
        """Rounds that were issued and not yet committed; 0 in phases whose counts are of an earlier cycle."""
        return self.issued - self.committed if self.phase in (Phase.MOVE, Phase.DRAIN) else 0

    def plan_age_limit(self, settings: CycleSettings) -> int:
        """Steps from the snapshot after which a plan that has not arrived is dropped."""
        return max(self.collect_steps, settings.least_plan_age) + self.execution_steps
