# SPDX-License-Identifier: Apache-2.0
"""PlanJudge: whether a plan is worth its moves, and whether the last one was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..values.placement import Placement

PAYS_FROM = 0.25
"""Part of the promised gain that a plan must bring in the next window, or the threshold rises."""


LEAST_RAISED, MOST_RAISED = 0.005, 0.2
"""Between these the threshold is raised, as fractions of PAR."""


EASES = 0.9
"""What a plan that was refused makes of the threshold, so that what was too little is tried again."""


class PlanJudge:
    """Weighs plans on EP rank 0. A plan must gain more than a threshold; plans that did not pay raise it for the next.

    Args:
        min_gain: the least threshold, as a fraction of PAR.
        rank_speed: [R], relative speeds of the ranks; None where they are equal.
    """

    def __init__(self, min_gain: float, rank_speed: Sequence[float] | None = None) -> None:
        self._least = self.threshold = min_gain
        self._rank_speed = rank_speed
        self._before: Placement | None = None
        self._promised = 0.0

    def refuses(self, before: float, after: float) -> str:
        """Why a plan that brings PAR from ``before`` to ``after`` is not carried out; empty if it is."""
        threshold = self.threshold
        if before - after >= threshold * before:
            return ""
        self.threshold = max(self._least, EASES * threshold)
        return f"PAR {before:.3f} to {after:.3f} gains less than {threshold:.1%}"

    def carried_out(self, before: Placement, promised: float) -> None:
        """A plan was carried out: the placement before it, and how much less PAR it promised."""
        self._before, self._promised = before, promised

    def forget(self) -> None:
        """What was carried out last is not to be judged."""
        self._before = None

    def window_ended(self, load: npt.NDArray[np.int64], placement: Placement) -> str:
        """Judges the last plan by the window [L, E] that followed it; what the log says of it, empty if there is none.

        Load has gone on changing, so the plan is judged by what this same window would have been without it.
        """
        last, self._before = self._before, None
        if last is None:
            return ""
        par, without = (float(each.par(load, self._rank_speed).mean()) for each in (placement, last))
        said = f"; the last plan brought PAR {par:.3f} instead of {without:.3f}"
        if without - par > PAYS_FROM * self._promised:
            self.threshold = max(self._least, self.threshold / 2)
            return said
        self.threshold = min(max(self._least, MOST_RAISED), max(LEAST_RAISED, self.threshold * 2))
        return f"{said}, too little, so that a plan must now gain {self.threshold:.1%}"
