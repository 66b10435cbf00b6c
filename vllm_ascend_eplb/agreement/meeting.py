# SPDX-License-Identifier: Apache-2.0
"""MeetingPoint: all ranks of a server come together between two forwards, or none of them goes on."""

from __future__ import annotations

import time
from typing import Any

MEETING_SECONDS = 20.0
"""Longest wait for the other ranks."""


LOOK_SECONDS = 0.002


GO, STOP = b"go", b"stop"


class MeetingPoint:
    """Brings all ranks together in calls that an engine makes between two forwards, such as ``reload_weights``.

    What follows blocks in collectives, so that every rank must be there. Ranks of one engine always are. Data-parallel
    engines take a call at their own times. An engine that has taken it makes no forward until the call returns, and an
    engine that has not may be in a forward whose collectives wait for the first engine. Neither would ever go on. So
    the wait has a deadline, and its end must be the same for all: a collective with a deadline would break the group,
    and a rank that gave up alone would leave the others in collectives.

    The ranks therefore meet in the key-value store by which their process groups were made. The last rank to arrive
    decides to go, a rank whose deadline passes decides to stop, and the store takes the first decision only
    (compare-and-set). A rank that was never called does not matter: its forwards go on once the others have stopped,
    and it skips the meetings that it missed.

    vLLM's way to have all engines there is ``pause_generation``: they agree in their wave protocol (an all-reduce after
    a step) to stop after the same step, and make no dummy batches until ``resume_generation``. vLLM pauses them by
    itself before sleep. Engines without requests are at the same step as well, because a wave ends for all of them.

    Args:
        store: a ``torch.distributed.Store`` of all ranks.
        rank, num_ranks: this rank, and the number of ranks.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self._next = self._oldest = 0

    def meet(self, seconds: float) -> bool:
        """Wait for all ranks.

        Args:
            seconds: longest wait.

        Returns:
            True if all ranks are here; the same on all ranks that wait.
        """
        while self._decided():  # meetings of the others, who have stopped waiting for this rank
            self._next += 1
        arrived = self._store.add(f"eplb/{self._next}/arrived", 1)
        if arrived == self._num_ranks:
            self._decide(GO)
        end = time.monotonic() + seconds
        while not self._decided():
            if time.monotonic() > end:
                self._decide(STOP)
            time.sleep(LOOK_SECONDS)
        together = self._store.get(self._decision()) == GO
        if together and self._rank == 0:  # no rank will look at earlier meetings again
            for number in range(self._oldest, self._next):
                self._store.delete_key(f"eplb/{number}/arrived")
                self._store.delete_key(f"eplb/{number}/decision")
            self._oldest = self._next
        self._next += 1
        return bool(together)

    def _decision(self) -> str:
        return f"eplb/{self._next}/decision"

    def _decided(self) -> bool:
        return bool(self._store.check([self._decision()]))

    def _decide(self, decision: bytes) -> None:
        self._store.compare_set(self._decision(), "", decision.decode())
