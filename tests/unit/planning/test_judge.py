# SPDX-License-Identifier: Apache-2.0
"""PlanJudge: plans that do not pay make the next one harder, plans that do make it easier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.planning.threshold import LEAST_RAISED, MOST_RAISED, PlanJudge
from vllm_ascend_eplb.values.placement import Placement

BEFORE = Placement([[0, 1, 2, 3]], num_experts=4, num_ranks=2)
AFTER = Placement([[0, 3, 2, 1]], num_experts=4, num_ranks=2)
SKEWED = np.array([[9, 9, 1, 1]])  # 1.8 under BEFORE, 1.0 under AFTER


def test_a_plan_must_gain_the_threshold() -> None:
    judge = PlanJudge(0.1)
    assert judge.refuses(1.5, 1.34) == ""
    assert judge.threshold == 0.1
    assert judge.refuses(1.5, 1.4) == "PAR 1.500 to 1.400 gains less than 10.0%"


def test_a_plan_that_paid_halves_the_threshold_and_one_that_did_not_doubles_it() -> None:
    judge = PlanJudge(0.0)
    judge.carried_out(BEFORE, 0.8)
    said = judge.window_ended(np.array([[1, 1, 1, 1]]), AFTER)  # by now the load is even, and the plan brought nothing
    assert said == "; the last plan brought PAR 1.000 instead of 1.000, too little, so that a plan must now gain 0.5%"
    assert judge.threshold == LEAST_RAISED
    judge.carried_out(BEFORE, 0.8)
    assert judge.window_ended(SKEWED, AFTER) == "; the last plan brought PAR 1.000 instead of 1.800"
    assert judge.threshold == LEAST_RAISED / 2
    assert judge.window_ended(SKEWED, AFTER) == ""  # judged once


def test_speeds_of_ranks_are_heeded() -> None:
    judge = PlanJudge(0.0, rank_speed=[1.8, 0.2])
    judge.carried_out(AFTER, 0.5)
    assert "brought PAR 1.000 instead of" in judge.window_ended(SKEWED, BEFORE)


def test_what_was_forgotten_is_not_judged() -> None:
    judge = PlanJudge(0.0)
    judge.carried_out(BEFORE, 0.8)
    judge.forget()
    assert judge.window_ended(SKEWED, AFTER) == ""


@given(
    st.floats(0, 0.5),
    st.lists(st.tuples(st.floats(1, 4), st.floats(1, 4), st.booleans(), st.booleans()), max_size=60),
)
def test_the_threshold_stays_between_its_bounds_and_what_is_refused_is_tried_again(
    least: float, plans: list[tuple[float, float, bool, bool]]
) -> None:
    judge = PlanJudge(least)
    for before, after, carried, paid in plans:
        refused = judge.refuses(before, after)
        if carried and not refused:
            judge.carried_out(BEFORE, before - after)
            judge.window_ended(SKEWED if paid else np.array([[1, 1, 1, 1]]), AFTER)
        assert least <= judge.threshold <= max(least, MOST_RAISED)
    for _ in range(200):
        judge.refuses(1.0, 1.0)
    assert judge.threshold == pytest.approx(least, abs=1e-8)
