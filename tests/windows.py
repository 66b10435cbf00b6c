# SPDX-License-Identifier: Apache-2.0
"""Load windows for tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.window import RankLoad, WindowLoad


def rank_window(in_force: npt.ArrayLike, at_start: npt.ArrayLike, observed: npt.ArrayLike | None = None) -> WindowLoad:
    """A window from the tokens [L, R] that the ranks compute under each placement, as if of a single expert."""
    return WindowLoad(
        np.array([[round(float(np.sum(in_force)))]]),
        RankLoad.of(in_force),
        RankLoad.of(at_start),
        None if observed is None else RankLoad.of(observed),
    )


def expert_window(load: npt.ArrayLike, placement: Placement, rank_speed: list[float] | None = None) -> WindowLoad:
    """A window from the tokens [L, E] of the experts, with ``placement`` in force from the start."""
    return WindowLoad.of(np.asarray(load), placement, placement, rank_speed=rank_speed)
