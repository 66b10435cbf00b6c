# SPDX-License-Identifier: Apache-2.0
"""Dispatch shares are optimal for a placement, and tables realise them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loads import LoadGenerator
from benchmarks.planner import greedy_placement
from benchmarks.planner_optimum import least_peak
from tests.unit.planning.planner_inputs import instances
from vllm_ascend_eplb.planning import dispatch_shares, dispatch_tables, shared_rank_load
from vllm_ascend_eplb.values.placement import Placement, PlacementError, peak_to_average


def sums_by_expert(shares, slots, num_experts):
    total = np.zeros((len(slots), num_experts))
    layers, places = np.nonzero(slots >= 0)
    np.add.at(total, (layers, slots[layers, places]), shares[layers, places])
    return total


@settings(max_examples=300, deadline=None)
@given(instances())
def test_shares_are_shares_and_no_worse_than_an_even_split(instance):
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


def test_optimum_at_full_size():
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


def test_a_worked_example():
    """Expert 0 is on both ranks; rank 1 has expert 2's 30 tokens as well: 0's 50 tokens level 40 and 40."""
    shares = dispatch_shares([[50, 0, 30]], [[0, 1, 0, 2]], 2)
    np.testing.assert_allclose(shares, [[0.8, 1.0, 0.2, 1.0]])


def test_copies_on_one_rank_share_alike():
    shares = dispatch_shares([[60, 20, 0, 0]], [[0, 0, 1, 0, 2, 3]], 2)
    np.testing.assert_allclose(shares, [[1 / 6, 1 / 6, 1.0, 2 / 3, 1.0, 1.0]], atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from([1, 2, 7, 16, 64]))
def test_tables_realise_shares_within_one_entry_and_in_every_stretch(instance, entries):
    load, slots, num_ranks = instance
    num_experts = load.shape[1]
    shares = dispatch_shares(load, slots, num_ranks)
    tables = dispatch_tables(shares, slots, num_experts, entries)
    assert tables.shape == (len(slots), num_experts, entries)
    assert tables.dtype == np.int64
    layers = np.arange(len(slots))[:, None, None]
    assert (slots[layers, tables] == np.arange(num_experts)[None, :, None]).all()
    given_entries = np.zeros(slots.shape)
    for k in range(entries):
        np.add.at(given_entries, (np.arange(len(slots))[:, None], tables[..., k]), 1)
        # Every beginning of a table is close to the shares, too: a slot is ahead or behind by few entries only.
        replicas = Placement(slots, num_experts, num_ranks).replica_count.max()
        behind = np.abs(given_entries - shares * (k + 1)) * (slots >= 0)
        assert behind.max() <= 1 + 0.5 * min(replicas, k + 1) + (k + 1) / entries
    assert (np.abs(given_entries / entries - shares) * (slots >= 0)).max() < 1 / entries + 1e-9


def test_low_discrepancy_order():
    tables = dispatch_tables([[0.5, 0.25, 0.25, 1.0]], [[0, 0, 0, 1]], 2, 8)
    assert tables[0, 0].tolist()[:4].count(0) == 2
    assert tables[0, 0].tolist()[4:].count(0) == 2
    assert tables[0, 1].tolist() == [3] * 8
    again = dispatch_tables([[0.5, 0.25, 0.25, 1.0]], [[0, 0, 0, 1]], 2, 8)
    assert np.array_equal(tables, again)


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


@pytest.mark.parametrize(("entries", "words"), [(0, "entries"), (70000, "entries")])
def test_bad_tables_are_refused(entries, words):
    with pytest.raises(ValueError, match=words):
        dispatch_tables([[1.0, 1.0]], [[0, 1]], 2, entries)
