# SPDX-License-Identifier: Apache-2.0
"""Ranks of unequal speed get load by their speed; ranks of equal speed get exactly what they got before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.planner_inputs import instances
from vllm_ascend_eplb import _planner
from vllm_ascend_eplb.planning import PlanInputError, plan
from vllm_ascend_eplb.values.placement import Placement


def big():
    rng = np.random.default_rng(4)
    return rng.poisson(300 * np.exp(rng.normal(0, 0.7, (12, 64)))), Placement.initial(12, 64, 8, 32)


@pytest.mark.parametrize("speed", [[1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5], [3, 2, 2, 2, 2, 2, 2, 1]])
def test_a_rank_gets_load_by_its_speed(speed):
    load, start = big()
    made = plan(load, start, 8, rank_speed=speed)
    made.check(start)
    after = Placement(made.physical_to_logical, 64, 8)
    np.testing.assert_allclose(made.par_after, after.par(load, speed))
    np.testing.assert_allclose(made.par_before, start.par(load, speed))
    assert made.par_after.mean() < 1.03
    share = after.rank_load(load).sum(axis=0) / load.sum()
    np.testing.assert_allclose(share, np.array(speed) / np.sum(speed), rtol=0.05)
    # Negative control: a plan that knows no speeds leaves the slow ranks far behind.
    blind = Placement(plan(load, start, 8).physical_to_logical, 64, 8)
    assert blind.par(load, speed).mean() > 1.3


@settings(max_examples=200, deadline=None)
@given(instance=instances(), scale=st.floats(0.01, 100))
def test_equal_speeds_change_nothing(instance, scale):
    load, slots, num_ranks = instance
    plain = plan(load, slots, num_ranks)
    equal = plan(load, slots, num_ranks, rank_speed=np.full(num_ranks, scale))
    for name in ("physical_to_logical", "moves", "par_before", "par_after"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(equal, name))


def test_equal_speeds_are_equal_down_to_the_core():
    load, start = big()
    arguments = {
        "num_ranks": 8, "num_nodes": 1, "thorough": True, "rounds": 8, "seconds": 0.0, "seed": 1, "threads": 1,
        "max_moves": -1, "max_moves_per_rank": -1, "far_cost": 1.0, "stay_near": False, "least_gain": 0.0,
    }  # fmt: skip
    given = load.astype(np.float64), start.physical_to_logical, np.zeros((0, 0)), np.full(12, 1.02)
    for ours, theirs in zip(
        _planner.plan_incremental(*given, **arguments),
        _planner.plan_incremental(*given, **arguments, speed=np.ones(8)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=300, deadline=None)
@given(instance=instances(), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.1, 1.0, 3.0]))
def test_no_layer_gets_slower(instance, seed, spread):
    load, slots, num_ranks = instance
    speed = np.exp(np.random.default_rng(seed).uniform(-spread, spread, num_ranks))
    start = Placement(slots, load.shape[1], num_ranks)
    made = plan(load, slots, num_ranks, rank_speed=speed)
    made.check(start)
    after = Placement(made.physical_to_logical, load.shape[1], num_ranks)
    assert (after.par(load, speed) <= start.par(load, speed) + 1e-9).all()
    np.testing.assert_allclose(made.par_after, after.par(load, speed))


@pytest.mark.parametrize(
    ("speed", "policy", "says"),
    [
        ([1, 1], "incremental", "one number > 0 for each of 8 ranks"),
        ([1] * 7 + [0], "incremental", "one number > 0"),
        ([1] * 7 + [float("nan")], "incremental", "one number > 0"),
        ([1] * 7 + [1e4], "incremental", "factor of 1000"),
        ([1] * 7 + [2], "default", "the policy 'default' knows no rank_speed"),
    ],
)
def test_bad_speeds_are_named(speed, policy, says):
    load, start = big()
    with pytest.raises(PlanInputError, match=says):
        plan(load, start, 8, policy=policy, rank_speed=speed)
