# SPDX-License-Identifier: Apache-2.0
"""StatsKeeper: gathers the statistics of one rank while the server runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..values.window import RankLoad, WindowLoad
from .stats import (
    KEPT_CYCLES,
    MAX_TABLE_ENTRIES,
    RANK_FIGURES,
    CycleRecord,
    CycleResult,
    EplbStats,
    LoadTable,
    Par,
    PhaseName,
    RankRecord,
    Window,
)


class StatsKeeper:
    """Gathers statistics of cycles. Belongs to the step thread; every call is cheap.

    The calls of a cycle come in this order: ``window_ended``, ``planned`` (if there is a plan), ``cycle_ended``.
    """

    def __init__(self, version: str = "", policy: str = "", mode: str = "") -> None:
        self._names = {"version": version[:300], "policy": policy[:300], "mode": mode[:300]}
        self.phase: PhaseName = "collect"
        self.step = 0
        self.placement_digest = 0
        self._audits = self._audit_damaged = self._audit_repaired = 0
        self._off_reason = ""
        self._results = {"done": 0, "skipped": 0, "failed": 0}
        self._failures: dict[str, int] = {}
        self.planner_starts = 0
        self._moved = 0
        self._control = self._control_at_cycle = self._control_longest = self._control_last_cycle = 0.0
        self._transfer = self._commit = self._commit_longest = self._longest_step = 0.0
        self._order, self._order_step, self._paused = "", 0, False
        self._collect_steps = self._execution_steps = 0
        self._window: Window | None = None
        self._ranks: tuple[RankRecord, ...] = ()
        self._predicted: Par | None = None
        self._percentiles: tuple[Par | None, Par | None] = (None, None)
        self._dispatch_updates = 0
        self._dispatch_before: Par | None = None
        self._dispatch_after: Par | None = None
        self._moves_planned = 0
        self._planner_seconds = 0.0
        self._last_plan: tuple[Par | None, int, float] = (None, 0, 0.0)
        self._last_percentiles: tuple[Par | None, Par | None] = (None, None)
        self._moe_ms = self._moe_ms_start = self._moe_ms_observed = self._moe_saved = 0.0
        self._step_ms = self._step_ms_start = self._step_saved = 0.0
        self._plan_saves = self._plan_costs = 0.0
        self._saved_ms: float | None = None
        self._last_done: CycleRecord | None = None
        self._cycles: deque[CycleRecord] = deque(maxlen=KEPT_CYCLES)

    def switched_off(self, reason: str) -> None:
        self.phase, self._off_reason = "off", _one_line(reason)

    def intervals(self, collect_steps: int, execution_steps: int) -> None:
        """The intervals in force, in steps."""
        self._collect_steps, self._execution_steps = collect_steps, execution_steps

    def obeyed(self, order: str, step: int, *, paused: bool, collect_steps: int, execution_steps: int) -> None:
        """Notes that the order with this id took effect at ``step``."""
        self._order, self._order_step, self._paused = order[:300], step, paused
        self.intervals(collect_steps, execution_steps)

    def window_ended(self, window: WindowLoad) -> None:
        """Notes that a window has ended, with its load."""
        load, start, observed = window.in_force, window.at_start, window.observed
        self._window = Window(
            step=self.step,
            tokens=int(window.load.sum()),
            par=Par.of(load.par),
            par_start=Par.of(start.par),
            par_observed=None if observed is None else Par.of(observed.par),
            rank_load=_relative(load.tokens),
            rank_load_start=_relative(start.tokens),
            rank_load_observed=() if observed is None else _relative(observed.tokens),
        )
        self._predicted, self._moves_planned, self._planner_seconds = None, 0, 0.0
        self._percentiles = None, None
        self._saved_ms = None
        self._amend(par_realised=self._window.par, par_observed=self._window.par_observed)

    def _amend(self, **update: object) -> None:
        """Adds to the last cycle what the window after it showed."""
        if self._cycles:
            before = self._cycles[-1]
            self._cycles[-1] = after = before.model_copy(update=update)
            if self._last_done is before:
                self._last_done = after

    def time_spent(self, moe_ms: float, moe_ms_start: float, steps: int, moe_ms_observed: float | None = None) -> None:
        """What the MoE layers of a step of the window took, by the measured times of a layer, and the window's steps.

        Args:
            moe_ms: with the placement in force. moe_ms_start: with the one that the server started with.
            steps: of the window.
            moe_ms_observed: with the plan of the window before; None where it was carried out or there is none.
        """
        self._moe_ms, self._moe_ms_start, self._moe_ms_observed = moe_ms, moe_ms_start, moe_ms_observed or 0.0
        self._moe_saved += 1e-3 * (moe_ms_start - moe_ms) * steps
        self._amend(moe_ms_realised=moe_ms, moe_ms_observed=moe_ms_observed)

    def steps_timed(self, step_ms: float, step_ms_start: float, saved_seconds: float) -> None:
        """What an average step of the window took, what it took with the start placement, and the difference over all
        steps of the window."""
        self._step_ms, self._step_ms_start = step_ms, step_ms_start
        self._step_saved += saved_seconds

    def weighed(self, saved_ms: float, saved_fraction: float, cost_ms: float) -> None:
        """What the last plan saves of MoE time in a step, which part of it that is, and what carrying it out costs
        once, by measured times."""
        self._saved_ms, self._plan_saves, self._plan_costs = saved_ms, saved_fraction, cost_ms

    def figures(self) -> npt.NDArray[np.int64]:
        """int64 [len(RANK_FIGURES)]: figures of this rank, in microseconds."""
        seconds = (self._control, self._transfer, self._commit, self._longest_step)
        return np.array([round(1e6 * value) for value in seconds], dtype=np.int64)

    def ranks_told(self, figures: npt.NDArray[np.int64], rank_load: RankLoad, node_of_rank: Sequence[int]) -> None:
        """Notes the figures of all ranks, and their load in the window.

        Args:
            figures: [R, len(RANK_FIGURES)], in microseconds.
            rank_load: load of the window, with the placement in force.
            node_of_rank: the node of each of R ranks.
        """
        relative = _over_mean(rank_load.tokens)
        self._ranks = tuple(
            RankRecord(
                rank=rank,
                node=node,
                load=round(float(relative[:, rank].mean()), 4),
                worst=round(float(relative[:, rank].max()), 4),
                **{name: 1e-6 * int(value) for name, value in zip(RANK_FIGURES, figures[rank], strict=True)},
            )
            for rank, node in enumerate(node_of_rank)
        )

    def planned(
        self,
        par_after: npt.ArrayLike,
        seconds: float,
        moves: int = 0,
        p95_before: npt.ArrayLike | None = None,
        p95_after: npt.ArrayLike | None = None,
    ) -> None:
        """Notes a plan.

        Args:
            par_after: [L], the PAR that the plan promises.
            seconds: wall time of planning.
            moves: number of moves.
            p95_before, p95_after: [L], 95th percentile of PAR over the windows that the plan was made from, with the
                placement in force and after all moves; None for a plan made from a single window.
        """
        self._predicted, self._moves_planned, self._planner_seconds = Par.of(par_after), moves, float(seconds)
        self._last_plan = self._predicted, self._moves_planned, self._planner_seconds
        before, after = (None if p95 is None else Par.of(p95) for p95 in (p95_before, p95_after))
        self._last_percentiles = self._percentiles = before, after

    def dispatch_changed(self, par_after: npt.ArrayLike) -> None:
        """Notes that new dispatch shares are in force; ``par_after`` [L]: PAR of the last window with these shares."""
        self._dispatch_updates += 1
        self._dispatch_before = self._window.par if self._window else None
        self._dispatch_after = Par.of(par_after)

    def cycle_ended(self, result: CycleResult, *, moved: int = 0, reason: str = "", failure: str = "") -> None:
        """Notes that a cycle has ended: experts moved, the reason if none were, and the kind of a failure."""
        if failure:
            self._failures[failure] = self._failures.get(failure, 0) + 1
        window = self._window
        record = CycleRecord(
            cycle=sum(self._results.values()) + 1,
            step=min(window.step, self.step) if window else self.step,
            end_step=self.step,
            result=result,
            reason=_one_line(reason),
            par=window.par if window else None,
            par_start=window.par_start if window else None,
            par_predicted=self._predicted,
            p95_before=self._percentiles[0],
            p95_predicted=self._percentiles[1],
            moved=moved,
            moves_planned=self._moves_planned,
            planner_seconds=self._planner_seconds,
            saved_ms=self._saved_ms,
        )
        self._results[result] += 1
        self._moved += moved
        self._cycles.append(record)
        if result == "done":
            self._last_done = record
        self._control_last_cycle = self._control - self._control_at_cycle
        self._control_at_cycle = self._control

    def audited(self, damaged: int) -> None:
        """Notes that an audit has ended; ``damaged``: damaged slots on all ranks together."""
        self._audits += 1
        self._audit_damaged = damaged

    def repaired(self, slots: int) -> None:
        """Adds ``slots`` damaged slots that were repaired."""
        self._audit_repaired += slots

    def waited_for_control(self, seconds: float) -> None:
        """Adds the time that one step waited for the agreed status."""
        self._control += seconds
        self._control_longest = max(self._control_longest, seconds)

    def waited_for_transfer(self, seconds: float) -> None:
        self._transfer += seconds

    def committed(self, seconds: float) -> None:
        """Adds the time that the commits of one step took."""
        self._commit += seconds
        self._commit_longest = max(self._commit_longest, seconds)

    def step_took(self, seconds: float) -> None:
        """Notes the time that one whole ``forward_before`` took."""
        self._longest_step = max(self._longest_step, seconds)

    def stats(self) -> EplbStats:
        """The statistics as of now."""
        last = self._last_done
        par_planned, moves_planned, planner_seconds = self._last_plan
        return EplbStats(
            **self._names,
            updated_at=time.time(),
            phase=self.phase,
            off_reason=self._off_reason,
            step=self.step,
            cycles_done=self._results["done"],
            cycles_skipped=self._results["skipped"],
            cycles_failed=self._results["failed"],
            failures=dict(self._failures),
            planner_starts=self.planner_starts,
            experts_moved=self._moved,
            experts_moved_last=last.moved if last else 0,
            par_before=last.par if last else None,
            par_predicted=last.par_predicted if last else None,
            par_realised=last.par_realised if last else None,
            dispatch_updates=self._dispatch_updates,
            dispatch_par_before=self._dispatch_before,
            dispatch_par_after=self._dispatch_after,
            par_planned=par_planned,
            moves_planned=moves_planned,
            p95_before=self._last_percentiles[0],
            p95_planned=self._last_percentiles[1],
            planner_seconds=planner_seconds,
            control_wait_seconds=self._control,
            control_wait_last_cycle_seconds=self._control_last_cycle,
            control_wait_longest_seconds=self._control_longest,
            transfer_wait_seconds=self._transfer,
            commit_seconds=self._commit,
            commit_longest_seconds=self._commit_longest,
            longest_step_seconds=self._longest_step,
            moe_ms=self._moe_ms,
            moe_ms_start=self._moe_ms_start,
            moe_ms_observed=self._moe_ms_observed,
            moe_time_saved_seconds=self._moe_saved,
            step_ms=self._step_ms,
            step_ms_start=self._step_ms_start,
            step_time_saved_seconds=self._step_saved,
            plan_saved_fraction=self._plan_saves,
            plan_cost_seconds=1e-3 * self._plan_costs,
            placement_digest=self.placement_digest,
            order=self._order,
            order_step=self._order_step,
            paused=self._paused,
            collect_steps=self._collect_steps,
            execution_steps=self._execution_steps,
            audits=self._audits,
            audit_damaged=self._audit_damaged,
            audit_repaired=self._audit_repaired,
            audit_mended=self._audit_repaired,
            window=self._window,
            ranks=self._ranks,
            cycles=tuple(self._cycles),
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _relative(load: npt.NDArray[np.float64]) -> LoadTable:
    if load.size > MAX_TABLE_ENTRIES:
        return ()
    return tuple(tuple(row) for row in _over_mean(load).round(4).tolist())


def _over_mean(load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[L, R] load of each rank over its layer's mean; 1 in a layer without load."""
    mean = load.mean(axis=1, keepdims=True)
    ratio: npt.NDArray[np.float64] = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return ratio
