# SPDX-License-Identifier: Apache-2.0
"""Statistics: what EP rank 0 knows about the balancing, handed to other processes in one small JSON file.

The worker keeps a :class:`StatsKeeper` and publishes its :class:`EplbStats`; a background thread replaces the file, so
that serving never waits for a disk. The API server (``/metrics``), tools and the demo read it. Its path stands in the
environment variable ``EPLB_STATS_FILE``, set in the front-end process and inherited by the workers; a user may
set it beforehand to choose the place.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .files import write_private
from .placement import peak_to_average
from .private_folder import make_private_folder
from .process import STATS_VARIABLE

MAX_STATS_BYTES = 4 << 20
KEPT_CYCLES = 64
MAX_RANKS = 4096
MAX_TABLE_ENTRIES = 4096
"""Rank loads are kept per layer up to this many numbers (layers x ranks); beyond that they are left out."""

logger = logging.getLogger("vllm.eplb")

Count: TypeAlias = Annotated[int, Field(ge=0, le=2**62)]
Seconds: TypeAlias = Annotated[float, Field(ge=0.0, le=1e12)]
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
        par_observed: the same tokens with the plan of the window before; only in mode observe, which made it and did
            not carry it out.
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
    """What one rank told of itself when the last window ended. Times are in seconds, since the server started.

    Attributes:
        rank: within the expert-parallel group; node: of its host, counted in order of the ranks.
        load: its part of the window's load over an even part, mean of layers; worst: in the layer where that is most.
        control_wait_seconds, transfer_wait_seconds, commit_seconds: what its steps waited for.
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
"""What ranks send to EP rank 0 with their load, in microseconds."""


