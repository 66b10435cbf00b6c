# SPDX-License-Identifier: Apache-2.0
"""The functions of DeepSeek's EPLB: values equal to vLLM's, and results in DeepSeek's form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.planner_inputs import LOAD_KINDS, draw_load, draw_slots
from vllm_ascend_eplb.planning.deepseek import (
    balanced_packing,
    rebalance_experts,
    rebalance_experts_hierarchical,
    replicate_experts,
)
from vllm_ascend_eplb.planning.planner import PlanInputError
from vllm_ascend_eplb.values.placement import Placement

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("vllm.distributed.eplb.policy.default").DefaultEplbPolicy

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(LOAD_KINDS)


@settings(max_examples=1000, deadline=None)
@given(seed=SEEDS, kind=KINDS, packs=st.integers(1, 12), per_pack=st.integers(1, 12), dtype=st.sampled_from("fdlQ"))
def test_packing_is_equal_to_vllm(seed, kind, packs, per_pack, dtype):
    weight = draw_load(kind, np.random.default_rng(seed), 3, packs * per_pack).astype(dtype)
    expected = theirs.balanced_packing(weight if dtype != "Q" else weight.astype(np.int64), packs)
    for made, their in zip(balanced_packing(weight, packs), expected, strict=True):
        assert made.dtype == their.dtype == np.int64
        np.testing.assert_array_equal(made, their)


@settings(max_examples=1000, deadline=None)
@given(seed=SEEDS, kind=KINDS, experts=st.integers(1, 60), redundant=st.integers(0, 40), dtype=st.sampled_from("fdl"))
def test_replication_is_equal_to_vllm(seed, kind, experts, redundant, dtype):
    weight = draw_load(kind, np.random.default_rng(seed), 3, experts).astype(dtype)
    phy2log, rank, count = replicate_experts(weight, experts + redundant)
    their_phy2log, their_count = theirs.replicate_experts(weight, experts + redundant)
    np.testing.assert_array_equal(phy2log, their_phy2log)
    np.testing.assert_array_equal(count, their_count)
    assert phy2log.dtype == rank.dtype == count.dtype == np.int64
    for row, ranks_of_copies in zip(phy2log.tolist(), rank.tolist(), strict=True):
        assert ranks_of_copies == [row[:i].count(expert) for i, expert in enumerate(row)]


@settings(max_examples=1000, deadline=None)
@given(
    seed=SEEDS,
    kind=KINDS,
    ranks=st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 2), (8, 4), (16, 4), (32, 1)]),
    num_groups=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.integers(1, 24),
    spare=st.integers(0, 3),
    old=st.sampled_from(["none", "same", "empty slots", "more slots"]),
)
def test_rebalancing_is_equal_to_vllm(seed, kind, ranks, num_groups, group_size, spare, old):
    num_ranks, num_nodes = ranks
    num_experts = num_groups * group_size
    num_slots = (-(-num_experts // num_ranks) + spare) * num_ranks
    rng = np.random.default_rng(seed)
    load = torch.from_numpy(draw_load(kind, rng, 3, num_experts))
    more = num_slots // num_ranks if old == "more slots" else 0
    before = torch.from_numpy(draw_slots(rng, 3, num_experts, num_slots + more, old == "empty slots")).long()
    arguments = (load, num_slots, num_groups, num_nodes, num_ranks, None if old == "none" else before)
    slots, by_expert, count = rebalance_experts(*arguments)
    assert torch.equal(slots, theirs.rebalance_experts(*arguments))
    assert {slots.dtype, by_expert.dtype, count.dtype} == {torch.int64}
    check_maps(slots.numpy(), by_expert.numpy(), count.numpy(), num_experts)
    if num_groups % num_nodes == 0:
        given = load.float().numpy()
        plain, rank, plain_count = rebalance_experts_hierarchical(given, num_slots, num_groups, num_nodes, num_ranks)
        expected = theirs.rebalance_experts_hierarchical(given, num_slots, num_groups, num_nodes, num_ranks)
        np.testing.assert_array_equal(plain, expected)
        np.testing.assert_array_equal(plain_count, count)
        key = plain * num_slots + rank  # every expert has the copies 0..n-1 once
        assert all(len(np.unique(row)) == num_slots for row in key)
        assert (rank < np.take_along_axis(plain_count, plain, axis=1)).all()


def check_maps(slots, by_expert, count, num_experts):
    """Assert that logical_to_physical_map and expert_count agree with physical_to_logical_map."""
    ours = Placement(slots, num_experts, 1)
    np.testing.assert_array_equal(count, ours.replica_count)
    assert by_expert.shape == (*count.shape, count.max())
    used = np.arange(count.max()) < count[..., None]
    np.testing.assert_array_equal(by_expert >= 0, used)
    in_order = np.sort(np.where(used, by_expert, slots.shape[1]), axis=2)
    np.testing.assert_array_equal(np.where(used, in_order, -1), ours.logical_to_physical())


def test_example_of_deepseeks_readme_gives_its_result():
    weight = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    slots, _, count = rebalance_experts(weight, 16, 4, 2, 8)
    assert slots.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert count.sum(axis=1).tolist() == [16, 16]


def test_numbers_of_copies_survive_slots_that_are_kept():
    """With an old placement slots are kept, but every GPU has the same copies, by number, as without it."""
    rng = np.random.default_rng(3)
    load = rng.integers(1, 1000, (4, 24))
    _, plain, _ = rebalance_experts(load, 32, 4, 2, 4)
    _, kept, _ = rebalance_experts(load, 32, 4, 2, 4, draw_slots(rng, 4, 24, 32))
    np.testing.assert_array_equal(np.where(plain < 0, -1, plain // 8), np.where(kept < 0, -1, kept // 8))
    assert not np.array_equal(plain, kept)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: balanced_packing([[1.0, 2.0, 3.0]], 2), "num_packs is 2; it must divide the 3 items"),
        (lambda: balanced_packing([1.0, 2.0], 2), "shape"),
        (lambda: replicate_experts([[1.0, 2.0]], 1), "num_phy is 1"),
        (lambda: replicate_experts([[1.0, -2.0]], 2), "negative"),
        (lambda: replicate_experts([[1.0, float("nan")]], 2), "negative"),
        (lambda: rebalance_experts([[1, 2, 3, 4]], 6, 1, 1, 4), "num_gpus is 4; it must divide the 6"),
        (lambda: rebalance_experts([[1, 2, 3, 4]], 2, 1, 1, 2), "num_physical_experts is 2"),
        (lambda: rebalance_experts([[1, 2, 3, 4]], 4, 3, 1, 2), "num_groups is 3"),
        (lambda: rebalance_experts([[1, 2, 3, 4]], 4, 1, 0, 2), "num_nodes is 0"),
        (lambda: rebalance_experts([[1, 2, 3, 4]], 4, 1, 1, 2, [[0, 1, 2]]), "old_global_expert_indices"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(PlanInputError, match=says):
        call()


def test_comparison_with_vllm_can_fail():
    rng = np.random.default_rng(0)
    load = torch.from_numpy(rng.integers(0, 1000, (3, 32)))
    assert not torch.equal(rebalance_experts(load, 40, 1, 1, 8)[0], theirs.rebalance_experts(load.flip(1), 40, 1, 1, 8))
