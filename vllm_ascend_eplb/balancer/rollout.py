# SPDX-License-Identifier: Apache-2.0
"""Rollout: the rounds of a plan on this rank, from the broadcast to the last commit.

::

    broadcast ──> unpack and check ──> prepare round k ──> issue round k ──> commit round k ──> finish
    (all ranks)   (background thread)  (host; may fail)    (bytes travel)    (slots and maps)
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..agreement.channel import Bulk
from ..agreement.phases import CycleState, Failure
from ..planning.message import digest_of, unpack_plan
from ..routing.weighted import TableRows
from ..values.placement import Placement
from ..values.plan import LAYER
from ..values.rounds import Round, check_rounds
from .served_model import EplbAdaptor
from .work import Parts, Work


class Maps:
    """The tensors that the routers read: the adaptor's maps and, with planned shares, the dispatch tables."""

    def __init__(self, adaptor: EplbAdaptor) -> None:
        self._adaptor = adaptor

    def stage(self, placement: Placement, layers: list[int]) -> None:
        """Computes the maps of ``layers`` under ``placement``; in the background, in order."""
        self._adaptor.prepare_maps(placement, layers)
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.prepare(placement, layers)

    def switch(self) -> None:
        """Puts the oldest staged maps in force; only enqueues copies."""
        self._adaptor.commit_maps()
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.commit()

    def drop(self) -> None:
        """Drops what is staged."""
        self._adaptor.forget_prepared_maps()
        if self._adaptor.dispatch is not None:
            self._adaptor.dispatch.forget_prepared()


@dataclass
class _Course:
    """A plan that was unpacked and checked.

    Attributes:
        rounds: the rounds; placements: the placement after each of them.
        tables: dispatch tables for the last placement, put in force when all rounds are committed.
        staging: futures of the maps of the rounds prepared so far.
    """

    rounds: list[Round]
    placements: list[Placement]
    tables: TableRows | None
    staging: list[Future[None]] = field(default_factory=list)


class Rollout:
    """Carries out one plan after another on this rank.

    In a cycle it holds first the broadcast, then the checks in the background, then the course; otherwise nothing.
    """

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts, self._work = parts, work
        self.maps = Maps(parts.adaptor)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eplb-prepare")
        self._broadcast: Bulk[bytes] | None = None
        self._unpacking: Future[_Course] | None = None
        self._course: _Course | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds of the plan under way; 0 without a plan."""
        return len(self._course.rounds) if self._course is not None else 0

    @property
    def moved(self) -> int:
        """Experts moved by the committed rounds of the plan under way."""
        rounds = self._course.rounds if self._course is not None else []
        return sum(len(round.moves) for round in rounds[: self._work.state.committed])

    def broadcast(self) -> None:
        """Posts the broadcast of the agreed plan."""
        message = self._work.offer if self._work.rank == 0 else None
        self._broadcast = self._parts.control.broadcast(message, self._work.state.plan_length)

    def ready(self) -> bool:
        """Whether the plan has arrived, is checked, and its first rounds are prepared."""
        if self._course is None:
            if self._unpacking is None and self._broadcast is not None and self._broadcast.done():
                message, self._broadcast = self._broadcast.result(), None
                work = self._work
                self._unpacking = self._background.submit(self._unpack, message, work.placement, work.state)
            if self._unpacking is None or not self._unpacking.done():
                return False
            self._course = self._unpacking.result()
        return not self._course.rounds or self._first_rounds_ready(self._course)

    def _unpack(self, message: bytes, start: Placement, state: CycleState) -> _Course:
        """Unpacks the plan in the background: its rounds, checked against the placement in force, the placements after
        them, and the dispatch tables of the last placement."""
        if digest_of(message) != state.plan_digest:
            raise ValueError("the plan's hash differs from the agreed one")
        rounds, target, counts = unpack_plan(message, state.cycle, start)
        check_rounds(start, rounds, self._parts.loader.buffer_experts, target, repair=state.repair)
        tables = self._parts.adaptor.dispatch
        rows = tables.rows_of(target, counts) if tables is not None and counts is not None else None
        placements = []
        for round in rounds:
            start = start.with_moves(round.moves)
            placements.append(start)
        return _Course(rounds, placements, rows)

    def _first_rounds_ready(self, course: _Course) -> bool:
        """Prepares a round for each buffer, once the plan is checked; returns whether the first may be issued."""
        if not course.staging:
            try:
                for number in range(min(len(course.rounds), self._parts.settings.buffers)):
                    self._prepare(course, number)
            except Exception as error:
                self._work.fail(Failure.PREPARE, error)
        return self.rounds_ready() > 0 and all(future.done() for future in course.staging)

    def rounds_ready(self) -> int:
        """Number of prepared rounds that may be issued now."""
        if self._course is None:
            return 0
        for number, future in enumerate(self._course.staging):
            if not future.done():
                return number
            if (error := future.exception()) is not None:
                self._work.fail(Failure.PREPARE, error)
                return number
            if number >= self._work.state.issued and not self._parts.loader.ready(number):
                return number
        return len(self._course.staging)

    def prepare(self, number: int) -> None:
        """Does everything of a round that can fail. A round that arrived damaged is prepared again."""
        assert self._course is not None
        if number < len(self._course.staging):
            del self._course.staging[number:]
            self._background.submit(self.maps.drop)
        self._prepare(self._course, number)

    def _prepare(self, course: _Course, number: int) -> None:
        round, after = course.rounds[number], course.placements[number]
        self._parts.loader.prepare(round)
        layers = np.unique(round.moves[:, LAYER]).tolist()
        course.staging.append(self._background.submit(self.maps.stage, after, layers))

    def issue(self, number: int) -> None:
        """Starts the transfer of a round; only the call."""
        began = time.perf_counter()
        self._parts.loader.issue(number)
        self._parts.stats.waited_for_transfer(time.perf_counter() - began)

    def commit(self, number: int) -> Round:
        """Copies staging to slots and switches the maps; returns the round. An exception is not caught: a rank with a
        half-switched placement must not answer."""
        assert self._course is not None
        began = time.perf_counter()
        after = self._course.placements[number]
        self._parts.recorder.flush(self._work.placement)
        self._parts.loader.commit(number)
        self.maps.switch()
        self._in_force(after)
        self._parts.stats.committed(time.perf_counter() - began)
        return self._course.rounds[number]

    def finish(self) -> None:
        """Puts the plan's dispatch tables, if any, in force, after all rounds are committed."""
        tables = self._parts.adaptor.dispatch
        if tables is not None and self._course is not None and self._course.tables is not None:
            tables.put(self._course.tables)

    def forget(self) -> None:
        """Drops what is prepared. Nothing may be in flight."""
        if self._course is not None:
            for future in self._course.staging:
                future.cancel()
        self._background.submit(self.maps.drop)
        self._parts.loader.forget()
        self._broadcast = self._unpacking = self._course = None

    def settle(self) -> None:
        """Waits for all preparations in the background."""
        self._background.submit(lambda: None).result()

    def back_to(self, placement: Placement) -> None:
        """Switches the maps only; the caller is responsible for the weights."""
        self._parts.recorder.flush(self._work.placement)
        layers = list(range(placement.num_layers))
        self._background.submit(self.maps.stage, placement, layers).result()
        self.maps.switch()
        self._in_force(placement)

    def _in_force(self, placement: Placement) -> None:
        self._work.placement = placement
        self._parts.stats.placement_digest = placement.digest

    def close(self) -> None:
        self._background.shutdown(wait=False, cancel_futures=True)
