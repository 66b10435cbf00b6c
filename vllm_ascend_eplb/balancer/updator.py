# SPDX-License-Identifier: Apache-2.0
"""EplbUpdator: drives the balancer from the two calls that an engine makes around every forward.

``forward_before`` runs one step of the cycle: post what this rank knows, read what all agreed on, advance the state,
do what it says. It waits for nothing but the agreed facts. Everything that takes time runs elsewhere: planning in the
planner's process, checks and preparations in a thread, transfers on their own stream or threads.

In mode sync the same turns follow one another within one step until the cycle is over: same parts, same agreement, same
rounds, so also the same result.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..agreement.channel import Bulk, ControlChannel, ControlError, Facts, FlightRecorder
from ..agreement.exchange import exchange_bytes, require_equal
from ..agreement.phases import Action, AgreementError, Command, CycleSettings, CycleState, Do, Failure, Phase, early
from ..agreement.transition import abandon, advance
from ..files.map_recorder import MapRecorder
from ..files.run_folder import remove_orphaned_folder
from ..observe.keeper import StatsKeeper
from ..observe.stats import RANK_FIGURES
from ..observe.stats_file import StatsFile
from ..planning.message import digest_of, most_plan_bytes, pack_plan, unpack_plan
from ..planning.process import EplbProcess
from ..planning.request import Dispatch, PlanAnswer, PlanRequest
from ..planning.shares import shared_rank_load
from ..planning.threshold import PlanJudge
from ..routing.weighted import TableRows
from ..settings.config import EplbConfig
from ..transfer.loader import D2DExpertWeightLoader
from ..transfer.slots import default_buffer_experts
from ..values.placement import FloatArray, Placement, peak_to_average
from ..values.rounds import LAYER, Round, check_rounds, rounds_to_array
from .audit import Auditor
from .balancedness import BalancednessLog
from .orders import NumberedOrder, OrderBox
from .served_model import EplbAdaptor

logger = logging.getLogger("vllm.eplb")  # only loggers below "vllm" are seen in a server's log


Stage = Literal["prefill", "decode"]


LEAST_PLAN_AGE = 200
"""Steps that the planner has at least, in tests and trials with very short intervals, too."""


LISTEN_STEPS = 64
"""Steps between two times at which all ranks learn of orders. Each costs lag + 1 posts of facts."""


TURN_SECONDS = 0.0005
"""Mode sync: pause before the next turn where the last one changed nothing."""


DISPATCH_GAIN = 0.002
"""Least gain of new dispatch shares, as a fraction of PAR. They cost one small broadcast."""


PUBLISH_STEPS = 64
"""How often the statistics are published, besides at every change of phase."""


@dataclass
class _Cycle:
    """What this rank holds of the cycle under way. Dropped as a whole when the cycle ends."""

    start: Placement
    failure: Failure = Failure.NONE
    load: npt.NDArray[np.int64] | None = None
    summand: npt.NDArray[np.int64] | None = None
    """What this rank adds to the sum over the ranks; there before all agree to post it."""
    reduction: Bulk[npt.NDArray[np.int64] | None] | None = None
    answer: PlanAnswer | None = None
    message: bytes = b""
    broadcast: Bulk[bytes] | None = None
    unpacking: Future[tuple[list[Round], list[Placement], TableRows | None]] | None = None
    rounds: list[Round] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    tables: TableRows | None = None
    """Put in force, on all ranks at one step, when the cycle is complete."""
    preparing: list[Future[None]] = field(default_factory=list)
    window_par: float = 0.0
    """Mean PAR of the window, as the tokens fell."""
    new_shares: Dispatch | None = None
    """Dispatch shares that the cycle brings, with or without moves; on EP rank 0."""
    result: Literal["done", "skipped"] = "done"
    reason: str = ""
    repair: bool = False
    """Whether this is no cycle of load, but a repair of slots that an audit found damaged."""
    damaged: int = 0
    note: str = ""
    """What the log says beside it: how the last plan turned out."""


class EplbUpdator:
    """The balancer of one model on one rank.

    Args:
        adaptor: the model.
        config: the settings, equal on all ranks.
        planner: EP rank 0's planner process; None elsewhere.
        stats_file: where EP rank 0 publishes its statistics; None for nowhere.
        orders: where EP rank 0 finds what an operator orders; None for nowhere.
        map_recorder: where EP rank 0 records the placement in force; None for nowhere.
    """

    def __init__(
        self,
        adaptor: EplbAdaptor,
        config: EplbConfig,
        planner: EplbProcess | None = None,
        stats_file: StatsFile | None = None,
        orders: OrderBox | None = None,
        map_recorder: MapRecorder | None = None,
    ) -> None:
        self._adaptor = adaptor
        self._config = config
        self._rank = adaptor.rank
        self._title = adaptor.title
        self._recorder = adaptor.recorder
        synchronous = config.mode == "sync"
        self._control = ControlChannel(
            adaptor.control_group,
            adaptor.rank,
            adaptor.topology.num_ranks,
            lag=0 if synchronous else config.control_lag,
        )
        placement, topology = adaptor.placement, adaptor.topology
        if self._rank == 0 and topology.num_blocks != topology.num_nodes:
            logger.warning(
                "EPLB plans as if all %d ranks were on one node: its %d nodes do not share them evenly and in a row, "
                "so copies of an expert may end up on any of them (nodes of the ranks: %s)",
                topology.num_ranks,
                topology.num_nodes,
                topology.node_of_rank,
            )
        self._loader = D2DExpertWeightLoader(
            adaptor.expert_tensors(),
            adaptor.transfer_group,
            adaptor.rank,
            config.transfer_buffer_experts
            or default_buffer_experts(placement.num_layers, placement.slots_per_rank, config.control_lag),
            config.transport,
            topology=adaptor.topology,
            device_group=adaptor.device_group,
            budget_bytes=int((config.transfer_budget_mb_per_step or 0) * 1e6),
            channel=adaptor.channel,
            cooperative_kernels=adaptor.cooperative_kernels,
            own_streams=not synchronous,
        )
        self._control.reserve(most_plan_bytes(placement))
        self._loader.warm_up()
        if self._rank == 0:
            logger.info("%s %s", self._title, self._loader.describe())
        self._differing = self._loader.learn_checksums(placement)
        self._settings = CycleSettings(
            collect_steps=config.expert_heat_collection_interval,
            execution_steps=config.algorithm_execution_interval,
            first_collect_steps=early(config.expert_heat_collection_interval),
            max_failures=config.max_failures,
            buffers=self._loader.num_buffers,
            least_plan_age=LEAST_PLAN_AGE,
            cut_after=LEAST_PLAN_AGE,
            listen_steps=LISTEN_STEPS,
            audit_steps=config.audit_interval,
            synchronous=synchronous,
        )
        self._auditor = Auditor(self._loader, config, self._title) if config.audit_interval else None
        self._state = CycleState.start(self._settings)
        self._start = self._placement = adaptor.placement
        self._cycle = _Cycle(self._placement)
        self._planner = planner
        self._stats = StatsKeeper(__version__, config.policy_name, config.mode)
        self._stats.intervals(self._state.collect_steps, self._state.execution_steps)
        self._stats_file = stats_file
        self._orders = orders
        self._posted_orders: dict[int, NumberedOrder] = {}  # posted and perhaps not obeyed yet
        self._map_recorder = map_recorder
        self._judge = PlanJudge(config.min_gain, config.rank_speed)
        self._observed: Placement | None = None  # in mode observe: what the last plan would have led to
        self._load: npt.NDArray[np.int64] | None = None  # [L, E], on EP rank 0: of the last window
        self._balancedness = (
            BalancednessLog(adaptor.name, config.log_balancedness_interval, self._recorder, self._control)
            if config.log_balancedness_interval
            else None
        )
        self._flight = FlightRecorder()
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eplb-prepare")

    @property
    def state(self) -> CycleState:
        """The agreed state; equal on all ranks."""
        return self._state

    @property
    def placement(self) -> Placement:
        """The placement in force on this rank."""
        return self._placement

    @property
    def stats(self) -> StatsKeeper:
        return self._stats

    def forward_before(self, *, serving: bool = True, stage: Stage = "decode") -> None:
        """One step; called on every rank before each forward of real or dummy batches, at the same point everywhere.

        Args:
            serving: whether the forward serves requests. A dummy batch is a step, but its tokens are not counted.
            stage: whether the batch prefills or only decodes; it matters where only one of them is counted.

        Raises:
            AgreementError, ControlError: the ranks do not agree any more, so this one must not go on serving.
        """
        began = time.perf_counter()
        before = self._state
        if self._balancedness is not None and before.phase is not Phase.OFF:
            self._balancedness.before_step(before.step + 1, max(0, before.due - before.step), self._placement)
        self._turn()
        while self._settings.synchronous and self._state.active:
            last = self._state
            self._turn()
            if self._state == last:
                time.sleep(TURN_SECONDS)
        record = serving and self._state.phase is not Phase.OFF
        self._recorder.begin_step(self._placement, record=record, phase=stage)
        self._stats.step = self._state.step
        # Listening is part of collecting, for whoever watches.
        phase = Phase.COLLECT if self._state.phase is Phase.LISTEN else self._state.phase
        self._stats.phase = phase.name.lower()  # type: ignore[assignment]
        self._stats.step_took(time.perf_counter() - began)
        if self._state.epoch != before.epoch and Phase.LISTEN not in (before.phase, self._state.phase):
            self._publish()

    def _turn(self) -> None:
        """Posts what this rank knows, reads what all agreed on, advances the state, does what it says."""
        posted = agreed = None
        before = self._state
        if before.active:
            posted = self._facts()
            self._control.post(posted)
            waited = self._control.waiting.total
            agreed = self._control.read()
            self._stats.waited_for_control(self._control.waiting.total - waited)
        try:
            self._state, actions = advance(self._state, agreed, self._settings)
        except AgreementError:
            self._dump_flight("the ranks disagree")
            raise
        if not self._settings.synchronous or self._state != before:  # turns that only wait would push out the others
            self._flight.record(self._state.phase, posted, agreed)
        self._loader.tick()
        if self._state.paused and self._state.phase is Phase.LISTEN:
            self._recorder.flush(self._placement)  # no cycle does, and what counts on the device may overflow
        for action in actions:
            self._perform(action)
        if self._auditor is not None and self._state.phase in _BETWEEN_CYCLES:
            self._auditor.step()

    def forward_end(self) -> None:
        """After a forward. Decides nothing, because not every engine gets here."""
        if self._state.step % PUBLISH_STEPS == 0:
            self._publish()

    def pause_recording(self) -> None:
        """What is computed until the next step serves nobody (warm-up, profiling, capturing)."""
        self._recorder.set_recording(False)

    @property
    def differing(self) -> int:
        """Experts whose copies differed from each other when the weights were loaded first."""
        return self._differing

    @contextlib.contextmanager
    def new_weights(self) -> Iterator[None]:
        """Around an engine's loading of other weights; all ranks together, at the same step, between two forwards.

        An engine loads weights into the slots where they were at the start. So what is under way is dropped, the
        initial placement is in force again, and afterwards the experts' checksums are learned anew. Blocks.

        Raises:
            StartError: the ranks are not at the same step. Nothing was changed.
            RuntimeError: afterwards, copies of an expert differ from each other.
        """
        num_ranks = self._adaptor.topology.num_ranks
        require_equal(
            self._adaptor.control_group,
            num_ranks,
            {
                "the step": self._state.step,
                "the phase": self._state.phase.name,
                "the placement": self._placement.digest,
            },
        )
        self._back_to_start()
        sound = b"" if self._loader.poisoned else b"sound"
        intact = all(exchange_bytes(self._adaptor.control_group, num_ranks, sound))
        try:
            yield
        finally:  # on a rank that failed, too: the others wait for its sums
            differing = self._loader.learn_checksums(self._placement) if intact else self._differing
        if differing > self._differing:
            raise RuntimeError(
                f"copies of {differing - self._differing} experts differ from each other after weights were loaded: "
                "the server would answer wrongly; restart it, or leave eplb_config out"
            )

    def _back_to_start(self) -> None:
        """Drops the cycle and switches the maps to the initial placement, whose weights are about to be loaded."""
        while self._loader.in_flight and not self._loader.poisoned:
            self._loader.tick()
            time.sleep(0.001)
        while self._control.bulk_busy:
            time.sleep(0.001)
        self._state = abandon(self._state, self._settings)
        self._forget_cycle()
        self._recorder.flush(self._placement)
        layers = list(range(self._start.num_layers))
        self._background.submit(self._prepare_maps, self._start, layers).result()
        self._commit_maps()
        self._placement = self._start
        self._cycle = _Cycle(self._placement)
        self._judge.forget()
        self._stats.placement_digest = self._start.digest
        logger.info(
            "%s: weights are loaded anew, from step %d on the placement is the initial one",
            self._title,
            self._state.step,
        )
        self._record_map()

    def close(self) -> None:
        """Ends the planner and the threads. Serving may go on; nothing is balanced any more."""
        if self._planner is not None:
            self._planner.close()
        if self._orders is not None:
            self._orders.close()
        self._background.shutdown(wait=False, cancel_futures=True)
        self._loader.close()
        if self._stats_file is not None:
            self._stats_file.close()
            remove_orphaned_folder(self._stats_file.path)  # the planner, which would do it later, has just ended
        if self._map_recorder is not None:
            if self._state.active:  # some rounds of a cycle may be in force that it has not ended
                self._record_map()
            self._map_recorder.close()

    # --- what this rank knows -----------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        state, cycle = self._state, self._cycle
        ready = rounds_ready = 0
        if cycle.failure is Failure.NONE:
            try:
                ready = int(self._ready())
                rounds_ready = self._rounds_ready()
            except Exception as error:
                self._fail(_FAILS_AS.get(state.phase, Failure.PREPARE), error)
        has_plan = state.phase is Phase.PLAN and cycle.answer is not None
        audited = ready and state.phase is Phase.AUDIT
        given = self._orders.newest if self._orders is not None and state.phase is Phase.LISTEN else None
        if given is not None and given.number > state.order:
            self._posted_orders[given.number] = given
        else:
            given = None
        return Facts(
            step=state.step,
            epoch=state.epoch,
            placement=self._placement.digest,
            ready=ready,
            failure=cycle.failure,
            poisoned=int(self._loader.poisoned),
            plan_number=state.cycle if has_plan else 0,
            plan_length=len(cycle.message) if has_plan else 0,
            plan_digest=digest_of(cycle.message) if has_plan and cycle.message else 0,
            rounds=len(cycle.rounds),
            rounds_ready=rounds_ready,
            rounds_done=self._loader.rounds_done,
            rounds_intact=self._loader.rounds_intact,
            order=given.number if given else 0,
            order_command=Command[given.order.command.upper()] if given else 0,
            order_collect_steps=(given.order.collect_steps or 0) if given else 0,
            order_execution_steps=(given.order.execution_steps or 0) if given else 0,
            damaged=self._auditor.damaged(self._placement) if self._auditor is not None and audited else 0,
        )

    def _ready(self) -> bool:
        cycle, phase = self._cycle, self._state.phase
        if phase is Phase.SNAPSHOT:
            # Taken before all agree to post the sum: a rank that threw then would leave the others' without its part.
            if cycle.load is None and self._recorder.snapshot_ready() and not self._control.bulk_busy:
                cycle.load = self._recorder.take()
                cycle.summand = np.concatenate([cycle.load.ravel(), self._figures().ravel()])
            return cycle.summand is not None
        if phase is Phase.REDUCE:
            return cycle.reduction is not None and cycle.reduction.done()
        if phase is Phase.AUDIT:
            if self._auditor is None or not self._auditor.complete() or self._control.bulk_busy:
                return False
            if cycle.summand is None:
                cycle.summand = self._auditor.sums(self._placement)
            return True
        if phase is Phase.PLAN:
            self._look_for_answer()
        if phase is Phase.BROADCAST:
            if cycle.unpacking is None and cycle.broadcast is not None and cycle.broadcast.done():
                message = cycle.broadcast.result()
                cycle.unpacking = self._background.submit(self._unpack, message, self._placement)
            if cycle.unpacking is not None and cycle.unpacking.done():
                cycle.rounds, cycle.placements, cycle.tables = cycle.unpacking.result()
                return not cycle.rounds or self._first_rounds_ready()
        return False

    def _first_rounds_ready(self) -> bool:
        """Prepares a round for each buffer as soon as the plan is checked; tells whether the first may be issued."""
        cycle = self._cycle
        if not cycle.preparing:
            try:
                for number in range(min(len(cycle.rounds), self._settings.buffers)):
                    self._prepare(number)
            except Exception as error:
                self._fail(Failure.PREPARE, error)
        return self._rounds_ready() > 0 and all(future.done() for future in cycle.preparing)

    def _rounds_ready(self) -> int:
        """Rounds prepared, as far as they may be issued now."""
        for number, future in enumerate(self._cycle.preparing):
            if not future.done():
                return number
            if (error := future.exception()) is not None:
                self._fail(Failure.PREPARE, error)
                return number
            if number >= self._state.issued and not self._loader.ready(number):
                return number
        return len(self._cycle.preparing)

    def _fail(self, failure: Failure, error: BaseException) -> None:
        if self._cycle.failure is not Failure.NONE:
            return
        self._cycle.failure = failure
        self._cycle.reason = f"{failure.text}: {type(error).__name__}: {error}"
        logger.warning("%s rank %d: %s", self._title, self._rank, self._cycle.reason)

    # --- what the state says is to be done ----------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        perform = getattr(self, f"_do_{action.do.name.lower()}")
        if action.do in _MAY_FAIL:
            try:
                perform(action)
            except ControlError:
                raise
            except Exception as error:
                self._fail(_MAY_FAIL[action.do], error)
        else:
            perform(action)

    def _do_obey(self, _: Action) -> None:
        state = self._state
        given = self._posted_orders.get(state.order)
        self._posted_orders = {number: each for number, each in self._posted_orders.items() if number > state.order}
        self._stats.obeyed(
            given.order.id if given else "",
            state.step,
            paused=state.paused,
            collect_steps=state.collect_steps,
            execution_steps=state.execution_steps,
        )
        if given is not None:
            logger.info(
                "%s order %r takes effect on all ranks at step %d", self._title, given.order.command, state.step
            )
        self._publish()

    def _do_new_window(self, _: Action) -> None:
        self._recorder.begin_window(self._placement, -(-self._state.collect_steps // self._recorder.num_entries))

    def _do_snapshot(self, _: Action) -> None:
        self._cycle = _Cycle(self._placement)
        self._recorder.discard_snapshot()  # that of a cycle which was dropped before it was taken
        self._recorder.snapshot(self._placement)

    def _do_reduce(self, _: Action) -> None:
        """The load is summed on EP rank 0; behind it each rank writes its own figures into its own row."""
        assert self._cycle.summand is not None
        self._cycle.reduction = self._control.reduce_load(self._cycle.summand)

    def _figures(self) -> npt.NDArray[np.int64]:
        figures = np.zeros((self._adaptor.topology.num_ranks, len(RANK_FIGURES)), dtype=np.int64)
        figures[self._rank] = self._stats.figures()
        return figures

    def _do_request_plan(self, _: Action) -> None:
        reduction, mine = self._cycle.reduction, self._cycle.load
        total = reduction.result() if reduction is not None else None
        if self._planner is None or total is None or mine is None:
            return
        load = total[: mine.size].reshape(mine.shape)
        self._window_ended(load.sum(axis=0), total[mine.size :].reshape(-1, len(RANK_FIGURES)))
        config, tables = self._config, self._adaptor.dispatch
        self._planner.submit(
            PlanRequest(
                number=self._state.cycle,
                load=load,
                physical_to_logical=self._placement.physical_to_logical,
                num_experts=self._placement.num_experts,
                node_of_rank=self._adaptor.topology.node_of_rank,
                num_groups=self._adaptor.num_groups,
                buffer_experts=self._loader.buffer_experts,
                policy="restore" if self._restoring else config.policy_name,
                limits=_limits(config, self._state.cycle) if not self._restoring else self._way_back(),
                dispatch_entries=tables.entries if tables is not None else 0,
            )
        )

    @property
    def _restoring(self) -> bool:
        return self._state.wanted is Command.RESTORE

    @property
    def _always_moves(self) -> bool:
        return self._restoring or self._config.policy_name == "random"

    def _way_back(self) -> dict[str, object]:
        return {"target": self._start.physical_to_logical}

    def _do_end_audit(self, _: Action) -> None:
        self._cycle = _Cycle(self._placement)
        self._stats.audited(0)
        if self._auditor is not None:
            self._auditor.restart()

    def _do_reduce_sums(self, _: Action) -> None:
        sums = self._cycle.summand
        assert sums is not None
        self._cycle = _Cycle(self._placement, repair=True)
        self._cycle.reduction = self._control.reduce_load(sums)

    def _do_plan_repair(self, _: Action) -> None:
        """On EP rank 0: says which slots are damaged, and plans to send good weights into them."""
        cycle = self._cycle
        sums = cycle.reduction.result() if cycle.reduction is not None else None
        if self._planner is None or sums is None or self._auditor is None:
            return
        cycle.damaged, rounds = self._auditor.plan_repair(sums, self._placement, self._state.step)
        self._stats.audited(cycle.damaged)
        if rounds:
            target = self._placement.physical_to_logical
            cycle.message = pack_plan(self._state.cycle, target, rounds_to_array(rounds))
        cycle.answer = PlanAnswer(self._state.cycle)

    def _end_repair(self) -> None:
        mended = self._moved_so_far()
        self._stats.mended(mended)
        if self._rank == 0 and mended:
            logger.warning(
                "%s audit: %d of %d damaged slots were mended by step %d",
                self._title,
                mended,
                self._cycle.damaged,
                self._state.step,
            )
        self._forget_cycle()

    def _window_ended(self, load: npt.NDArray[np.int64], figures: npt.NDArray[np.int64]) -> None:
        """Takes stock of the window [L, E], of what the last plan promised for it, and of the ranks' figures [R, n]."""
        self._load = load
        observed, self._observed = self._observed, None
        rank_load = self._rank_load(load)
        par = float(peak_to_average(rank_load).mean())
        self._cycle.window_par = par
        self._stats.ranks_told(figures, rank_load, self._adaptor.topology.node_of_rank)
        self._stats.window_ended(
            rank_load,
            self._over_speed(self._start.rank_load(load)),
            self._over_speed(observed.rank_load(load)) if observed is not None else None,
        )
        if observed is not None:
            would = float(observed.par(load, self._config.rank_speed).mean())
            self._cycle.note = f"; the last plan would have brought PAR {would:.3f} instead of {par:.3f}"
        self._cycle.note = self._judge.window_ended(load, self._placement) or self._cycle.note

    def _rank_load(self, load: npt.NDArray[np.int64]) -> FloatArray:
        """[L, R] tokens per rank under the placement and the dispatch shares in force, over its speed."""
        tables, placement = self._adaptor.dispatch, self._placement
        if tables is None:
            return self._over_speed(placement.rank_load(load))
        return shared_rank_load(load, placement, tables.shares, placement.num_ranks)

    def _over_speed(self, rank_load: FloatArray) -> FloatArray:
        """[L, R] tokens per rank as a rank of average speed would have to have them to take as long."""
        if self._config.rank_speed is None:
            return rank_load
        speed = np.array(self._config.rank_speed)
        return np.asarray(rank_load * (speed.mean() / speed))

    def _look_for_answer(self) -> None:
        """On EP rank 0: takes the planner's answer, weighs it and packs it."""
        if self._planner is None or self._cycle.answer is not None:
            return
        answer = self._planner.answer(self._state.cycle)
        if answer is None:
            return
        if answer.plan is None or answer.rounds is None:
            failure = Failure.PLANNER_DIED if answer.died else Failure.PLANNER_FAILED
            self._fail(failure, RuntimeError(answer.error))
            return
        plan, now, after = answer.plan, answer.dispatch_now, answer.dispatch_after
        par_before, par_after = plan.par_before, plan.par_after
        if now is not None and after is not None:  # moves must gain beyond what new shares alone would
            par_before, par_after = now.par, after.par
        self._stats.planned(par_after, plan.seconds, plan.num_moves)
        self._cycle.answer = answer
        before, gained = float(par_before.mean()), float(par_after.mean())
        if self._config.mode == "observe":
            self._observed = Placement(plan.physical_to_logical, self._placement.num_experts, self._placement.num_ranks)
            self._skip(f"observing only: {plan.num_moves} moves would bring PAR from {before:.3f} to {gained:.3f}")
            return
        if not plan.num_moves:
            self._skip(f"nothing to move at PAR {before:.3f}")
        elif not self._always_moves and (too_little := self._judge.refuses(before, gained)):
            self._skip(too_little)
        else:
            self._cycle.new_shares = after
            self._cycle.message = pack_plan(self._state.cycle, plan.physical_to_logical, answer.rounds, after)
            return
        if now is not None and self._cycle.window_par - before > DISPATCH_GAIN * self._cycle.window_par:
            self._stats.planned(now.par, plan.seconds)  # of which nothing moves
            self._cycle.new_shares = now
            nothing = answer.rounds[:0]
            self._cycle.message = pack_plan(self._state.cycle, self._placement.physical_to_logical, nothing, now)

    def _skip(self, reason: str) -> None:
        self._cycle.result, self._cycle.reason = "skipped", reason

    def _do_broadcast(self, _: Action) -> None:
        message = self._cycle.message if self._rank == 0 else None
        self._cycle.broadcast = self._control.broadcast(message, self._state.plan_length)

    def _unpack(self, message: bytes, start: Placement) -> tuple[list[Round], list[Placement], TableRows | None]:
        """In the background: the rounds of the plan, checked against the placement in force, what they lead to, and the
        dispatch tables for the last of it."""
        if digest_of(message) != self._state.plan_digest:
            raise ValueError("the plan's hash differs from the agreed one")
        rounds, target, counts = unpack_plan(message, self._state.cycle, start)
        check_rounds(start, rounds, self._loader.buffer_experts, target, repair=self._cycle.repair)
        tables = self._adaptor.dispatch
        rows = tables.rows_of(target, counts) if tables is not None and counts is not None else None
        placements = []
        for each in rounds:
            start = start.with_moves(each.moves)
            placements.append(start)
        return rounds, placements, rows

    def _do_prepare(self, action: Action) -> None:
        cycle, number = self._cycle, action.round
        if number < len(cycle.preparing):  # it is sent again
            del cycle.preparing[number:]
            self._background.submit(self._forget_prepared_maps)
        self._prepare(number)

    def _prepare(self, number: int) -> None:
        cycle = self._cycle
        each, after = cycle.rounds[number], cycle.placements[number]
        self._loader.prepare(each)
        layers = np.unique(each.moves[:, LAYER]).tolist()
        cycle.preparing.append(self._background.submit(self._prepare_maps, after, layers))

    def _prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        """In the background: what the routers read of ``layers`` under ``placement``."""
        self._adaptor.prepare_maps(placement, layers)
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.prepare(placement, layers)

    def _commit_maps(self) -> None:
        self._adaptor.commit_maps()
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.commit()

    def _forget_prepared_maps(self) -> None:
        self._adaptor.forget_prepared_maps()
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.forget_prepared()

    def _do_issue(self, action: Action) -> None:
        began = time.perf_counter()
        self._loader.issue(action.round)
        self._stats.waited_for_transfer(time.perf_counter() - began)

    def _do_commit(self, action: Action) -> None:
        # A throw in here is not caught: a half-switched placement must not answer.
        began = time.perf_counter()
        after = self._cycle.placements[action.round]
        self._recorder.flush(self._placement)
        self._loader.commit(action.round)
        self._commit_maps()
        if self._auditor is not None:
            self._auditor.committed(self._cycle.rounds[action.round].moves)
        self._placement = after
        self._stats.committed(time.perf_counter() - began)
        self._stats.placement_digest = after.digest

    def _do_finish(self, _: Action) -> None:
        cycle = self._cycle
        if cycle.repair:
            self._end_repair()
            return
        whole = self._state.committed == len(cycle.rounds)  # or else the rest gave way to a newer plan
        tables = self._adaptor.dispatch
        if tables is not None and cycle.tables is not None and whole:  # they belong to the plan's last placement
            tables.put(cycle.tables)
        if self._rank == 0:
            if cycle.new_shares is not None and cycle.answer is not None and cycle.answer.dispatch_now and whole:
                self._stats.dispatch_changed(cycle.answer.dispatch_now.par)
                if not cycle.rounds:
                    shared = cycle.new_shares.par.mean()
                    cycle.note = f"; new dispatch shares bring PAR {cycle.window_par:.3f} -> {shared:.3f}{cycle.note}"
            if not whole:
                cycle.reason = f"cut off after {self._state.committed} of {len(cycle.rounds)} rounds for a newer plan"
            self._stats.cycle_ended(cycle.result, moved=self._moved_so_far(), reason=cycle.reason)
            self._tell_of_cycle(whole)
        self._record_map()
        self._forget_cycle()

    def _tell_of_cycle(self, whole: bool) -> None:
        cycle, state = self._cycle, self._state
        plan = cycle.answer.plan if cycle.answer is not None else None
        if cycle.result == "skipped":
            text = f"{cycle.reason}{cycle.note}"
            logger.info("%s cycle %d at step %d: %s", self._title, state.cycle, state.step, text)
        elif plan is not None:
            gain = float(plan.par_before.mean() - plan.par_after.mean())
            if whole and plan.policy != "restore":
                self._judge.carried_out(cycle.start, gain)
            else:
                self._judge.forget()
            logger.info(
                "%s cycle %d: PAR %.3f -> %.3f (worst layer %.3f -> %.3f), %d experts moved in %d rounds, "
                "%d steps after its load was taken; planned in %.1f ms%s%s",
                self._title,
                state.cycle,
                plan.par_before.mean(),
                plan.par_after.mean(),
                plan.par_before.max(),
                plan.par_after.max(),
                self._moved_so_far(),
                state.committed,
                state.step - state.snapshot_at,
                1e3 * plan.seconds,
                "" if whole else f"; {cycle.reason}",
                cycle.note,
            )

    def _do_drop(self, action: Action) -> None:
        reason = self._cycle.reason or action.failure.text
        if self._rank == 0:
            self._stats.cycle_ended("failed", moved=self._moved_so_far(), reason=reason, failure=action.failure.kind)
            logger.warning(
                "%s cycle %d dropped on all ranks (%s), %d in a row; serving goes on, next try in %d steps",
                self._title,
                self._state.cycle,
                reason,
                self._state.failures,
                self._state.due - self._state.step,
            )
        self._record_map()
        self._forget_cycle()

    def _do_switch_off(self, action: Action) -> None:
        reason = self._cycle.reason or action.failure.text
        self._stats.switched_off(reason)
        if self._rank == 0:
            self._stats.cycle_ended("failed", moved=self._moved_so_far(), reason=reason, failure=action.failure.kind)
            logger.error("%s is off from step %d on, serving goes on: %s", self._title, self._state.step, reason)
        self._dump_flight(reason)
        self._record_map()
        self._forget_cycle()
        if self._planner is not None:
            self._planner.close(wait=0)

    def _moved_so_far(self) -> int:
        return sum(len(each.moves) for each in self._cycle.rounds[: self._state.committed])

    def _forget_cycle(self) -> None:
        """Nothing is in flight; what was prepared is dropped."""
        for future in self._cycle.preparing:
            future.cancel()
        self._background.submit(self._forget_prepared_maps)
        self._loader.forget()
        if self._auditor is not None and (self._cycle.repair or self._auditor.failed):
            self._auditor.restart()
        self._cycle = _Cycle(self._placement)

    def _record_map(self) -> None:
        """Leaves the placement in force to be written; it is what it is, however the cycle ended."""
        if self._map_recorder is not None:
            load, self._load = self._load, None
            self._map_recorder.record(self._placement, load)

    def _publish(self) -> None:
        if self._planner is not None:
            self._stats.planner_starts = self._planner.starts
        if self._stats_file is not None and self._rank == 0:
            self._stats_file.publish(self._stats.stats())

    def _dump_flight(self, reason: str) -> None:
        try:
            folder = tempfile.mkdtemp(prefix="vllm-eplb-flight-")
            path = os.path.join(folder, f"rank{self._rank}.json")
            self._flight.dump(path, rank=self._rank, reason=reason, settings=str(self._settings))
            logger.warning("%s rank %d: the last steps are in %s", self._title, self._rank, path)
        except OSError:
            pass  # a full disk must not hide the reason itself


