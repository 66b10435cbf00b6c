# SPDX-License-Identifier: Apache-2.0
"""EplbUpdator: drives the balancer from the two calls that an engine makes around every forward.

One step, on every rank, before every forward::

    facts ──post──> ControlChannel ──read──> agreed facts ──advance──> state, actions ──> one collaborator per action
    (what this      (all ranks; the         (minimum and              (equal on
     rank knows)     result comes later)     maximum over ranks)       all ranks)

A cycle, from one window of load to the next placement::

    phase       collaborator   what happens                                              where
    SNAPSHOT    Gather         the counts of the window are copied to the host           every rank
    REDUCE      Gather         they are summed                                           EP rank 0
    PLAN        Lead           the planner is asked, its answer is weighed               EP rank 0
    BROADCAST   Rollout        the plan travels, is checked, first rounds are prepared   every rank
    MOVE        Rollout        round by round: prepare, issue, commit                    every rank
    (end)       Lead           statistics, log line, map file                            EP rank 0

Between cycles, ``Auditor`` sums the live slots; a repair takes the place of REDUCE and PLAN.

A step waits only for the agreed facts. Everything that takes time runs elsewhere: planning in the planner's process,
checks and preparations in a thread, transfers on streams or threads of their own. In mode sync the same turns follow
one another within one step until the cycle ends. Parts, agreement and rounds are the same, so the result is the same.

Each collaborator holds its own part of the cycle, and only while that part exists. They share ``Parts`` (the parts of
the balancer) and ``Work`` (its state at this step); none of them calls another.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

from ..agreement.channel import ControlError, Facts, FlightRecorder
from ..agreement.phases import Action, AgreementError, CycleState, Do, Failure, Phase
from ..agreement.transition import advance
from ..observe.keeper import StatsKeeper
from ..planning.message import digest_of
from ..values.placement import Placement
from .audit import Auditor
from .balancedness import BalancednessLog
from .gather import Gather
from .lead import Lead
from .new_weights import TURN_SECONDS, NewWeights
from .orders import OrderFacts, PostedOrders
from .rollout import Rollout
from .timing import learn_times
from .work import BETWEEN_CYCLES, FAILS_AS, MAY_FAIL, Parts, Work

logger = logging.getLogger("vllm.eplb")  # only loggers below "vllm" are seen in a server's log


Stage = Literal["prefill", "decode"]


PUBLISH_STEPS = 64
"""Steps between two publications of the statistics, besides those at every change of phase."""


class EplbUpdator:
    """The balancer of one model on one rank; ``start.start_balancer`` makes it.

    Args:
        parts: the parts of the balancer.

    Attributes:
        parts, work: shared by the collaborators.
        gather, rollout, lead, auditor: the collaborators; ``lead`` on EP rank 0 only, ``auditor`` if audits are on.
        weights: for an engine that loads other weights, or frees their memory.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.work = work = Work(parts.title, parts.rank, CycleState.start(parts.settings), parts.start)
        self.gather = Gather(parts, work)
        self.rollout = Rollout(parts, work)
        self.lead = Lead(parts, work) if parts.rank == 0 else None
        self.auditor = Auditor(parts, work) if parts.config.audit_interval else None
        self.weights = NewWeights(parts, work, self.rollout, self.lead, forget=self._forget, turn=self._turn)
        parts.stats.intervals(work.state.collect_steps, work.state.execution_steps)
        self._posted_orders = PostedOrders()
        interval = parts.config.log_balancedness_interval
        self._balancedness = (
            BalancednessLog(parts.adaptor.name, interval, parts.recorder, parts.control) if interval else None
        )
        self._flight = FlightRecorder()
        self._counted_under: Placement | None = None  # the placement of the last whole step, if nothing watches steps
        self.methods = self._table()
        self._is_ready = {
            Phase.SNAPSHOT: self.gather.taken,
            Phase.REDUCE: self._is_summed,
            Phase.PLAN: self._is_planned,
            Phase.BROADCAST: self.rollout.ready,
        }
        if self.auditor is not None:
            self._is_ready[Phase.AUDIT] = self.auditor.ready

    def _table(self) -> dict[Do, Callable[[Action], object]]:
        """The method for every action of the agreed state."""
        gather, rollout, auditor = self.gather, self.rollout, self.auditor
        table: dict[Do, Callable[[Action], object]] = {
            Do.SNAPSHOT: self._begin_cycle,
            Do.REDUCE: lambda _: gather.post(),
            Do.REQUEST_PLAN: self._request_plan,
            Do.BROADCAST: lambda _: rollout.broadcast(),
            Do.PREPARE: lambda action: rollout.prepare(action.round),
            Do.ISSUE: lambda action: rollout.issue(action.round),
            Do.COMMIT: self._commit,
            Do.FINISH: self._finish,
            Do.DROP: self._drop,
            Do.SWITCH_OFF: self._switch_off,
            Do.OBEY: self._obey,
            Do.NEW_WINDOW: self._begin_window,
        }
        if auditor is not None:
            table |= {
                Do.END_AUDIT: lambda _: auditor.end(),
                Do.REDUCE_SUMS: lambda _: auditor.begin_repair(),
                Do.PLAN_REPAIR: lambda _: auditor.offer_repair(),
            }
        return table

    @property
    def state(self) -> CycleState:
        """The agreed state; equal on all ranks."""
        return self.work.state

    @property
    def placement(self) -> Placement:
        """The placement in force on this rank."""
        return self.work.placement

    @property
    def stats(self) -> StatsKeeper:
        return self.parts.stats

    @property
    def differing(self) -> int:
        """Number of experts whose copies differed when the weights were first loaded."""
        return self.parts.differing

    def calibrate(self) -> None:
        """Measures the time of layers and moves on this server; all ranks together, when the model can run and before
        it serves."""
        times = learn_times(self.parts.adaptor, self.parts.config, self.parts.loader)
        if self.lead is not None:
            self.lead.learn(times)

    # --- the two verbs of an engine -----------------------------------------------------------------------------------

    def forward_before(self, *, serving: bool = True, stage: Stage = "decode", tokens_per_rank: float = 1.0) -> None:
        """One step; called on every rank before each forward of real or dummy batches, at the same point everywhere.

        Args:
            serving: whether the forward serves requests. A dummy batch is a step, but its tokens are not counted.
            stage: whether the batch prefills or only decodes; used if only one of the two is counted.
            tokens_per_rank: tokens of the batch over the ranks that share it.

        Raises:
            AgreementError, ControlError: the ranks do not agree any more, so this rank must not serve on.
        """
        began, before = time.perf_counter(), self.state
        if self._only_counts():
            self._begin_forward(began, serving, stage, tokens_per_rank)
            self.stats.step_took(time.perf_counter() - began)
            return
        # The engine may be in inference mode; tensors made here outlive it.
        with torch.inference_mode(False), torch.no_grad():
            self._turns()
            self._begin_forward(began, serving, stage, tokens_per_rank)
        self.stats.step_took(time.perf_counter() - began)
        self._note_phase(before)

    def _only_counts(self) -> bool:
        """Takes the step if it does nothing but count load, as nearly all steps do; else changes nothing."""
        if self.placement is not self._counted_under or self.state.phase is not Phase.COLLECT:
            return False
        following, actions = advance(self.state, None, self.parts.settings)
        if actions or following.phase is not Phase.COLLECT:
            return False
        self.work.state = following
        self.stats.phase = "collect"  # a cycle may have been dropped between two steps
        self._flight.record(Phase.COLLECT, None, None)
        return True

    def _begin_forward(self, began: float, record: bool, stage: Stage, tokens_per_rank: float) -> None:
        """Counts the load of the forward, and times it, as far as the phase wants that."""
        state, parts = self.work.state, self.parts
        record = record and state.phase is not Phase.OFF
        parts.recorder.begin_step(self.work.placement, record=record, phase=stage, tokens_per_rank=tokens_per_rank)
        if self.lead is not None:
            self.lead.clock.step(began, tokens_per_rank, counts=record and state.phase in BETWEEN_CYCLES)
        parts.stats.step = state.step

    def _turns(self) -> None:
        """The turns of a step: one, or in mode sync all turns of a cycle."""
        before = self.state
        if self._balancedness is not None and before.phase is not Phase.OFF:
            self._balancedness.before_step(before.step + 1, max(0, before.due - before.step), self.placement)
        self._turn()
        while self.parts.settings.synchronous and self.state.active:
            last = self.state
            self._turn()
            if self.state == last:
                time.sleep(TURN_SECONDS)

    def _note_phase(self, before: CycleState) -> None:
        """Publishes the phase if it has changed. The next steps may only count, unless something watches each step."""
        # Report LISTEN as COLLECT: the distinction is internal.
        phase = Phase.COLLECT if self.state.phase is Phase.LISTEN else self.state.phase
        self.stats.phase = phase.name.lower()  # type: ignore[assignment]
        if self.state.epoch != before.epoch and Phase.LISTEN not in (before.phase, self.state.phase):
            self._publish()
        if self._balancedness is None and self.auditor is None:
            self._counted_under = self.placement

    def forward_end(self) -> None:
        """Called after a forward. Decides nothing, because not every engine calls it."""
        if self.state.step % PUBLISH_STEPS == 0:
            self._publish()

    def _turn(self) -> None:
        """Posts this rank's facts, reads the agreed ones, advances the state, performs its actions."""
        parts, before = self.parts, self.state
        posted = agreed = None
        if before.active:
            posted = self._facts()
            parts.control.post(posted)
            waited = parts.control.waiting.total
            agreed = parts.control.read()
            self.stats.waited_for_control(parts.control.waiting.total - waited)
        try:
            self.work.state, actions = advance(before, agreed, parts.settings)
        except AgreementError:
            self._dump_flight("the ranks disagree")
            raise
        if not parts.settings.synchronous or self.state != before:  # turns that only wait would fill the recorder
            self._flight.record(self.state.phase, posted, agreed)
        parts.loader.tick()
        if self.state.paused and self.state.phase is Phase.LISTEN:
            parts.recorder.flush(self.placement)  # no cycle does while paused, and counts on the device may overflow
        for action in actions:
            self._perform(action)
        if self.auditor is not None and self.state.phase in BETWEEN_CYCLES:
            self.auditor.step()

    def _perform(self, action: Action) -> None:
        perform = self.methods[action.do]
        if action.do not in MAY_FAIL:
            perform(action)
            return
        try:
            perform(action)
        except ControlError:
            raise
        except Exception as error:
            self.work.fail(MAY_FAIL[action.do], error)

    # --- the facts of this rank ---------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        state, work, loader = self.state, self.work, self.parts.loader
        ready = rounds_ready = 0
        if work.failure is Failure.NONE:
            try:
                if state.phase in self._is_ready:
                    ready = int(self._is_ready[state.phase]())
                rounds_ready = self.rollout.rounds_ready()
            except Exception as error:
                work.fail(FAILS_AS.get(state.phase, Failure.PREPARE), error)
        offer = work.offer if state.phase is Phase.PLAN else None
        order = OrderFacts()
        if self.parts.orders is not None and state.phase is Phase.LISTEN:
            order = self._posted_orders.facts(self.parts.orders.newest, state.order)
        audited = ready and state.phase is Phase.AUDIT
        return Facts(
            step=state.step,
            epoch=state.epoch,
            placement=self.placement.digest,
            ready=ready,
            failure=work.failure,
            poisoned=int(loader.poisoned),
            plan_number=state.cycle if offer is not None else 0,
            plan_length=len(offer or b""),
            plan_digest=digest_of(offer) if offer else 0,
            rounds=self.rollout.num_rounds,
            rounds_ready=rounds_ready,
            rounds_done=loader.rounds_done,
            rounds_intact=loader.rounds_intact,
            damaged=self.auditor.damaged() if self.auditor is not None and audited else 0,
            **vars(order),
        )

    def _is_summed(self) -> bool:
        return self.auditor.summed() if self.state.repair and self.auditor is not None else self.gather.summed()

    def _is_planned(self) -> bool:
        """Always False: ``plan_number``, which only EP rank 0 posts, tells that the plan has come."""
        if self.lead is not None:
            self.lead.look_for_answer()
        return False

    # --- the actions of the agreed state ------------------------------------------------------------------------------

    def _begin_cycle(self, _: Action) -> None:
        self.work.begin()
        self.gather.begin()

    def _begin_window(self, _: Action) -> None:
        recorder = self.parts.recorder
        recorder.begin_window(self.placement, -(-self.state.collect_steps // recorder.num_entries))

    def _request_plan(self, _: Action) -> None:
        gathered = self.gather.result()
        if self.lead is not None and gathered is not None:
            self.lead.request(gathered)

    def _commit(self, action: Action) -> None:
        committed = self.rollout.commit(action.round)
        if self.auditor is not None:
            self.auditor.committed(committed.moves)

    def _finish(self, _: Action) -> None:
        num_rounds, moved = self.rollout.num_rounds, self.rollout.moved
        if self.auditor is not None and self.auditor.repairing:
            self.auditor.repaired(moved)
        else:
            if self.state.committed == num_rounds:
                self.rollout.finish()
            if self.lead is not None:
                self.lead.finished(num_rounds, moved)
        self._forget()

    def _drop(self, action: Action) -> None:
        if self.lead is not None:
            self.lead.dropped(action.failure, self.rollout.moved)
        self._forget()

    def _switch_off(self, action: Action) -> None:
        reason = self.work.reason or action.failure.text
        self.stats.switched_off(reason)
        if self.lead is not None:
            self.lead.switched_off(action.failure, self.rollout.moved)
        self._dump_flight(reason)
        self._forget()

    def _forget(self) -> None:
        """Forgets the cycle and drops what was prepared. Nothing may be in flight."""
        self.rollout.forget()
        self.gather.forget()
        for part in (self.auditor, self.lead):
            if part is not None:
                part.forget()
        self.work.begin()

    def _obey(self, _: Action) -> None:
        state, order = self.state, self._posted_orders.take(self.state.order)
        intervals = {"collect_steps": state.collect_steps, "execution_steps": state.execution_steps}
        self.stats.obeyed(order.id if order is not None else "", state.step, paused=state.paused, **intervals)
        if order is not None:
            title = self.parts.title
            logger.info("%s order %r takes effect on all ranks at step %d", title, order.command, state.step)
        self._publish()

    # --- beside the steps ---------------------------------------------------------------------------------------------

    def pause_recording(self) -> None:
        """Stops counting until the next step, for forwards without requests (warm-up, profiling, capturing)."""
        self.parts.recorder.set_recording(False)

    def close(self) -> None:
        """Ends the planner and the threads. Serving may go on without balancing."""
        with contextlib.ExitStack() as last_first:  # ends everything, even if a signal interrupts one part
            last_first.callback(self.parts.loader.close)
            last_first.callback(self.rollout.close)
            if self.lead is not None:
                last_first.callback(self.lead.close)

    def _publish(self) -> None:
        if self.lead is not None:
            self.lead.publish()

    def _dump_flight(self, reason: str) -> None:
        path = self._flight.leave(self.parts.rank, reason=reason, settings=str(self.parts.settings))
        if path is not None:
            logger.warning("%s rank %d: the last steps are in %s", self.parts.title, self.parts.rank, path)
