# SPDX-License-Identifier: Apache-2.0
"""EplbStats: the statistics of the balancer on EP rank 0, for other processes in one small JSON file.

The worker keeps a :class:`StatsKeeper` and publishes :class:`EplbStats`; a background thread replaces the file, so that
serving never waits for a disk. The API server (``/metrics``), tools and the demo read it. The environment variable
``EPLB_STATS_FILE`` holds the path. The front-end process sets it, and the workers inherit it; a user may set it before
the start to choose the place.
"""

from __future__ import annotations

import logging
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STATS_BYTES = 4 << 20


KEPT_CYCLES = 64


MAX_RANKS = 4096


MAX_TABLE_ENTRIES = 4096
"""Rank loads are kept per layer up to this many numbers (layers x ranks); beyond that they are left out."""


logger = logging.getLogger("vllm.eplb")


Count: TypeAlias = Annotated[int, Field(ge=0, le=2**62)]


Seconds: TypeAlias = Annotated[float, Field(ge=0.0, le=1e12)]


Saved: TypeAlias = Annotated[float, Field(ge=-1e12, le=1e12)]


Ratio: TypeAlias = Annotated[float, Field(ge=0.0, le=1e6)]


Text: TypeAlias = Annotated[str, Field(max_length=300)]


Kind: TypeAlias = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]


LoadTable: TypeAlias = Annotated[tuple[tuple[Ratio, ...], ...], Field(max_length=MAX_TABLE_ENTRIES)]


PhaseName = Literal["off", "collect", "snapshot", "reduce", "plan", "broadcast", "move", "drain", "audit"]


CycleResult = Literal["done", "skipped", "failed"]


