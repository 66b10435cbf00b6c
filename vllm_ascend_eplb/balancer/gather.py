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
    """What EP rank 0 knows of a window.

    Attributes:
        load: int64 [T, L, E], tokens per logical expert, summed over the ranks.
        histogram: int64 [2, BUCKETS], steps by tokens per rank, summed over the ranks that count.
        figures: int64 [R, len(RANK_FIGURES)], what each rank measured of itself.
        steps: of the window that served requests on EP rank 0.
    """

    load: Int64Array
    histogram: Int64Array
    figures: Int64Array
    steps: int


class Gather:
    """One sum over the ranks in each cycle: the load, the steps by tokens per rank, and the figures, which each rank
    writes into its own row, so that all travel in the same collective."""

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts, self._work = parts, work
        self._shape: tuple[int, ...] = ()
        self._steps = 0
        self._summand: Int64Array | None = None  # from when it is taken until it is posted
        self._sum: Bulk[Int64Array | None] | None = None  # from when it is posted to the end of the cycle

    def begin(self) -> None:
        """Ends the window: begins to copy the counts to the host."""
        recorder = self._parts.recorder
        recorder.discard_snapshot()  # that of a cycle which was dropped before it was taken
        recorder.snapshot(self._work.placement)

    def taken(self) -> bool:
        """Whether this rank's summand is there. All ranks take theirs before they agree to post the sum: a rank that
        threw later would leave the others' sum without its part."""
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
        """What was summed; None on all ranks but EP rank 0."""
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
