# SPDX-License-Identifier: Apache-2.0
"""Placements for another number of ranks: what they hold, what moves, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.planner_inputs import LOAD_KINDS, draw_load, draw_slots
from vllm_ascend_eplb.balancer.elastic import (
    GONE,
    ElasticError,
    ExpertsLostError,
    arrive,
    depart,
    missing_experts,
    recover,
    remap,
)
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.values.placement import EMPTY, Placement
from vllm_ascend_eplb.values.rounds import check_rounds
from vllm_ascend_eplb.values.topology import Topology


def draw_case(seed, kind, num_ranks, num_left, spare):
    """A load, a placement over ``num_ranks``, and a mapping to ``num_left`` (or more) ranks."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 30))
    size = -(-num_experts // min(num_ranks, num_left)) + spare
    load = draw_load(kind, rng, 2, num_experts)
    placement = Placement(draw_slots(rng, 2, num_experts, num_ranks * size), num_experts, num_ranks)
    new = rng.permutation(num_left).tolist()
    stay = sorted(rng.choice(num_ranks, min(num_ranks, num_left), replace=False).tolist())
    mapping = [GONE] * num_ranks
    for rank in stay:
        mapping[rank] = new.pop()
    return load, placement, mapping


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "kind": st.sampled_from(LOAD_KINDS),
    "spare": st.integers(0, 2),
}


@settings(max_examples=300, deadline=None)
@given(ranks=st.sampled_from([(2, 1), (4, 3), (4, 2), (8, 5)]), **CASES)
def test_ranks_that_leave_leave_nothing_behind(seed, kind, ranks, spare):
    load, placement, mapping = draw_case(seed, kind, *ranks, spare)
    made = depart(placement, mapping, load, Topology.even(ranks[1]))
    assert (made.after.physical_to_logical != EMPTY).all()
    # What the old ranks hold after the moves, under new numbers, is what the ranks that stay are to hold.
    np.testing.assert_array_equal(remap(made.last, mapping, ranks[1]), made.after.physical_to_logical)
    gone = np.repeat(np.array(mapping) == GONE, placement.slots_per_rank)
    np.testing.assert_array_equal(
        made.last.physical_to_logical[:, gone], placement.physical_to_logical[:, gone]
    )  # they stay sources to the end
    rounds = schedule_rounds(placement, made.moves, Topology.even(ranks[0]), 2)
    check_rounds(placement, rounds, 2, made.last)


@settings(max_examples=300, deadline=None)
@given(ranks=st.sampled_from([(1, 2), (3, 4), (4, 6), (2, 8)]), **CASES)
def test_ranks_that_join_are_filled(seed, kind, ranks, spare):
    load, placement, mapping = draw_case(seed, kind, *ranks, spare)
    joined, made = arrive(placement, mapping, load, Topology.even(ranks[1]))
    new = np.repeat([rank not in mapping for rank in range(ranks[1])], placement.slots_per_rank)
    assert (joined.physical_to_logical[:, new] == EMPTY).all()
    assert (joined.physical_to_logical[:, ~new] != EMPTY).all()
    assert (made.physical_to_logical != EMPTY).all()
    made.check(joined)
    rounds = schedule_rounds(joined, made.moves, Topology.even(ranks[1]), 2)
    check_rounds(joined, rounds, 2, Placement(made.physical_to_logical, placement.num_experts, ranks[1]))


def test_few_experts_move_and_the_load_is_balanced():
    rng = np.random.default_rng(1)
    load = rng.poisson(200 * np.exp(rng.normal(0, 0.7, (8, 64))))
    four = Placement.initial(8, 64, 4, 32)
    down = depart(four, [0, GONE, 1, 2], load, Topology.even(3)).after
    _, up = arrive(down, [0, 1, 2], load, Topology.even(4))
    assert four.par(load).mean() > 1.2
    assert down.par(load).mean() < 1.05
    assert up.par_after.mean() < 1.05
    assert np.count_nonzero(up.moves[:, 1] < 3 * 24) < 0.25 * 8 * 3 * 24  # ranks that stayed receive little


@settings(max_examples=300, deadline=None)
@given(lost=st.integers(1, 2), **CASES)
def test_recovery_serves_survivors_or_names_lost_experts(seed, kind, lost, spare):
    load, placement, mapping = draw_case(seed, kind, 4, 4 - lost, spare)
    held = [
        set(row[np.repeat(np.array(mapping) != GONE, placement.slots_per_rank)].tolist())
        for row in placement.physical_to_logical
    ]
    expected = [(layer, e) for layer, has in enumerate(held) for e in range(placement.num_experts) if e not in has]
    if expected:
        with pytest.raises(ExpertsLostError) as caught:
            recover(placement, mapping, load, Topology.even(4 - lost))
        assert caught.value.experts == expected
        return
    survived, made = recover(placement, mapping, load, Topology.even(4 - lost))
    made.check(survived)
    assert missing_experts(made.physical_to_logical, placement.num_experts) == []


def test_experts_that_are_gone_are_named():
    placement = Placement([[0, 1, 2, 0], [0, 1, 2, 1]], 3, 2)
    with pytest.raises(ExpertsLostError, match=r"2 experts are gone .*: layer 0 expert 1, layer 1 expert 0;"):
        recover(placement, [GONE, 0], np.ones((2, 3)), Topology((0,)))


@pytest.mark.parametrize(
    ("mapping", "num_ranks", "says"),
    [
        ([0, 1, 2], 3, "names 3 ranks; there are 4"),
        ([0, 0, 1, GONE], 3, "not all different"),
        ([0, 1, 2, 3], 3, "not in 0..2"),
        ([GONE] * 4, 2, "no rank stays"),
        ([0, 1, GONE, GONE], 2, "2 ranks of 3 slots hold 6 experts of a layer, which has 8; keep at least 3 ranks"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(mapping, num_ranks, says):
    with pytest.raises(ElasticError, match=says):
        depart(Placement.initial(2, 8, 4, 4), mapping, np.ones((2, 8)), Topology.even(num_ranks))


def test_ranks_do_not_join_while_others_leave():
    with pytest.raises(ElasticError, match="rank 1 leaves while others join"):
        arrive(Placement.initial(1, 4, 2), [0, GONE], np.ones((1, 4)), Topology.even(3))


def test_the_check_of_a_departure_can_fail():
    """Negative control: without its moves the ranks that stay lack experts."""
    placement = Placement.initial(2, 8, 4, 8)
    made = depart(placement, [0, GONE, 1, 2], np.ones((2, 8)), Topology.even(3))
    assert not np.array_equal(remap(placement, [0, GONE, 1, 2], 3), made.after.physical_to_logical)
    assert missing_experts(remap(Placement([[0, 1, 2, 3]], 4, 4), [0, GONE, 1, 2], 3), 4) == [(0, 1)]