class CycleRecord(_Frozen):
    """One finished cycle.

    Attributes:
        cycle: its number, from 1.
        step: step at which its window ended; ``end_step``: step at which it was over.
        result: done (moves were made), skipped (nothing worth moving) or failed (dropped).
        reason: why it was skipped or failed.
        par: PAR in its window, with the placement in force: what there was before.
        par_start: PAR of the same window with the placement the server started with.
        par_predicted: PAR that the plan promises for the same window; None without a plan.
        par_realised: PAR in the window that followed; None until that is over.
        par_observed: in mode observe, what the window that followed would have had with the plan in force.
        moved: experts moved. moves_planned: those of the plan, carried out or not.
        planner_seconds: wall time of planning.
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
    moved: Count = 0
    moves_planned: Count = 0
    planner_seconds: Seconds = 0.0


class EplbStats(_Frozen):
    """A snapshot of the balancer, as EP rank 0 sees it. Times are in seconds, waits are those of the step thread.

    Attributes:
        version: of this package. policy, mode: the settings in force.
        updated_at: when it was written, seconds since the epoch.
        phase: phase of the cycle; ``off`` with an ``off_reason`` is for good.
        step: steps so far; a step is one forward pass that is counted.
        cycles_done, cycles_skipped, cycles_failed: cycles so far by result.
        failures: those that failed by kind, as in ``cycle.Failure``.
        planner_starts: times that the planner's process was started; 1 if it never had to be replaced.
        experts_moved: experts moved so far; ``experts_moved_last``: in the last cycle that was done.
        par_before, par_predicted, par_realised: of the last cycle that was done; realised is measured in the window
            after it and None until that is over.
        dispatch_updates: how often the dispatch shares were changed; ``dispatch_par_before``, ``dispatch_par_after``:
            PAR of the last window for which they were, with the old shares and with the new ones, nothing moved.
        par_planned, moves_planned, planner_seconds: of the last plan, carried out or not.
        control_wait_*: waiting for the ranks' agreement: total, in the last cycle, longest in one step.
        transfer_wait_seconds: waiting for transfers, total.
        commit_*: switching over to received experts: total, longest in one step.
        longest_step_seconds: the longest time that one ``forward_before`` took: the longest wait caused by balancing.
        placement_digest: hash of the placement in force.
        order, order_step: id of the last order that took effect (orders.py), and the step at which it did.
        paused: whether cycles begin only when ordered.
        collect_steps, execution_steps: the intervals in force, in steps.
        audits: passes over the weights of all slots so far.
        audit_damaged: slots that the last one found damaged; ``audit_mended``: slots mended so far.
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
    planner_seconds: Seconds = 0.0
    control_wait_seconds: Seconds = 0.0
    control_wait_last_cycle_seconds: Seconds = 0.0
    control_wait_longest_seconds: Seconds = 0.0
    transfer_wait_seconds: Seconds = 0.0
    commit_seconds: Seconds = 0.0
    commit_longest_seconds: Seconds = 0.0
    longest_step_seconds: Seconds = 0.0
    placement_digest: Count = 0
    order: Text = ""
    order_step: Count = 0
    paused: bool = False
    collect_steps: Count = 0
    execution_steps: Count = 0
    audits: Count = 0
    audit_damaged: Count = 0
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
            StatsError: the text is no JSON, a field is unknown, of the wrong type or out of range, or it is longer
                than ``MAX_STATS_BYTES``.
        """
        if len(text) > MAX_STATS_BYTES:
            raise StatsError(f"statistics of {len(text)} bytes; at most {MAX_STATS_BYTES} are read")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise StatsError(f"no statistics: {where}: {first['msg']}") from None


class StatsKeeper:
    """Gathers, on EP rank 0, what happens in the cycle. Belongs to the step thread; every call is cheap.

    A cycle reports itself in this order: ``window_ended``, ``planned`` (if there was a plan), ``cycle_ended``.
    """

    def __init__(self, version: str = "", policy: str = "", mode: str = "") -> None:
        self._names = {"version": version[:300], "policy": policy[:300], "mode": mode[:300]}
        self.phase: PhaseName = "collect"
        self.step = 0
        self.placement_digest = 0
        self._audits = self._audit_damaged = self._audit_mended = 0
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
        self._dispatch_updates = 0
        self._dispatch_before: Par | None = None
        self._dispatch_after: Par | None = None
        self._moves_planned = 0
        self._planner_seconds = 0.0
        self._last_plan: tuple[Par | None, int, float] = (None, 0, 0.0)
        self._last_done: CycleRecord | None = None
        self._cycles: deque[CycleRecord] = deque(maxlen=KEPT_CYCLES)

    def switched_off(self, reason: str) -> None:
        self.phase, self._off_reason = "off", _one_line(reason)

    def intervals(self, collect_steps: int, execution_steps: int) -> None:
        """The intervals in force, in steps."""
        self._collect_steps, self._execution_steps = collect_steps, execution_steps

    def obeyed(self, order: str, step: int, *, paused: bool, collect_steps: int, execution_steps: int) -> None:
        """The order with this id took effect at ``step``."""
        self._order, self._order_step, self._paused = order[:300], step, paused
        self.intervals(collect_steps, execution_steps)

    def window_ended(
        self,
        rank_load: npt.ArrayLike,
        rank_load_start: npt.ArrayLike,
        rank_load_observed: npt.ArrayLike | None = None,
    ) -> None:
        """A window is over and its load is known.

        Args:
            rank_load: [L, R] tokens per rank with the placement in force.
            rank_load_start: [L, R] the same tokens with the placement the server started with.
            rank_load_observed: [L, R] the same tokens with the last plan, where it was made and not carried out.
        """
        load, start = np.asarray(rank_load, dtype=np.float64), np.asarray(rank_load_start, dtype=np.float64)
        observed = None if rank_load_observed is None else np.asarray(rank_load_observed, dtype=np.float64)
        self._window = Window(
            step=self.step,
            tokens=round(float(load.sum())),
            par=Par.of(peak_to_average(load)),
            par_start=Par.of(peak_to_average(start)),
            par_observed=None if observed is None else Par.of(peak_to_average(observed)),
            rank_load=_relative(load),
            rank_load_start=_relative(start),
            rank_load_observed=() if observed is None else _relative(observed),
        )
        self._predicted, self._moves_planned, self._planner_seconds = None, 0, 0.0
        if self._cycles:
            before = self._cycles[-1]
            self._cycles[-1] = after = before.model_copy(
                update={"par_realised": self._window.par, "par_observed": self._window.par_observed}
            )
            if self._last_done is before:
                self._last_done = after

    def figures(self) -> npt.NDArray[np.int64]:
        """int64 [len(RANK_FIGURES)]: this rank's own, in microseconds."""
        seconds = (self._control, self._transfer, self._commit, self._longest_step)
        return np.array([round(1e6 * each) for each in seconds], dtype=np.int64)

    def ranks_told(
        self, figures: npt.NDArray[np.int64], rank_load: npt.NDArray[np.float64], node_of_rank: Sequence[int]
    ) -> None:
        """All ranks' figures are known, with the load of the window.

        Args:
            figures: [R, len(RANK_FIGURES)], of each rank.
            rank_load: [L, R] tokens per rank with the placement in force.
            node_of_rank: R integers.
        """
        relative = _over_mean(rank_load)
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

    def planned(self, par_after: npt.ArrayLike, seconds: float, moves: int = 0) -> None:
        """A plan is there: the PAR [L] that it promises, the wall time it took and its moves."""
        self._predicted, self._moves_planned, self._planner_seconds = Par.of(par_after), moves, float(seconds)
        self._last_plan = self._predicted, self._moves_planned, self._planner_seconds

    def dispatch_changed(self, par_after: npt.ArrayLike) -> None:
        """New dispatch shares are in force; ``par_after`` [L]: what they alone would have made of the last window."""
        self._dispatch_updates += 1
        self._dispatch_before = self._window.par if self._window else None
        self._dispatch_after = Par.of(par_after)

    def cycle_ended(self, result: CycleResult, *, moved: int = 0, reason: str = "", failure: str = "") -> None:
        """A cycle is over: how many experts it moved, why it moved none, and the kind of its failure."""
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
            moved=moved,
            moves_planned=self._moves_planned,
            planner_seconds=self._planner_seconds,
        )
        self._results[result] += 1
        self._moved += moved
        self._cycles.append(record)
        if result == "done":
            self._last_done = record
        self._control_last_cycle = self._control - self._control_at_cycle
        self._control_at_cycle = self._control

    def audited(self, damaged: int) -> None:
        """An audit is over: it found so many damaged slots, on all ranks together."""
        self._audits += 1
        self._audit_damaged = damaged

    def mended(self, slots: int) -> None:
        """So many damaged slots got good weights again."""
        self._audit_mended += slots

    def waited_for_control(self, seconds: float) -> None:
        """One step waited so long for the agreed status."""
        self._control += seconds
        self._control_longest = max(self._control_longest, seconds)

    def waited_for_transfer(self, seconds: float) -> None:
        self._transfer += seconds

    def committed(self, seconds: float) -> None:
        """The commits of one step took so long."""
        self._commit += seconds
        self._commit_longest = max(self._commit_longest, seconds)

    def step_took(self, seconds: float) -> None:
        """One whole ``forward_before`` took so long."""
        self._longest_step = max(self._longest_step, seconds)

    def stats(self) -> EplbStats:
        """The snapshot of this moment."""
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
            planner_seconds=planner_seconds,
            control_wait_seconds=self._control,
            control_wait_last_cycle_seconds=self._control_last_cycle,
            control_wait_longest_seconds=self._control_longest,
            transfer_wait_seconds=self._transfer,
            commit_seconds=self._commit,
            commit_longest_seconds=self._commit_longest,
            longest_step_seconds=self._longest_step,
            placement_digest=self.placement_digest,
            order=self._order,
            order_step=self._order_step,
            paused=self._paused,
            collect_steps=self._collect_steps,
            execution_steps=self._execution_steps,
            audits=self._audits,
            audit_damaged=self._audit_damaged,
            audit_mended=self._audit_mended,
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


