# SPDX-License-Identifier: Apache-2.0
"""Gather: the load of a window and the figures of all ranks, summed on EP rank 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..agreement.channel import Bulk
from ..observe.stats import RANK_FIGURES
from ..values.placement import Int64Array
from ..values.traffic import BUCKETS
from .work import Parts, Work


@dataclass(frozen=True)
class Gathered:
    """The load and figures of a window, on EP rank 0.

    Attributes:
        load: int64 [T, L, E], tokens per logical expert, summed over the ranks.
        histogram: int64 [2, BUCKETS], steps by tokens per rank, summed over the ranks that count.
        figures: int64 [R, len(RANK_FIGURES)], the figures of each rank.
        steps: steps of the window that served requests on EP rank 0.
    """

    load: Int64Array
    histogram: Int64Array
    figures: Int64Array
    steps: int


class Gather:
    """Sums load, steps by tokens per rank, and figures over the ranks, in one collective per cycle. Each rank writes
    its figures into its own row."""

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts, self._work = parts, work
        self._shape: tuple[int, ...] = ()
        self._steps = 0
        self._summand: Int64Array | None = None  # from the snapshot until it is posted
        self._sum: Bulk[Int64Array | None] | None = None  # from then to the end of the cycle

    def begin(self) -> None:
        """Ends the window: begins to copy the counts to the host."""
        recorder = self._parts.recorder
        recorder.discard_snapshot()  # a dropped cycle may have left one
        recorder.snapshot(self._work.placement)

    def taken(self) -> bool:
        """Whether this rank has its summand. All ranks take theirs before they agree to post the sum: if a rank raised
        later, the sum would lack its part."""
        parts = self._parts
        if self._summand is None and parts.recorder.snapshot_ready() and not parts.control.bulk_busy:
            load, histogram = parts.recorder.take(), parts.recorder.histogram()
            figures = np.zeros((parts.adaptor.topology.num_ranks, len(RANK_FIGURES)), dtype=np.int64)
            figures[parts.rank] = parts.stats.figures()
            self._summand = np.concatenate([load.ravel(), histogram.ravel(), figures.ravel()])
            self._shape, self._steps = load.shape, int(histogram[0].sum())
        return self._summand is not None

    def post(self) -> None:
        """Posts the sum; all ranks at the same step."""
        assert self._summand is not None
        self._sum, self._summand = self._parts.control.reduce_load(self._summand), None

    def summed(self) -> bool:
        return self._sum is not None and self._sum.done()

    def result(self) -> Gathered | None:
        """The sum; None on all ranks except EP rank 0."""
        total = self._sum.result() if self._sum is not None else None
        if total is None:
            return None
        size = int(np.prod(self._shape))
        load, histogram, figures = np.split(total, [size, size + 2 * BUCKETS])
        return Gathered(
            load.reshape(self._shape),
            histogram.reshape(2, BUCKETS),
            figures.reshape(-1, len(RANK_FIGURES)),
            self._steps,
        )

    def forget(self) -> None:
        self._summand = self._sum = None
