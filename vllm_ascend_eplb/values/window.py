# SPDX-License-Identifier: Apache-2.0
"""WindowLoad: the load of one window, and how it falls on the ranks under each placement that matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .placement import FloatArray, Int64Array, Placement, peak_to_average


@dataclass(frozen=True, eq=False)
class RankLoad:
    """The load of the ranks under one placement.

    Attributes:
        tokens: float64 [L, R], tokens per rank. Where ranks differ in speed: over the rank's relative speed, the tokens
            that a rank of average speed computes in the same time.
        par: float64 [L], the longest time of a rank over that of a perfect split; 1.0 for a layer without load.
    """

    tokens: FloatArray
    par: FloatArray

    @classmethod
    def of(cls, tokens: npt.ArrayLike, rank_speed: Sequence[float] | None = None) -> RankLoad:
        """Of the tokens [L, R] that the ranks compute, and their relative speeds [R]; None where these are equal."""
        loads = np.asarray(tokens, dtype=np.float64)
        if rank_speed is None:
            return cls(loads, peak_to_average(loads))
        speed = np.array(rank_speed)
        speed = speed / speed.mean()
        mean = loads.mean(axis=1)
        over: FloatArray = loads / speed
        return cls(over, np.divide(over.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0))


@dataclass(frozen=True, eq=False)
class WindowLoad:
    """The load of a window, as EP rank 0 knows it.

    Attributes:
        load: int64 [L, E], tokens per logical expert.
        in_force: load of the ranks under the placement in force.
        at_start: the same under the placement that the server started with.
        observed: the same under the last plan, if that plan was not carried out (mode observe).
        rank_speed: [R], relative speeds of the ranks; None where they are equal.
    """

    load: Int64Array
    in_force: RankLoad
    at_start: RankLoad
    observed: RankLoad | None = None
    rank_speed: Sequence[float] | None = None

    @classmethod
    def of(
        cls,
        load: Int64Array,
        placement: Placement,
        start: Placement,
        observed: Placement | None = None,
        *,
        tokens: FloatArray | None = None,
        rank_speed: Sequence[float] | None = None,
    ) -> WindowLoad:
        """Of a load [L, E].

        Args:
            load: tokens per logical expert.
            placement: in force.
            start: the placement that the server started with.
            observed: what the last plan would have led to.
            tokens: [L, R], tokens per rank where replicas do not share them evenly.
            rank_speed: [R], relative speeds.
        """

        def even(shared: Placement) -> RankLoad:
            return RankLoad.of(shared.rank_load(load), rank_speed)

        in_force = even(placement) if tokens is None else RankLoad.of(tokens, rank_speed)
        return cls(load, in_force, even(start), None if observed is None else even(observed), rank_speed)

    def under(self, placement: Placement) -> RankLoad:
        """The load of the ranks under ``placement`` with an even split over replicas."""
        return RankLoad.of(placement.rank_load(self.load), self.rank_speed)
