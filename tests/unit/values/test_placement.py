# SPDX-License-Identifier: Apache-2.0
"""Placement and Plan: constructors check their arguments, and derived values equal a plain re-computation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb import Placement, PlacementError, Plan, PlanError
from vllm_ascend_eplb.values.placement import peak_to_average


@st.composite
def placements(draw, empty=False):
    layers, experts, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    per_rank = draw(st.integers(-(-experts // ranks), -(-experts // ranks) + 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(layers):
        spare = random.integers(-1 if empty else 0, experts, per_rank * ranks - experts)
        rows.append(random.permutation(np.concatenate([np.arange(experts), spare])))
    return Placement(np.array(rows), experts, ranks)


@given(placements(empty=True))
def test_derived_values_agree_with_the_slots(p):
    table, maps = p.logical_to_physical(), [p.expert_map(rank) for rank in range(p.num_ranks)]
    duplicates = 0
    for layer in range(p.num_layers):
        row = p.physical_to_logical[layer].tolist()
        for expert in range(p.num_experts):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            assert p.replica_count[layer, expert] == len(slots) >= 1
            assert [slot for slot in table[layer, expert].tolist() if slot >= 0] == slots
            for rank in range(p.num_ranks):
                mine = [slot % p.slots_per_rank for slot in slots if slot // p.slots_per_rank == rank]
                duplicates += max(0, len(mine) - 1)
                assert maps[rank][layer, expert] == (mine[0] if mine else -1)
    assert p.num_duplicates == duplicates


@given(placements(empty=True), st.integers(0, 2**32))
def test_no_load_is_lost_between_experts_and_ranks(p, seed):
    load = np.random.default_rng(seed).integers(0, 1000, (p.num_layers, p.num_experts))
    np.testing.assert_allclose(p.rank_load(load).sum(axis=1), load.sum(axis=1))
    assert (p.par(load) >= 1 - 1e-12).all()


@given(placements(), placements())
def test_equality_and_digest_go_together(a, b):
    assert (a == b) == (a.digest == b.digest)
    twin = Placement(a.physical_to_logical.astype(np.int64), a.num_experts, a.num_ranks)
    assert twin == a
    assert twin.digest == a.digest
    assert hash(twin) == hash(a)


@given(placements(), st.integers(0, 2**32))
@settings(max_examples=200)
def test_plan_between_two_placements_leads_to_the_second(start, seed):
    random = np.random.default_rng(seed)
    target = random.permuted(start.physical_to_logical, axis=1)
    plan = Plan.between(start, target, np.ones((start.num_layers, start.num_experts)))
    plan.check(start)
    assert start.with_moves(plan.moves) == Placement(target, start.num_experts, start.num_ranks)


def test_placement_is_read_only():
    p = Placement.initial(2, 4, 2, 2)
    with pytest.raises(ValueError, match="read-only"):
        p.physical_to_logical[0, 0] = 3


def test_the_digest_is_the_same_everywhere():
    assert Placement.initial(2, 8, 4, 4).digest == 0x2B8197A0D3FA5C34


@pytest.mark.parametrize(
    ("slots", "experts", "ranks", "message"),
    [
        ([[0, 1, 2]], 3, 2, "3 slots per layer cannot be shared evenly by 2 ranks"),
        ([[0, 1, 1, 0]], 3, 2, "layer 0: expert 2 has no copy"),
        ([[0, 1, 2, 3]], 3, 2, r"layer 0, slot 3 \(rank 1\) holds expert 3; allowed are 0..2"),
        ([[0, 1], [0, -2]], 2, 2, "layer 1, slot 1"),
        ([0, 1], 2, 2, "integer array"),
        ([[0.0, 1.0]], 2, 2, "integer array"),
        ([[]], 2, 2, "non-empty"),
        ([[0, 1]], 0, 2, "at least 1 expert"),
    ],
)
def test_bad_placement_is_refused_with_a_reason(slots, experts, ranks, message):
    with pytest.raises(PlacementError, match=message):
        Placement(slots, experts, ranks)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([[0, 2, 0, 0]], "drops the last copy of expert 2"),
        ([[0, 9, 2, 0]], "slot 9; allowed are 0..5"),
        ([[0, 4, 7, 0]], "expert 7; allowed are 0..3"),
        ([[0, 4, 2, 0], [0, 4, 3, 0]], "writes one slot twice"),
        ([[0, 4, 2, 1], [0, 5, 3, 0]], "not ordered by group"),
        ([[0, 4, 2, 0]], "do not lead to the plan's placement"),
    ],
)
def test_bad_plan_is_refused_with_a_reason(moves, message):
    start = Placement([[0, 1, 2, 3, 0, 1]], 4, 2)
    plan = Plan(start.physical_to_logical, np.array(moves, dtype=np.int32), np.ones(1), np.ones(1))
    with pytest.raises(PlanError, match=message):
        plan.check(start)


def test_peak_to_average_of_nothing_is_one():
    assert peak_to_average(np.zeros((2, 4))).tolist() == [1.0, 1.0]