_BETWEEN_CYCLES = (Phase.COLLECT, Phase.LISTEN, Phase.AUDIT)
"""Phases in which no slot is written and none is on its way to another rank."""


_FAILS_AS = {
    Phase.SNAPSHOT: Failure.SNAPSHOT,
    Phase.REDUCE: Failure.REDUCE,
    Phase.PLAN: Failure.PLANNER_FAILED,
    Phase.BROADCAST: Failure.PLAN_INVALID,
    Phase.MOVE: Failure.PREPARE,
    Phase.AUDIT: Failure.AUDIT,
}
"""What an exception in the background of a phase is to the other ranks."""


_MAY_FAIL: dict[Do, Failure] = {
    Do.SNAPSHOT: Failure.SNAPSHOT,
    Do.REQUEST_PLAN: Failure.PLANNER_FAILED,
    Do.PREPARE: Failure.PREPARE,
    Do.PLAN_REPAIR: Failure.AUDIT,
}
"""Actions that nothing depends on yet: an exception drops the cycle."""


def _limits(config: EplbConfig, cycle: int) -> dict[str, object]:
    """The settings that the policy takes."""
    if config.policy_name == "random":
        return {"seed": cycle}
    if config.policy_name != "incremental":
        return {}
    return {
        "target_par": config.target_par,
        "effort": config.planner_effort,
        "max_moves": config.max_moves_per_cycle,
        "rank_speed": config.rank_speed,
    }
