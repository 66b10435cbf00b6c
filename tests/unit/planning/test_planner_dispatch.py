# SPDX-License-Identifier: Apache-2.0
"""Dispatch shares are optimal for a placement, and tables keep them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loads import LoadGenerator
from benchmarks.placements import greedy_placement
from benchmarks.planner_optimum import least_peak
from tests.unit.planning.planner_inputs import instances
from vllm_ascend_eplb.planning import dispatch_shares, shared_rank_load
from vllm_ascend_eplb.planning.shares import entry_counts
from vllm_ascend_eplb.values.placement import Placement, PlacementError, peak_to_average


def sums_by_expert(shares, slots, num_experts):
    total = np.zeros((len(slots), num_experts))
    layers, places = np.nonzero(slots >= 0)
    np.add.at(total, (layers, slots[layers, places]), shares[layers, places])
    return total


@settings(max_examples=300, deadline=None)
@given(instances())
def test_shares_add_up_and_are_no_worse_than_an_even_split(instance):
    load, slots, num_ranks = instance
    shares = dispatch_shares(load, slots, num_ranks)
    assert (shares >= 0).all()
    assert (shares[slots < 0] == 0).all()
    np.testing.assert_allclose(sums_by_expert(shares, slots, load.shape[1]), 1.0, rtol=1e-9)
    even = Placement(slots, load.shape[1], num_ranks).rank_load(load).max(axis=1)
    assert (shared_rank_load(load, slots, shares, num_ranks).max(axis=1) <= even * (1 + 1e-9)).all()


@settings(max_examples=60, deadline=None)
@given(instances())
def test_shares_reach_the_optimum_of_the_linear_program(instance):
    pytest.importorskip("scipy")
    load, slots, num_ranks = instance
    peaks = shared_rank_load(load, slots, dispatch_shares(load, slots, num_ranks), num_ranks).max(axis=1)
    for layer in range(len(load)):
        if load[layer].sum() > 0:
            best = least_peak(load[layer].astype(float), slots[layer], num_ranks)
            assert peaks[layer] <= best * 1.0011
            assert peaks[layer] >= best * (1 - 1e-6)


def test_shares_reach_the_optimum_at_full_size():
    pytest.importorskip("scipy")
    for num_ranks, num_slots in ((32, 288), (64, 320)):
        generator = LoadGenerator(4, 256, seed=2)
        slots = greedy_placement(generator.window().astype(float), num_slots, num_ranks)
        generator.drift("medium")
        load = generator.window()
        even = Placement(slots, 256, num_ranks).par(load)
        loads = shared_rank_load(load, slots, dispatch_shares(load, slots, num_ranks), num_ranks)
        assert peak_to_average(loads).mean() < 1 + 0.8 * (even.mean() - 1)
        for layer in range(4):
            assert loads[layer].max() <= least_peak(load[layer].astype(float), slots[layer], num_ranks) * 1.0011


def test_shares_of_a_worked_example():
    """Expert 0 (50 tokens) is on both ranks. Rank 1 also has expert 2 (30 tokens), so expert 0 is split into 40 and 10,
    and both ranks have 40 tokens."""
    shares = dispatch_shares([[50, 0, 30]], [[0, 1, 0, 2]], 2)
    np.testing.assert_allclose(shares, [[0.8, 1.0, 0.2, 1.0]])


def test_copies_on_one_rank_get_equal_shares():
    shares = dispatch_shares([[60, 20, 0, 0]], [[0, 0, 1, 0, 2, 3]], 2)
    np.testing.assert_allclose(shares, [[1 / 6, 1 / 6, 1.0, 2 / 3, 1.0, 1.0]], atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from([1, 2, 7, 16, 64]))
def test_table_entries_keep_shares_to_within_one_entry(instance, entries):
    load, slots, num_ranks = instance
    placement = Placement(slots, load.shape[1], num_ranks)
    shares = dispatch_shares(load, slots, num_ranks)
    counts = entry_counts(placement, shares, entries)
    assert (np.abs(counts / entries - shares) * (slots >= 0)).max() < 1 / entries + 1e-9
    for layer, row in enumerate(counts):
        held = slots[layer] >= 0
        assert (np.bincount(slots[layer][held], row[held], minlength=load.shape[1]) == entries).all()


@pytest.mark.parametrize(
    ("load", "slots", "ranks", "words"),
    [
        ([[1, -1]], [[0, 1]], 2, "not negative"),
        ([[1, float("nan")]], [[0, 1]], 2, "finite"),
        ([[1, 1]], [[0, 0]], 2, "expert 1 has no copy"),
        ([[1, 1]], [[0, 1, 1]], 2, "evenly"),
        ([1, 1], [[0, 1]], 2, r"\[layers, experts\]"),
        ([[1, 1], [1, 1]], [[0, 1]], 2, "2 layers"),
    ],
)
def test_bad_input_is_refused(load, slots, ranks, words):
    with pytest.raises((PlacementError, ValueError), match=words):
        dispatch_shares(load, slots, ranks)