class StatsFile:
    """Writes statistics to a file that readers always see whole.

    Args:
        path: of the file; its folder must exist. The file is readable by its owner only.
        min_interval: least seconds between two writes of the background thread; what is published meanwhile is
            replaced by what is published later.
    """

    def __init__(self, path: str | os.PathLike[str], min_interval: float = 0.2) -> None:
        self.path = Path(path)
        self._min_interval = min_interval
        self._newest: EplbStats | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, stats: EplbStats) -> None:
        """Replaces the file. May wait for the disk.

        Raises:
            OSError: the file cannot be written.
        """
        write_private(self.path, stats.to_json())

    def publish(self, stats: EplbStats) -> None:
        """Leaves statistics to the background thread. Never waits, never raises."""
        self._newest = stats
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eplb-stats", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self, timeout: float = 2.0) -> None:
        """Writes what is still to be written and ends the thread; waits at most ``timeout`` seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        complained = False
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            stats, self._newest = self._newest, None
            if stats is not None:
                try:
                    self.write(stats)
                except Exception as error:
                    if not complained:
                        logger.warning("EPLB statistics cannot be written to %s: %s", self.path, error)
                        complained = True
            if closing:
                return
            self._closing.wait(self._min_interval)


def read_stats(path: str | os.PathLike[str]) -> EplbStats | None:
    """Reads a statistics file; None if there is none yet.

    Raises:
        StatsError: what is there are no statistics.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))  # a FIFO must not block
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StatsError(f"{os.fspath(path)} is not a regular file")
        return EplbStats.from_json(file.read(MAX_STATS_BYTES + 1))


def stats_path(part: str = "") -> Path | None:
    """Where statistics are written, or None if nobody asked for them.

    Args:
        part: which of several balancers of one server writes them (a pipeline stage, a drafter): each has its own file.
    """
    name = os.environ.get(STATS_VARIABLE, "")
    if not name:
        return None
    path = Path(name)
    return path.with_stem(f"{path.stem}-{part}") if part else path


def provide_stats_path() -> Path:
    """In the front-end process: the path that all processes of this server share.

    Makes a private folder for it unless the environment variable is set. The process that made it removes it when it
    exits; if that was killed, the planner's process does (process.py), or else the next server's start.
    """
    existing = stats_path()
    if existing is not None:
        return existing
    owner, folder = os.getpid(), make_private_folder()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)
            os.environ.pop(STATS_VARIABLE, None)

    atexit.register(remove)
    path = folder / "stats.json"
    os.environ[STATS_VARIABLE] = str(path)
    return path
