# SPDX-License-Identifier: Apache-2.0
"""PlanJudge: the threshold for the next plan rises after a plan that did not pay, and falls after one that paid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.values.test_step_cost import FLAT_THEN_STEEP
from tests.windows import expert_window
from vllm_ascend_eplb.planning.payoff import MoveRates
from vllm_ascend_eplb.planning.threshold import LEAST_RAISED, MOST_RAISED, PlanJudge
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.traffic import Traffic

BEFORE = Placement([[0, 1, 2, 3]], num_experts=4, num_ranks=2)
AFTER = Placement([[0, 3, 2, 1]], num_experts=4, num_ranks=2)
SKEWED = np.array([[9, 9, 1, 1]])  # 1.8 under BEFORE, 1.0 under AFTER


def test_plan_must_gain_the_threshold() -> None:
    judge = PlanJudge(0.1)
    assert judge.refuses(1.5, 1.34) == ""
    assert judge.threshold == 0.1
    assert judge.refuses(1.5, 1.4) == "PAR 1.500 to 1.400 gains less than 10.0%"


def test_threshold_doubles_or_halves_with_the_last_gain() -> None:
    judge = PlanJudge(0.0)
    judge.carried_out(BEFORE, 0.8)
    said = judge.window_ended(
        expert_window([[1, 1, 1, 1]], AFTER), AFTER
    )  # the load is even now, so the plan brought nothing
    assert said == "; the last plan brought PAR 1.000 instead of 1.000, too little, so that a plan must now gain 0.5%"
    assert judge.threshold == LEAST_RAISED
    judge.carried_out(BEFORE, 0.8)
    assert (
        judge.window_ended(expert_window(SKEWED, AFTER), AFTER) == "; the last plan brought PAR 1.000 instead of 1.800"
    )
    assert judge.threshold == LEAST_RAISED / 2
    assert judge.window_ended(expert_window(SKEWED, AFTER), AFTER) == ""  # judged once


def test_last_plan_is_judged_by_rank_speeds() -> None:
    judge = PlanJudge(0.0)
    judge.carried_out(AFTER, 0.5)
    assert "brought PAR 1.000 instead of" in judge.window_ended(expert_window(SKEWED, BEFORE, [1.8, 0.2]), BEFORE)


def test_forgotten_cycle_is_not_judged() -> None:
    judge = PlanJudge(0.0)
    judge.carried_out(BEFORE, 0.8)
    judge.forget()
    assert judge.window_ended(expert_window(SKEWED, AFTER), AFTER) == ""


@given(
    st.floats(0, 0.5),
    st.lists(st.tuples(st.floats(1, 4), st.floats(1, 4), st.booleans(), st.booleans()), max_size=60),
)
def test_threshold_stays_bounded_and_refused_plans_return(
    least: float, plans: list[tuple[float, float, bool, bool]]
) -> None:
    judge = PlanJudge(least)
    for before, after, carried, paid in plans:
        refused = judge.refuses(before, after)
        if carried and not refused:
            judge.carried_out(BEFORE, before - after)
            judge.window_ended(expert_window(SKEWED if paid else [[1, 1, 1, 1]], AFTER), AFTER)
        assert least <= judge.threshold <= max(least, MOST_RAISED)
    for _ in range(200):
        if judge.threshold <= least + 1e-8:
            break
        judge.refuses(1.0, 1.0)
    assert judge.threshold == pytest.approx(least, abs=1e-8)


DECODE, PREFILL = Traffic(np.ones(1), np.full(1, 8.0)), Traffic(np.ones(1), np.full(1, 4096.0))


def measured(min_gain: float, traffic: Traffic) -> PlanJudge:
    """A judge with measured times (flat up to 64 tokens per rank) and a rate of 1 kB/s between ranks."""
    judge = PlanJudge(min_gain)
    judge.learn(FLAT_THEN_STEEP, MoveRates(receive=1e3), 8)
    judge.traffic, judge.steps = traffic, 600
    return judge


def test_measured_time_decides_on_a_plan() -> None:
    """A plan that nearly halves PAR is refused if steps decode few tokens, and accepted if they prefill many."""
    decode = measured(0.01, DECODE)
    said = decode.refuses([2.0, 1.5], [1.0, 1.0])
    assert said == (
        "PAR 1.750 to 1.000 saves 0.000 ms of 0.600 ms of MoE time per step (0.0%) and costs 0.0 ms once, over 600 "
        "steps, net less than 1.0%"
    )
    assert measured(0.01, PREFILL).refuses([2.0, 1.5], [1.0, 1.0]) == ""
    assert PlanJudge(0.01).refuses([2.0, 1.5], [1.0, 1.0]) == ""


def test_moves_that_cost_more_than_they_save_are_refused() -> None:
    judge = measured(0.0, PREFILL)
    saved = 600 * judge.weigh([2.0], [1.0]).saved_ms
    assert judge.refuses([2.0], [1.0], [0, 0.9 * saved]) == ""  # 1 kB/s is a byte in a millisecond
    assert "costs" in judge.refuses([2.0], [1.0], [0, 1.1 * saved])
    assert PlanJudge(0.0).refuses([2.0], [1.0], [0, 1e30]) == ""  # without a measurement, moves cost nothing


def test_gain_within_the_noise_of_measurements_is_refused() -> None:
    for noise, said in ((0.0, ""), (0.3, "no more than measurements differ by (30.0%)")):
        judge = measured(0.0, PREFILL)
        judge.learn(replace(FLAT_THEN_STEEP, noise=noise), MoveRates(), 8)
        assert judge.refuses([1.3], [1.0]).endswith(said)
        assert judge.refuses([2.0], [1.0]) == ""


def test_layers_are_left_alone_where_it_saves_no_time() -> None:
    assert measured(0.01, DECODE).target_par(1.02) > 2.0
    assert measured(0.01, PREFILL).target_par(1.02) == 1.02
    assert PlanJudge(0.01).target_par(1.02) == 1.02


@given(st.floats(0.001, 0.3), st.floats(0.0, 4000.0))
def test_plan_to_the_target_saves_what_can_be_measured(noise: float, tokens: float) -> None:
    """A target as far from balance as measurements differ would make plans that save less than that and are refused."""
    judge = measured(0.0, Traffic([1.0], [tokens]))
    judge.learn(replace(FLAT_THEN_STEEP, noise=noise), MoveRates(), 8)
    judge.window_ended(expert_window(SKEWED, BEFORE), BEFORE)  # PAR 1.8
    target = judge.target_par(1.0)
    available, saved = (judge.weigh([1.8], [par]).saved_fraction for par in (1.0, min(target, 1.8)))
    if available > 1.5 * noise:
        assert judge.refuses([1.8], [target]) == ""
        assert saved > 0.85 * available
    elif available < noise / (1.0 + noise):
        assert target >= 1.8 * 0.99


def test_last_plan_is_judged_by_time() -> None:
    """PAR fell by 0.8, but the traffic is decoding now and no time was saved, so the threshold rises."""
    judge = measured(0.0, PREFILL)
    judge.carried_out(BEFORE, 0.4)
    said = judge.window_ended(expert_window(SKEWED, AFTER), AFTER, DECODE)
    assert "PAR 1.000 instead of 1.800 and saved 0.0% of MoE time, too little" in said
    assert judge.threshold == LEAST_RAISED
    judge.carried_out(BEFORE, 0.4)
    assert "too little" not in judge.window_ended(expert_window(SKEWED, AFTER), AFTER, PREFILL)
