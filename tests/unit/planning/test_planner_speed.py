# SPDX-License-Identifier: Apache-2.0
"""Ranks of unequal speed get load in proportion to their speed; equal speeds give the same plans as no speeds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.planner_inputs import after_every_group, instances
from vllm_ascend_eplb.planning import PlanInputError, plan
from vllm_ascend_eplb.values.placement import Placement


def big():
    rng = np.random.default_rng(4)
    return rng.poisson(300 * np.exp(rng.normal(0, 0.7, (12, 64)))), Placement.initial(12, 64, 8, 32)


@pytest.mark.parametrize("speed", [[1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5], [3, 2, 2, 2, 2, 2, 2, 1]])
def test_rank_gets_load_by_its_speed(speed):
    load, start = big()
    made = plan(load, start, 8, rank_speed=speed)
    made.check(start)
    after = Placement(made.physical_to_logical, 64, 8)
    np.testing.assert_allclose(made.par_after, after.par(load, speed))
    np.testing.assert_allclose(made.par_before, start.par(load, speed))
    assert made.par_after.mean() < 1.03
    share = after.rank_load(load).sum(axis=0) / load.sum()
    np.testing.assert_allclose(share, np.array(speed) / np.sum(speed), rtol=0.05)
    # Negative control: a plan without speeds gives the slow ranks too much load.
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


def test_no_prefix_of_groups_makes_a_layer_slower():
    """After every group, no layer has a higher PAR of load over speed. Most targets cannot be reached here."""
    groups_checked = []

    @settings(max_examples=400, deadline=None)
    @given(
        instance=instances(),
        seed=st.integers(0, 2**32 - 1),
        spread=st.sampled_from([0.1, 1.0, 3.0]),
        target=st.sampled_from([1.0, 1.02, 1.5]),
        effort=st.sampled_from(["fast", "thorough"]),
    )
    def check(instance, seed, spread, target, effort):
        load, slots, num_ranks = instance
        speed = np.exp(np.random.default_rng(seed).uniform(-spread, spread, num_ranks))
        placement = Placement(slots, load.shape[1], num_ranks)
        before = placement.par(load, speed)
        made = plan(load, slots, num_ranks, rank_speed=speed, target_par=target, effort=effort, rounds=8)
        for after in after_every_group(made, placement):
            assert (after.par(load, speed) <= before * (1 + 1e-5)).all()
            groups_checked.append(after)

    check()
    assert len(groups_checked) > 400  # a planner that moves nothing would pass all checks


@pytest.mark.parametrize("seed", range(8))
def test_unequal_ranks_reach_the_optimum(seed):
    """4 experts on 3 ranks, so that speeds matter more than loads. The optimum is found by trying every placement."""
    rng = np.random.default_rng(seed)
    load, speed = rng.integers(1, 50, (1, 4)), rng.uniform(0.3, 1.0, 3)
    slots = np.array([[0, 1, 2, 3, 0, 1]], dtype=np.int32)
    pairs = list(itertools.permutations(range(4), 2))
    every = [np.ravel(ranks)[None] for ranks in itertools.product(pairs, repeat=3) if len(set(np.ravel(ranks))) == 4]
    best = min(float(Placement(slots_tried, 4, 3).par(load, speed)[0]) for slots_tried in every)
    made = plan(load, slots, 3, rank_speed=speed, target_par=1.0, effort="thorough", rounds=100)
    assert made.par_after[0] <= best + 1e-5


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
