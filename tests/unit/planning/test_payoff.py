# SPDX-License-Identifier: Apache-2.0
"""Payoff: a plan is carried out only if it saves more time than it costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.values.test_step_cost import FLAT_THEN_STEEP, step_costs
from vllm_ascend_eplb import Placement, plan
from vllm_ascend_eplb.planning.payoff import MoveRates, Payoff, weigh
from vllm_ascend_eplb.planning.threshold import PlanJudge
from vllm_ascend_eplb.values.step_cost import StepCost
from vllm_ascend_eplb.values.traffic import Traffic
from vllm_ascend_eplb.values.window import WindowLoad

PREFILL, DECODE = Traffic([1], [4096]), Traffic([1], [8])


def test_same_plan_pays_in_prefill_and_not_in_decode() -> None:
    def of(traffic: Traffic) -> Payoff:
        return weigh(FLAT_THEN_STEEP, traffic, [2.0, 1.8], [1.1, 1.0], 8, move_ms=50.0, steps=600)

    assert of(PREFILL).pays(0.01)
    assert of(PREFILL).saved_fraction > 0.4
    assert of(DECODE).saved_ms == 0.0
    assert not of(DECODE).pays(0.0)


def test_cost_of_the_moves_decides() -> None:
    payoff = weigh(FLAT_THEN_STEEP, PREFILL, [2.0], [1.0], 8, move_ms=0.0, steps=10)
    total = 10 * payoff.saved_ms
    for move_ms, pays in ((0.0, True), (0.98 * total, True), (1.01 * total, False)):
        again = weigh(FLAT_THEN_STEEP, PREFILL, [2.0], [1.0], 8, move_ms=move_ms, steps=10)
        assert again.pays(0.0) is pays
        assert np.isclose(again.net_ms, total - move_ms)


def test_min_gain_is_a_fraction_of_moe_time() -> None:
    payoff = Payoff(moe_ms=10.0, saved_ms=0.2, cost_ms=10.0, steps=100)
    assert np.isclose(payoff.saved_fraction, 0.02)
    assert np.isclose(payoff.net_fraction, 0.01)
    assert payoff.pays(0.0099)
    assert not payoff.pays(0.0101)


def test_par_decides_without_a_measurement() -> None:
    """Moves are then free, because their cost is unknown."""
    payoff = weigh(StepCost.proportional(), PREFILL, [1.5, 1.5], [1.4, 1.5], 8, move_ms=1e9, steps=1)
    assert payoff.cost_ms == 0.0
    assert np.isclose(payoff.net_fraction, 0.1 / 3.0)


def test_no_step_or_no_gain_never_pays() -> None:
    assert not weigh(FLAT_THEN_STEEP, Traffic([0], [1]), [9.0], [1.0], 8, move_ms=0, steps=9).pays(0.0)
    assert not weigh(FLAT_THEN_STEEP, PREFILL, [1.5], [1.5], 8, move_ms=0, steps=9).pays(0.0)
    assert not weigh(FLAT_THEN_STEEP, PREFILL, [1.5], [1.6], 8, move_ms=0, steps=9).pays(0.0)


def test_rates_take_the_busiest_rank_or_say_unknown() -> None:
    assert np.isclose(MoveRates(receive=1e9, commit=4e9).milliseconds([1e6, 8e6, 0]), 8.0 + 2.0)
    assert np.isclose(MoveRates(receive=1e9).milliseconds([8e6]), 8.0)
    assert MoveRates().milliseconds([8e6]) == 0.0
    assert MoveRates(1e9, 1e9).milliseconds([]) == 0.0


@settings(deadline=None)
@given(step_costs(), st.data())
def test_balancing_costs_at_most_one_plan_over_no_moves(cost: StepCost, data: st.DataObject) -> None:
    """The modelled time is at most the time without any move, plus the cost of one plan.

    Costs and traffic are random, plans are real. In every window the planner answers, the decision is made, and the
    traffic continues for the expected number of steps. Serving ends within the last window, at a random step.
    """
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layers, experts, ranks = 2, 8, 4
    load = np.round(random.lognormal(sigma=1.0, size=(layers, experts)) * 1000).astype(np.int64) + 1
    still = placement = Placement.initial(layers, experts, ranks, data.draw(st.sampled_from([0, 4])))
    slots = placement.slots_per_rank
    rates = MoveRates(data.draw(st.floats(1e3, 1e9)))
    judge = PlanJudge(data.draw(st.floats(0, 0.05)))
    judge.learn(cost, rates, slots)
    time, time_still, dearest = 0.0, 0.0, 0.0
    windows = data.draw(st.integers(1, 5))
    for window in range(windows):
        traffic = Traffic(random.integers(0, 50, 4), random.uniform(0, 4000, 4))
        steps = data.draw(st.integers(1, 2000))
        made = plan(load, placement, ranks, max_moves=data.draw(st.integers(0, 8)), target_par=1.0)
        received = np.bincount(made.moves[:, 1] // slots, minlength=ranks) * 1e5
        judge.traffic, judge.steps = traffic, steps
        if made.num_moves and not judge.refuses(made.par_before, made.par_after, received):
            move_ms = rates.milliseconds(received)
            judge.carried_out(placement, judge.weigh(made.par_before, made.par_after, received).saved_fraction)
            placement = Placement(made.physical_to_logical, experts, ranks)
            time += move_ms
            dearest = max(dearest, move_ms)
        lasted = steps if window < windows - 1 else data.draw(st.integers(0, steps))
        judge.window_ended(WindowLoad.of(load, placement, still), placement)
        for name in ("time", "time_still"):
            in_force = placement if name == "time" else still
            spent = lasted * float(traffic.layer_ms(cost, in_force.par(load), slots).sum())
            time, time_still = (time + spent, time_still) if name == "time" else (time, time_still + spent)
    assert time <= (time_still + dearest) * (1 + 1e-9)


def test_decision_without_the_cost_of_moves_would_be_worse() -> None:
    """Negative control of the property above: this plan lowers PAR, but its moves cost more than it saves."""
    cost, rates = FLAT_THEN_STEEP, MoveRates(1e4)
    payoff = weigh(cost, DECODE, [2.0], [1.0], 8, move_ms=rates.milliseconds([1e6]), steps=100)
    assert payoff.net_ms < 0
    assert not payoff.pays(0.0)


@pytest.mark.parametrize("steps", [0, 1])
def test_zero_times_have_no_fraction(steps: int) -> None:
    assert Payoff(0.0, 0.0, 0.0, steps).net_fraction == 0.0
    assert Payoff(0.0, 0.0, 0.0, steps).saved_fraction == 0.0