class StatsError(ValueError):
    """A statistics file whose contents are not statistics."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Par(_Frozen):
    """Peak-to-average ratio of rank load over the MoE layers; 1.0 is perfect.

    Attributes:
        mean: mean over the layers.
        worst: the worst layer.
    """

    mean: Ratio
    worst: Ratio

    @classmethod
    def of(cls, par: npt.ArrayLike) -> Par:
        """Of the PAR of each layer, [L]."""
        values = np.asarray(par, dtype=np.float64)
        return cls(mean=float(values.mean()), worst=float(values.max()))


class Window(_Frozen):
    """The load of one collection window, as it fell on the ranks.

    Attributes:
        step: step at which the window ended.
        tokens: (token, expert) pairs counted, over all layers and ranks.
        par: with the placement in force during the window.
        par_start: the same tokens with the placement the server started with.
        par_observed: the same tokens with the plan of the window before; only in mode observe, in which plans are not
            carried out.
        rank_load: [L][R] load of each rank in each layer over the layer's mean, with the placement in force; empty
            where it has more than ``MAX_TABLE_ENTRIES`` numbers.
        rank_load_start: the same with the placement the server started with.
        rank_load_observed: the same with the placement of ``par_observed``.
    """

    step: Count
    tokens: Count
    par: Par
    par_start: Par
    par_observed: Par | None = None
    rank_load: LoadTable = ()
    rank_load_start: LoadTable = ()
    rank_load_observed: LoadTable = ()


class RankRecord(_Frozen):
    """Figures of one rank at the end of the last window. Times are in seconds, since the server started.

    Attributes:
        rank: number within the expert-parallel group; node: number of the rank's host, in order of the ranks.
        load: the rank's load in the window over the mean load, mean of layers; worst: the same in the layer where it is
            largest.
        control_wait_seconds, transfer_wait_seconds, commit_seconds: time that the rank's steps waited.
        longest_step_seconds: the longest time that balancing added to one of its steps.
    """

    rank: Count
    node: Count
    load: Ratio
    worst: Ratio
    control_wait_seconds: Seconds
    transfer_wait_seconds: Seconds
    commit_seconds: Seconds
    longest_step_seconds: Seconds


RANK_FIGURES = ("control_wait_seconds", "transfer_wait_seconds", "commit_seconds", "longest_step_seconds")
"""Figures that ranks send to EP rank 0 with their load, in microseconds."""


class CycleRecord(_Frozen):
    """One finished cycle.

    Attributes:
        cycle: its number, from 1.
        step: step at which its window ended; ``end_step``: step at which the cycle ended.
        result: done (experts moved), skipped (no gain worth the moves) or failed (dropped).
        reason: why the cycle was skipped or failed.
        par: PAR in its window, with the placement in force then.
        par_start: PAR of the same window with the placement the server started with.
        par_predicted: PAR that the plan promises for the same window; None without a plan.
        par_realised: PAR in the next window; None until that window ends.
        par_observed: in mode observe, the PAR that the next window would have had with the plan in force.
        p95_before, p95_predicted: 95th percentile of PAR over the windows that the plan was made from, with the
            placement in force and as the plan promises; None for a plan made from a single window.
        moved: experts moved. moves_planned: those of the plan, carried out or not.
        planner_seconds: wall time of planning.
        saved_ms: of MoE layers in each step, as the plan promised; None where no time was measured.
        moe_ms_realised, moe_ms_observed: milliseconds of the MoE layers in a step of the window that followed, and in
            mode observe what they would have been with the plan in force; None until that is over, and where no time
            was measured.
    """

    cycle: Count
    step: Count
    end_step: Count
    result: CycleResult
    reason: Text = ""
    par: Par | None = None
    par_start: Par | None = None
    par_predicted: Par | None = None
    par_realised: Par | None = None
    par_observed: Par | None = None
    p95_before: Par | None = None
    p95_predicted: Par | None = None
    moved: Count = 0
    moves_planned: Count = 0
    planner_seconds: Seconds = 0.0
    saved_ms: Saved | None = None
    moe_ms_realised: Seconds | None = None
    moe_ms_observed: Seconds | None = None


class EplbStats(_Frozen):
    """A snapshot of the balancer, as EP rank 0 sees it. Times are in seconds, waits are those of the step thread.

    Attributes:
        version: of this package. policy, mode: the settings in force.
        updated_at: when it was written, seconds since the epoch.
        phase: phase of the cycle; ``off`` with an ``off_reason`` is permanent.
        step: steps so far; a step is one forward pass that is counted.
        cycles_done, cycles_skipped, cycles_failed: cycles so far by result.
        failures: failed cycles by kind, as in ``phases.Failure``.
        planner_starts: starts of the planner's process; 1 if it was never replaced.
        experts_moved: experts moved so far; ``experts_moved_last``: in the last cycle that was done.
        par_before, par_predicted, par_realised: PARs of the last cycle that was done; realised is measured in the next
            window, and None until that window ends.
        dispatch_updates: changes of the dispatch shares; ``dispatch_par_before``, ``dispatch_par_after``: PAR of the
            window before the last change, with the old and with the new shares, without a move.
        par_planned, moves_planned, planner_seconds: figures of the last plan, carried out or not.
        p95_before, p95_planned: 95th percentile of PAR over the windows that this plan was made from, without the plan
            and with it; None for a plan made from a single window.
        control_wait_*: waits for the ranks' agreement: total, in the last cycle, longest in one step.
        transfer_wait_seconds: waits for transfers, total.
        commit_*: time of commits: total, longest in one step.
        longest_step_seconds: the longest time that one ``forward_before`` took: the longest wait caused by balancing.
        moe_ms, moe_ms_start: milliseconds of the MoE layers in an average step of the last window, with the placement
            in force and with the one the server started with, by the times of a layer that were measured at start-up;
            0 where none were.
        moe_ms_observed: the same with the plan of the window before, in mode observe; 0 where there is none.
        moe_time_saved_seconds: the difference of ``moe_ms_start`` and ``moe_ms`` over all steps so far, so predicted.
        step_ms, step_ms_start: milliseconds of an average step of the last window, timed, and of the same steps as long
            as they were with the start placement; 0 where none can be compared.
        step_time_saved_seconds: the difference of the two over all steps that were compared so far, so realised.
        plan_saved_fraction: part of MoE time that the last plan saves, carried out or not; plan_cost_seconds: what
            carrying it out costs once. Both 0 where no time was measured.
        placement_digest: hash of the placement in force.
        order, order_step: id of the last order that took effect (orders.py), and the step at which it did.
        paused: whether cycles begin only when ordered.
        collect_steps, execution_steps: the intervals in force, in steps.
        audits: passes over the weights of all slots so far.
        audit_damaged: slots that the last audit found damaged.
        audit_repaired: slots repaired so far; ``audit_mended`` is its old name, and stays for one release.
        window: the last finished window.
        ranks: all ranks, as of the end of that window.
        cycles: the last cycles, oldest first, at most ``KEPT_CYCLES``.
    """

    version: Text = ""
    policy: Text = ""
    mode: Text = ""
    updated_at: Seconds = 0.0
    phase: PhaseName = "collect"
    off_reason: Text = ""
    step: Count = 0
    cycles_done: Count = 0
    cycles_skipped: Count = 0
    cycles_failed: Count = 0
    failures: Annotated[dict[Kind, Count], Field(max_length=32)] = {}
    planner_starts: Count = 0
    experts_moved: Count = 0
    experts_moved_last: Count = 0
    par_before: Par | None = None
    par_predicted: Par | None = None
    par_realised: Par | None = None
    dispatch_updates: Count = 0
    dispatch_par_before: Par | None = None
    dispatch_par_after: Par | None = None
    par_planned: Par | None = None
    moves_planned: Count = 0
    p95_before: Par | None = None
    p95_planned: Par | None = None
    planner_seconds: Seconds = 0.0
    control_wait_seconds: Seconds = 0.0
    control_wait_last_cycle_seconds: Seconds = 0.0
    control_wait_longest_seconds: Seconds = 0.0
    transfer_wait_seconds: Seconds = 0.0
    commit_seconds: Seconds = 0.0
    commit_longest_seconds: Seconds = 0.0
    longest_step_seconds: Seconds = 0.0
    moe_ms: Seconds = 0.0
    moe_ms_start: Seconds = 0.0
    moe_ms_observed: Seconds = 0.0
    moe_time_saved_seconds: Saved = 0.0
    step_ms: Seconds = 0.0
    step_ms_start: Seconds = 0.0
    step_time_saved_seconds: Saved = 0.0
    plan_saved_fraction: Saved = 0.0
    plan_cost_seconds: Seconds = 0.0
    placement_digest: Count = 0
    order: Text = ""
    order_step: Count = 0
    paused: bool = False
    collect_steps: Count = 0
    execution_steps: Count = 0
    audits: Count = 0
    audit_damaged: Count = 0
    audit_repaired: Count = 0
    audit_mended: Count = 0
    window: Window | None = None
    ranks: Annotated[tuple[RankRecord, ...], Field(max_length=MAX_RANKS)] = ()
    cycles: Annotated[tuple[CycleRecord, ...], Field(max_length=KEPT_CYCLES)] = ()

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> EplbStats:
        """Reads what :meth:`to_json` wrote.

        Raises:
            StatsError: the text is not JSON, a field is unknown, of the wrong type or out of range, or the text is
                longer than ``MAX_STATS_BYTES``.
        """
        if len(text) > MAX_STATS_BYTES:
            raise StatsError(f"statistics of {len(text)} bytes; at most {MAX_STATS_BYTES} are read")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise StatsError(f"not statistics: {where}: {first['msg']}") from None
