# SPDX-License-Identifier: Apache-2.0
"""Lead: EP rank 0's work for all ranks. It asks the planner, weighs the answer, and reports the result."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace

from ..agreement.phases import Command, Failure
from ..files.run_folder import remove_orphaned_folder
from ..planning.message import pack_plan
from ..planning.options import PlanOptions
from ..planning.payoff import Payoff
from ..planning.request import Dispatch, PlanAnswer, PlanRequest, Rebalance, Restore
from ..planning.shares import shared_rank_load
from ..planning.threshold import PlanJudge
from ..settings.config import EplbConfig
from ..values.placement import FloatArray, Int64Array, Placement
from ..values.plan import Plan
from ..values.traffic import Traffic
from ..values.window import WindowLoad
from .gather import Gathered
from .step_clock import StepClock
from .timing import Times
from .work import Parts, Work

logger = logging.getLogger("vllm.eplb")


DISPATCH_GAIN = 0.002
"""Least gain of new dispatch shares, as a fraction of PAR. They cost one small broadcast."""


@dataclass
class _Case:
    """The plan requested in this cycle, from the request to the end of the cycle.

    Attributes:
        start: the placement in force at the request.
        task: task of the request.
        window_par: mean PAR of the window, with the shares in force.
        note: text for the log about the result of the last plan.
        answer: the planner's answer; None until it has come.
        new_shares: dispatch shares of the cycle, with or without moves.
        skipped: why no expert is moved; empty if some are.
        still: whether nothing moves because imbalance costs no time with this traffic.
        payoff: gain and cost of the plan.
    """

    start: Placement
    task: Rebalance | Restore
    window_par: float
    note: str
    answer: PlanAnswer | None = None
    new_shares: Dispatch | None = None
    skipped: str = ""
    still: bool = False
    payoff: Payoff | None = None


class Lead:
    """EP rank 0's judgement. It exists on that rank only; the others learn of it by the agreed facts.

    Attributes:
        clock: times steps.
        case: the cycle under way.
    """

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts, self._work = parts, work
        self._judge = PlanJudge(parts.config.min_gain)
        self._observed: Placement | None = None  # in mode observe: the placement of the last plan
        self._load: Int64Array | None = None  # [L, E] of the last window, until the map recorder has it
        self.case: _Case | None = None
        self.clock = StepClock()
        self._told_still = False
        self._left: Placement | None = None
        self._restoring = False

    def learn(self, times: Times) -> None:
        """Takes the measured times: plans are weighed by them from now on."""
        self._judge.learn(times.cost, times.rates, self._parts.start.slots_per_rank)

    # --- the request --------------------------------------------------------------------------------------------------

    def request(self, gathered: Gathered) -> None:
        """Reports the window and hands its load to the planner."""
        parts, state, placement = self._parts, self._work.state, self._work.placement
        if parts.planner is None:
            return
        case = self.case = self._take_stock(gathered)
        tables = parts.adaptor.dispatch
        parts.planner.submit(
            PlanRequest(
                number=state.cycle,
                load=gathered.load,
                physical_to_logical=placement.physical_to_logical,
                num_experts=placement.num_experts,
                node_of_rank=parts.adaptor.topology.node_of_rank,
                num_groups=parts.adaptor.num_groups,
                buffer_experts=parts.loader.buffer_experts,
                task=case.task,
                dispatch_entries=tables.entries if tables is not None else 0,
            )
        )

    def task(self) -> Rebalance | Restore:
        """The task that the next plan is asked for."""
        config = self._parts.config
        wanted, start = self._work.state.wanted, self._parts.start
        if wanted is Command.RESTORE:
            self._leave(self._work.placement)
            self._restoring = True
            return Restore(start.physical_to_logical)
        self._restoring = False
        if wanted is Command.REAPPLY:
            return Restore((self._left or self._work.placement).physical_to_logical)
        if config.policy_name == "random":
            return Rebalance("random", PlanOptions(seed=self._work.state.cycle))
        if config.policy_name != "incremental":
            return Rebalance(config.policy_name)
        # A layer is left as it is if a lower PAR saves no time.
        options = replace(plan_options(config), target_par=self._judge.target_par(config.target_par))
        return Rebalance("incremental", options, config.rank_speed)

    def _take_stock(self, gathered: Gathered) -> _Case:
        """Reports the window's load, and judges the last plan by it."""
        parts, placement = self._parts, self._work.placement
        observed, self._observed = self._observed, None
        load = gathered.load.sum(axis=0)
        tables, speed = parts.adaptor.dispatch, parts.config.rank_speed
        tokens = None
        if tables is not None:
            tokens = shared_rank_load(load, placement, tables.shares, placement.num_ranks)
        window = WindowLoad.of(load, placement, parts.start, observed, tokens=tokens, rank_speed=speed)
        self._load = load
        parts.stats.ranks_told(gathered.figures, window.in_force, parts.adaptor.topology.node_of_rank)
        parts.stats.window_ended(window)
        note, par = "", float(window.in_force.par.mean())
        if window.observed is not None:
            would = float(window.observed.par.mean())
            note = f"; the last plan would have brought PAR {would:.3f} instead of {par:.3f}"
        traffic = Traffic.of_histogram(gathered.histogram)
        note = self._judge.window_ended(window, placement, traffic) or note
        self._judge.steps = self._work.state.collect_steps
        if self._judge.cost.in_milliseconds:
            now_ms, start_ms = (self._judge.moe_ms(part.par) for part in (window.in_force, window.at_start))
            would_ms = None if window.observed is None else self._judge.moe_ms(window.observed.par)
            parts.stats.time_spent(now_ms, start_ms, gathered.steps, would_ms)
        timed = self.clock.window_ended(at_start=placement == parts.start)
        if timed is not None:
            parts.stats.steps_timed(timed.ms, timed.ms_start, timed.saved_seconds)
        return _Case(placement, self.task(), par, note)  # the task depends on the traffic of this window

    # --- the decision -------------------------------------------------------------------------------------------------

    def look_for_answer(self) -> None:
        """Takes the planner's answer, once it has come, and decides what to offer to the other ranks."""
        parts, work, case = self._parts, self._work, self.case
        if parts.planner is None or case is None or case.answer is not None:
            return
        answer = parts.planner.answer(work.state.cycle)
        if answer is None:
            return
        if answer.plan is None or answer.rounds is None:
            failure = Failure.PLANNER_DIED if answer.died else Failure.PLANNER_FAILED
            work.fail(failure, RuntimeError(answer.error))
            return
        case.answer = answer
        work.offer = self._weigh(case, answer)

    def _weigh(self, case: _Case, answer: PlanAnswer) -> bytes:
        """The message to broadcast: the plan, new dispatch shares alone, or nothing (empty)."""
        parts, work = self._parts, self._work
        plan, rounds, now, after = answer.plan, answer.rounds, answer.dispatch_now, answer.dispatch_after
        assert plan is not None
        assert rounds is not None
        par_before, par_after = plan.par_before, plan.par_after
        if now is not None and after is not None:  # moves must gain beyond what new shares alone would
            par_before, par_after = now.par, after.par
        parts.stats.planned(par_after, plan.seconds, plan.num_moves, plan.p95_before, plan.p95_after)
        received = parts.loader.received_bytes(plan.moves)
        case.payoff = self._judge.weigh(par_before, par_after, received)
        if self._judge.cost.in_milliseconds:
            parts.stats.weighed(case.payoff.saved_ms, case.payoff.saved_fraction, case.payoff.cost_ms)
        before = float(par_before.mean())
        if parts.config.mode == "observe":
            self._observed = Placement(plan.physical_to_logical, work.placement.num_experts, work.placement.num_ranks)
            would = f"{plan.num_moves} moves would bring PAR from {before:.3f} to {par_after.mean():.3f}"
            case.skipped = f"observing only: {would}{self._in_time(case.payoff)}"
            return b""
        case.skipped = self._not_worth_it(case, plan.num_moves, par_before, par_after, received)
        if not case.skipped:
            case.new_shares = after
            return pack_plan(work.state.cycle, plan.physical_to_logical, rounds, after)
        if now is not None and case.window_par - before > DISPATCH_GAIN * case.window_par:
            parts.stats.planned(now.par, plan.seconds)  # shares only; no expert moves
            case.new_shares = now
            return pack_plan(work.state.cycle, work.placement.physical_to_logical, rounds[:0], now)
        return b""

    def _not_worth_it(
        self, case: _Case, num_moves: int, before: FloatArray, after: FloatArray, received_bytes: Int64Array
    ) -> str:
        """Why a plan that leads from PAR ``before`` to ``after``, both [L], is not carried out; empty if it is."""
        if not num_moves:
            why = self._why_still(before)
            case.still = bool(why)
            return f"nothing to move at PAR {before.mean():.3f}{why}"
        if isinstance(case.task, Restore) or case.task.policy == "random":
            return ""
        return self._judge.refuses(before, after, received_bytes)

    def _why_still(self, par: FloatArray) -> str:
        """Text for the log if imbalance costs no time with this traffic; empty otherwise."""
        wanted = self._parts.config.target_par
        within = self._judge.target_par(wanted)
        if within <= wanted or par.max() <= wanted:
            return ""
        tokens = self._judge.traffic.mean_tokens
        return f": at {tokens:.3g} tokens per rank and step PAR up to {within:.2f} costs no time that can be measured"

    def _in_time(self, payoff: Payoff) -> str:
        said = self._judge.describe(payoff)
        return f"; {said}" if said else ""

    # --- the report ---------------------------------------------------------------------------------------------------

    def finished(self, num_rounds: int, moved: int) -> None:
        """Reports a cycle that has ended: all rounds were committed, or the rest gave way to a newer plan."""
        case, state, stats = self.case, self._work.state, self._parts.stats
        assert case is not None
        assert case.answer is not None
        whole = state.committed == num_rounds
        now = case.answer.dispatch_now
        if case.new_shares is not None and now is not None and whole:
            stats.dispatch_changed(now.par)
            if not num_rounds:
                shared = case.new_shares.par.mean()
                case.note = f"; new dispatch shares bring PAR {case.window_par:.3f} -> {shared:.3f}{case.note}"
        reason = case.skipped if whole else f"cut off after {state.committed} of {num_rounds} rounds for a newer plan"
        stats.cycle_ended("skipped" if case.skipped else "done", moved=moved, reason=reason)
        if case.skipped:
            # Traffic without anything to gain may last for hours: log it once, not in every cycle.
            level = logging.DEBUG if case.still and self._told_still else logging.INFO
            told = self._parts.title, state.cycle, state.step, case.skipped, case.note
            logger.log(level, "%s cycle %d at step %d: %s%s", *told)
        else:
            self._tell_of_plan(case, case.answer, moved, "" if whole else f"; {reason}")
        self._told_still = case.still
        self.record_map()

    def _tell_of_plan(self, case: _Case, answer: PlanAnswer, moved: int, cut: str) -> None:
        plan, state = answer.plan, self._work.state
        assert plan is not None
        if cut or isinstance(case.task, Restore) or case.payoff is None:
            self._judge.forget()
        else:
            self._judge.carried_out(case.start, case.payoff.saved_fraction)
        logger.info(
            "%s cycle %d: PAR %.3f -> %.3f (worst layer %.3f -> %.3f%s), %d experts moved in %d rounds, "
            "%d steps after its load was taken; planned in %.1f ms%s%s%s",
            self._parts.title,
            state.cycle,
            plan.par_before.mean(),
            plan.par_after.mean(),
            plan.par_before.max(),
            plan.par_after.max(),
            _in_bad_windows(plan),
            moved,
            state.committed,
            state.step - state.snapshot_at,
            1e3 * plan.seconds,
            "" if case.payoff is None else self._in_time(case.payoff),
            cut,
            case.note,
        )

    def dropped(self, failure: Failure, moved: int) -> None:
        """Reports a cycle that was dropped on all ranks, because of this rank or of another one."""
        reason, state = self._work.reason or failure.text, self._work.state
        self._parts.stats.cycle_ended("failed", moved=moved, reason=reason, failure=failure.kind)
        logger.warning(
            "%s cycle %d dropped on all ranks (%s), %d in a row; serving goes on, next try in %d steps",
            self._parts.title,
            state.cycle,
            reason,
            state.failures,
            state.due - state.step,
        )
        self.record_map()

    def switched_off(self, failure: Failure, moved: int) -> None:
        """Reports that balancing was switched off permanently."""
        reason = self._work.reason or failure.text
        self._parts.stats.cycle_ended("failed", moved=moved, reason=reason, failure=failure.kind)
        step = self._work.state.step
        logger.error("%s is off from step %d on, serving goes on: %s", self._parts.title, step, reason)
        self.record_map()
        if self._parts.planner is not None:
            self._parts.planner.close(wait=0)

    def went_back(self, before: Placement) -> None:
        """Notes that the start placement is in force again, because weights are about to be loaded.

        Args:
            before: the placement that was in force.
        """
        self._leave(before)
        self._judge.forget()
        self.record_map()

    def _leave(self, placement: Placement) -> None:
        """Remembers the placement that is given up for the start placement; not the states on the way there."""
        if placement != self._parts.start and not self._restoring:
            self._left = placement

    def record_map(self) -> None:
        """Hands the placement in force to the map recorder, however the cycle ended."""
        if self._parts.map_recorder is not None:
            load, self._load = self._load, None
            self._parts.map_recorder.record(self._work.placement, load)

    def publish(self) -> None:
        """Hands the statistics to the statistics file."""
        parts = self._parts
        if parts.planner is not None:
            parts.stats.planner_starts = parts.planner.starts
        if parts.stats_file is not None:
            parts.stats_file.publish(parts.stats.stats())

    def forget(self) -> None:
        self.case = None

    def close(self) -> None:
        """Ends the planner and all writers of files, even if a signal interrupts one part."""
        parts = self._parts
        with contextlib.ExitStack() as last_first:
            if parts.map_recorder is not None:
                last_first.callback(parts.map_recorder.close)
                if self._work.state.active:  # rounds of a cycle under way may be in force
                    last_first.callback(self.record_map)
            if parts.stats_file is not None:
                last_first.callback(remove_orphaned_folder, parts.stats_file.path)  # the planner has ended by then
                last_first.callback(parts.stats_file.close)
            if parts.orders is not None:
                last_first.callback(parts.orders.close)
            if parts.planner is not None:
                last_first.callback(parts.planner.close)


def _in_bad_windows(plan: Plan) -> str:
    """Text for the log: the 95th percentile of the windows' PARs, mean over layers; empty for a single window."""
    if plan.p95_before is None or plan.p95_after is None:
        return ""
    return f"; p95 of windows {plan.p95_before.mean():.3f} -> {plan.p95_after.mean():.3f}"


def plan_options(config: EplbConfig) -> PlanOptions:
    """The settings that the policy "incremental" takes."""
    return PlanOptions(
        target_par=config.target_par,
        effort=config.planner_effort,
        max_moves=config.max_moves_per_cycle,
        max_moves_per_rank=config.max_moves_per_rank,
        max_moves_between_nodes=config.max_moves_between_nodes,
        price_between_nodes=config.price_between_nodes,
    )
