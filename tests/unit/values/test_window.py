# SPDX-License-Identifier: Apache-2.0
"""WindowLoad: all ways to compute a PAR give the same value."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.window import RankLoad, WindowLoad

RNG = np.random.default_rng(3)
LOAD = RNG.integers(0, 1000, (4, 8))
START = Placement.initial(4, 8, 4, 4)
OTHER = Placement(np.array([RNG.permutation(row) for row in START.physical_to_logical]), 8, 4)


@pytest.mark.parametrize("speed", [None, [1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5, 1.5]])
def test_par_equals_that_of_the_placement(speed: list[float] | None) -> None:
    """Plans predict PAR in the same way: the longest time of a rank over the time of a perfect split."""
    window = WindowLoad.of(LOAD, OTHER, START, START, rank_speed=speed)
    np.testing.assert_allclose(window.in_force.par, OTHER.par(LOAD, speed))
    for part in (window.at_start, window.observed, window.under(START)):
        assert part is not None
        np.testing.assert_allclose(part.par, START.par(LOAD, speed))


def test_speeds_make_even_tokens_uneven_in_time() -> None:
    """Negative control of the test above."""
    even = np.full((1, 4), 10.0)
    assert RankLoad.of(even).par.tolist() == [1.0]
    uneven = RankLoad.of(even, [2.0, 1.0, 0.5, 0.5])
    assert uneven.par.tolist() == [2.0]
    assert RankLoad.of(np.array([[20.0, 10.0, 5.0, 5.0]]), [2.0, 1.0, 0.5, 0.5]).par.tolist() == [1.0]


def test_counted_tokens_decide_the_par_in_force() -> None:
    """Replicas may share an expert's tokens unevenly; PAR in force then follows the counted tokens."""
    tokens = np.array([[40.0, 0.0, 0.0, 0.0]] * 4)
    window = WindowLoad.of(LOAD, START, START, tokens=tokens)
    assert window.in_force.par.tolist() == [4.0] * 4
    assert window.observed is None
    np.testing.assert_allclose(window.under(START).par, window.at_start.par)


def test_layer_without_load_has_par_one() -> None:
    nothing = WindowLoad.of(np.zeros((4, 8), dtype=np.int64), START, START, rank_speed=[2.0, 1.0, 0.5, 1.5])
    assert nothing.in_force.par.tolist() == [1.0] * 4
