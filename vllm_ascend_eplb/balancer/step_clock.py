# SPDX-License-Identifier: Apache-2.0
"""StepClock: how long steps take while nothing moves, so that what balancing saved is measured, not only predicted."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

from ..values.traffic import bucket_of

KEPT_STEPS = 512
"""Times of a bucket that a window keeps, the newest."""

LEAST_STEPS = 8
"""Steps of a bucket from which its median counts."""


@dataclass(frozen=True)
class StepTimes:
    """Steps of a window, with the start placement and as they were. Only kinds of steps that were met with both.

    Attributes:
        steps: that were timed.
        ms, ms_start: of an average one of them, and of one as long as it was with the start placement.
    """

    steps: int
    ms: float
    ms_start: float

    @property
    def saved_seconds(self) -> float:
        """Over these steps; negative where they took longer."""
        return 1e-3 * (self.ms_start - self.ms) * self.steps


class StepClock:
    """Belongs to the step thread of EP rank 0.

    The time of a step is that until the next one begins, as the host sees it; steps of about as many tokens are
    compared by their medians, so that pauses between requests do not count. All of a step is in it, so also what else
    has changed since, such as longer contexts.
    """

    def __init__(self) -> None:
        self._since, self._bucket = 0.0, -1
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_STEPS))
        self._steps: dict[int, int] = defaultdict(int)
        self._at_start: dict[int, float] = {}

    def step(self, now: float, tokens_per_rank: float, *, counts: bool) -> None:
        """A step begins ``now``, in seconds; ``counts`` if it serves requests and no cycle is under way."""
        if counts and self._bucket >= 0:
            self._times[self._bucket].append(1e3 * (now - self._since))
            self._steps[self._bucket] += 1
        self._since, self._bucket = now, bucket_of(tokens_per_rank) if counts else -1

    def window_ended(self, *, at_start: bool) -> StepTimes | None:
        """The steps of the window; None where no kind of them was met with the start placement before.

        Args:
            at_start: whether the start placement was in force.
        """
        medians = {
            bucket: statistics.median(times) for bucket, times in self._times.items() if len(times) >= LEAST_STEPS
        }
        if at_start:
            self._at_start |= medians
        steps = {bucket: self._steps[bucket] for bucket in medians if bucket in self._at_start}
        self._times.clear()
        self._steps.clear()
        total = sum(steps.values())
        if not total:
            return None
        ms, ms_start = (
            sum(times[bucket] * count for bucket, count in steps.items()) / total for times in (medians, self._at_start)
        )
        return StepTimes(total, ms, ms_start)
