# SPDX-License-Identifier: Apache-2.0
"""Ranks come together in a store, or stop waiting together; a rank that was never called leaves no trace."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from vllm_ascend_eplb.agreement.meeting import MeetingPoint

SECONDS = 0.02


def points(num_ranks: int, store: Any = None) -> list[MeetingPoint]:
    """The ranks' ends of one meeting point."""
    store = HashStore() if store is None else store
    return [MeetingPoint(store, rank, num_ranks) for rank in range(num_ranks)]


def meet(called: list[MeetingPoint], delays: list[float], seconds: float = SECONDS) -> list[bool]:
    """What each called rank learns, if it is called after its delay in seconds."""

    def one(point: MeetingPoint, delay: float) -> bool:
        time.sleep(delay)
        return point.meet(seconds)

    with ThreadPoolExecutor(len(called)) as threads:
        return list(threads.map(one, called, delays))


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ranks_that_are_all_called_come_together(num_ranks: int) -> None:
    ranks = points(num_ranks)
    for number in range(20):
        assert meet(ranks, [0.001 * (number * rank % 3) for rank in range(num_ranks)], 60) == [True] * num_ranks


def test_rank_that_is_never_called_lets_the_others_stop() -> None:
    """Afterwards all come together, however many calls the rank missed."""
    ranks = points(3)
    for missed in range(4):
        for _ in range(missed):
            assert meet(ranks[:2], [0, 0]) == [False, False]
        assert meet(ranks, [0, 0, 0], 60) == [True] * 3


def test_rank_that_comes_too_late_stops_as_well() -> None:
    ranks = points(2)
    assert meet(ranks, [0, 10 * SECONDS]) == [False, False]


def test_ranks_that_race_with_the_deadline_agree() -> None:
    """The last rank comes at about the deadline of the first. Both outcomes occur, and always for both ranks."""
    luck, outcomes = random.Random(0), []
    for _ in range(150):
        outcomes.append(tuple(meet(points(2), [0, luck.uniform(0.002, 0.01)], 0.004)))
    assert set(outcomes) == {(True, True), (False, False)}


class Recorded:
    """A store that notes the names of its keys."""

    def __init__(self) -> None:
        self._store, self.keys, self._lock = HashStore(), set(), threading.Lock()

    def __getattr__(self, verb: str) -> Any:
        def called(key: Any, *rest: Any) -> Any:
            if verb in ("add", "compare_set"):
                with self._lock:
                    self.keys.add(key)
            elif verb == "delete_key":
                self.keys.discard(key)
            return getattr(self._store, verb)(key, *rest)

        return called


def test_store_keeps_the_last_meeting_only() -> None:
    """A trainer may update weights for weeks."""
    store = Recorded()
    ranks = points(2, store=store)
    meet(ranks[:1], [0])
    for _ in range(30):
        meet(ranks, [0, 0], 60)
    assert len(store.keys) == 2
