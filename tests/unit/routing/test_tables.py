# SPDX-License-Identifier: Apache-2.0
"""Dispatch tables: rows hold shares to within one entry, the op keeps shares for few tokens, commits are in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.planning.shares import ShareError, entry_counts
from vllm_ascend_eplb.routing.maps import ROUTING_ROWS
from vllm_ascend_eplb.routing.weighted import DispatchTables, RoutingDispatchTables, TableError, even_shares, table_rows
from vllm_ascend_eplb.values.placement import EMPTY, Placement


def skewed(rng: np.random.Generator, layers: int, experts: int, ranks: int, slots: int) -> tuple[Placement, np.ndarray]:
    """A placement whose hot experts have several replicas, and uneven shares."""
    spare = ranks * slots - experts
    rows = [
        rng.permutation(np.r_[np.arange(experts), rng.integers(0, max(1, experts // 8), spare)]) for _ in range(layers)
    ]
    placement = Placement(np.array(rows), experts, ranks)
    weight = rng.random(placement.physical_to_logical.shape) + 0.2
    return placement, normalised(placement, weight)


def normalised(placement: Placement, weight: np.ndarray) -> np.ndarray:
    shares = np.zeros_like(weight)
    for layer, row in enumerate(placement.physical_to_logical):
        for expert in range(placement.num_experts):
            replicas = row == expert
            shares[layer, replicas] = weight[layer, replicas] / weight[layer, replicas].sum()
    return shares


@given(st.integers(0, 2**32 - 1), st.integers(16, 64))
def test_rows_realise_shares_to_within_one_entry(seed: int, entries: int) -> None:
    placement, shares = skewed(np.random.default_rng(seed), 2, 10, 4, 4)
    rows = table_rows(placement, shares, entries)
    assert rows.shape == (2, 10, entries)
    for layer in range(2):
        for slot in range(placement.num_slots):
            expert = placement.physical_to_logical[layer, slot]
            assert (rows[layer, expert] == slot).sum() == pytest.approx(shares[layer, slot] * entries, abs=1)
        for expert in range(10):
            assert (placement.physical_to_logical[layer, rows[layer, expert]] == expert).all()
            assert (np.diff(rows[layer, expert]) >= 0).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_routing_tables_take_the_same_entries_as_the_op(rank: int) -> None:
    """The entries by token are equal at the start, after a commit and after new shares."""
    placement, shares = skewed(np.random.default_rng(2), 3, 20, 4, 7)
    new_placement, other_shares = skewed(np.random.default_rng(3), 3, 20, 4, 7)
    both = [kind(placement, "cpu", 32, rank=rank, num_ranks=4) for kind in (DispatchTables, RoutingDispatchTables)]
    tokens, experts = torch.arange(ROUTING_ROWS)[:, None], torch.arange(20)[None]
    address = both[1].table.data_ptr()

    def equal() -> bool:
        entries = ops.entries_of(tokens, experts, torch.full((1, 1), 32))
        wanted = torch.stack([layer.T.gather(0, entries) for layer in both[0].table])
        return both[1].table.dtype == torch.int32 and torch.equal(both[1].table.long(), wanted)

    assert equal()
    for tables in both:
        tables.put(tables.rows_of(placement, shares))
    assert equal()
    for tables in both:
        tables.prepare(new_placement, [0, 2], other_shares[[0, 2]])
        tables.commit()
    assert equal()
    np.testing.assert_array_equal(both[0].shares, both[1].shares)
    assert both[1].table.data_ptr() == address


@pytest.mark.parametrize(("tokens", "most"), [(1, 0.06), (4, 0.05), (16, 0.02), (64, 0.015)])
def test_shares_hold_however_few_tokens_a_rank_has(tokens: int, most: float) -> None:
    ranks = 8
    placement, shares = skewed(np.random.default_rng(1), 1, 64, ranks, 9)

    def mean_error(turned: bool) -> float:
        counts = torch.zeros(placement.num_slots, dtype=torch.int64)
        for rank in range(ranks):
            tables = DispatchTables(placement, "cpu", 32, rank=rank if turned else 0, num_ranks=ranks)
            tables.prepare(placement, [0], shares)
            tables.commit()
            ids = torch.arange(64).repeat(tokens, 1)
            ops.map_and_record(ids, tables.table[0], tables.count[0], counts, torch.ones(1, dtype=torch.bool))
        realised = normalised(placement, counts.numpy()[None] + 1e-9)
        replicated = shares < 1  # an expert with one replica cannot be wrong
        return float(np.abs(realised - shares)[replicated].mean())

    assert mean_error(turned=True) < most
    if tokens == 1:
        assert mean_error(turned=False) > 0.2  # the control: without the turn all ranks take the same replica


def test_without_a_turn_the_tables_of_all_ranks_are_equal() -> None:
    placement, shares = skewed(np.random.default_rng(2), 3, 12, 4, 4)
    tables = [DispatchTables(placement, "cpu", 16) for _ in range(2)]
    for table in tables:
        table.prepare(placement, [0, 1, 2], shares)
        table.commit()
    assert torch.equal(tables[0].table, tables[1].table)


def test_commit_changes_its_layers_in_place() -> None:
    rng = np.random.default_rng(3)
    placement, shares = skewed(rng, 3, 12, 4, 4)
    after, _ = skewed(rng, 3, 12, 4, 4)
    tables = DispatchTables(placement, "cpu", 16)
    address, before = tables.table.data_ptr(), tables.table.clone()
    tables.prepare(placement, [1], shares[[1]])
    tables.prepare(after, [2])
    tables.commit()
    assert torch.equal(tables.table[[0, 2]], before[[0, 2]])
    assert np.array_equal(tables.table[1].numpy(), table_rows(placement, shares, 16)[1])
    tables.commit()
    assert np.array_equal(tables.table[2].numpy(), table_rows(after, even_shares(after), 16)[2])
    assert tables.table.data_ptr() == address
    tables.prepare(after, [0])
    tables.forget_prepared()
    with pytest.raises(IndexError):
        tables.commit()


def test_rows_of_all_layers_are_put_in_force_at_once() -> None:
    placement, shares = skewed(np.random.default_rng(4), 2, 12, 4, 4)
    tables = DispatchTables(placement, "cpu", 32)
    even = tables.table.clone()
    rows = tables.rows_of(placement, entry_counts(placement, shares, 32))
    tables.prepare(placement, [0])
    tables.commit()
    assert torch.equal(tables.table, even)
    tables.put(rows)
    assert np.array_equal(tables.table.numpy(), table_rows(placement, shares, 32))
    assert np.abs(tables.shares - shares).max() <= 1 / 32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_step_routes_by_shares_put_between_replays() -> None:
    rng = np.random.default_rng(5)
    placement, shares = skewed(rng, 2, 12, 4, 4)
    tables = DispatchTables(placement, "cuda", 32)
    experts = torch.arange(12, device="cuda").repeat(1024)[torch.randperm(12288, device="cuda")].view(-1, 4)
    counts = torch.zeros((2, placement.num_slots), dtype=torch.int64, device="cuda")
    recording = torch.ones(1, dtype=torch.bool, device="cuda")

    def step() -> None:
        for layer in range(2):
            ops.map_and_record(experts, tables.table[layer], tables.count[layer], counts[layer], recording)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    even = even_shares(placement)
    for number, wanted in enumerate([even, shares, even, shares]):
        if number:
            tables.put(tables.rows_of(placement, wanted))  # the host does not wait before the replays
        counts.zero_()
        for _ in range(3):
            graph.replay()
        assert np.array_equal(tables.table.cpu().numpy(), table_rows(placement, wanted, 32))
        realised = counts.cpu().numpy() / (3 * 1024)
        assert np.abs(realised - wanted).max() < 0.08
    assert np.abs(shares - even).max() > 0.1


def test_an_empty_slot_takes_nothing() -> None:
    placement = Placement([[0, 1, EMPTY, 0]], 2, 2)
    assert even_shares(placement).tolist() == [[0.5, 1.0, 0.0, 0.5]]
    assert set(table_rows(placement, even_shares(placement), 16)[0, 0].tolist()) == {0, 3}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([[1.0, 1.0]], "shape"),
        ([[1.0, -1.0, 1.0, 1.0]], "not negative"),
        ([[1.0, float("nan"), 1.0, 1.0]], "finite"),
        ([[0.0, 1.0, 1.0, 0.0]], "expert 0 are all 0"),
    ],
)
def test_bad_shares_are_refused(shares: list[list[float]], message: str) -> None:
    placement = Placement([[0, 1, 2, 0]], 3, 2)
    with pytest.raises(ShareError, match=message):
        table_rows(placement, shares, 16)
    with pytest.raises(TableError, match=r"16\.\.64"):
        DispatchTables(placement, "cpu", 8)
