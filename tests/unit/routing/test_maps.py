# SPDX-License-Identifier: Apache-2.0
"""DispatchMaps and RoutingTables: the tensors that routers read follow the placements, in place."""

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.load.ops import entries_of
from vllm_ascend_eplb.routing.maps import ROUTING_ROWS, DispatchMaps, MapError, RoutingTables
from vllm_ascend_eplb.values.placement import Placement


def random_placement(seed: int) -> Placement:
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.r_[np.arange(8), random.integers(0, 8, 4)]) for _ in range(3)]
    return Placement(np.array(rows), 8, 4)


def shown(maps: DispatchMaps, placement: Placement) -> bool:
    table = placement.logical_to_physical(maps.width)
    return np.array_equal(maps.logical_to_physical.numpy(), table) and np.array_equal(
        maps.replica_count.numpy(), placement.replica_count
    )


def test_commits_follow_in_order_and_addresses_stay():
    maps = DispatchMaps(random_placement(0), "cpu", width=5)
    assert shown(maps, random_placement(0))
    addresses = maps.logical_to_physical.data_ptr(), maps.replica_count.data_ptr()
    for seed in (1, 2):
        maps.prepare(random_placement(seed), [0, 1, 2])
    for seed in (1, 2):
        assert not shown(maps, random_placement(seed))
        maps.commit()
        assert shown(maps, random_placement(seed))
    assert addresses == (maps.logical_to_physical.data_ptr(), maps.replica_count.data_ptr())


def test_only_the_named_layers_change():
    before, after = random_placement(0), random_placement(1)
    maps = DispatchMaps(before, "cpu", width=5)
    maps.prepare(after, [1])
    maps.commit()
    rows = before.physical_to_logical.copy()
    rows[1] = after.physical_to_logical[1]
    assert shown(maps, Placement(rows, 8, 4))


def test_forgotten_rows_are_not_committed():
    maps = DispatchMaps(random_placement(0), "cpu", width=5)
    maps.prepare(random_placement(1), [0, 1, 2])
    maps.forget_prepared()
    maps.prepare(random_placement(2), [0, 1, 2])
    maps.commit()
    assert shown(maps, random_placement(2))


def test_too_many_replicas_are_refused():
    many = Placement([[0, 1, 0, 0, 0, 0]], 2, 2)
    with pytest.raises(MapError, match="5 replicas; the maps hold 3"):
        DispatchMaps(many, "cpu", width=3)
    maps = DispatchMaps(Placement([[0, 1, 0, 1, 0, 1]], 2, 2), "cpu", width=3)
    with pytest.raises(MapError, match="5 replicas; the maps hold 3"):
        maps.prepare(many, [0])


@pytest.mark.parametrize("offset", [0, 1, 319])
def test_routing_tables_choose_the_slots_of_the_op(offset: int):
    for seed in range(5):
        placement = random_placement(seed)
        tables, maps = RoutingTables(placement, "cpu", offset), DispatchMaps(placement, "cpu", width=8)
        rows, experts = torch.arange(ROUTING_ROWS)[:, None], torch.arange(placement.num_experts)[None]
        for layer in range(placement.num_layers):
            count = maps.replica_count[layer]
            entries = (entries_of(rows, experts, count) + offset) % count
            assert torch.equal(tables.table[layer].long(), maps.logical_to_physical[layer].T.gather(0, entries))


def test_routing_tables_spread_an_expert_over_its_replicas():
    """Replicas get equal shares, also in a small batch."""
    placement = Placement(np.array([[0, 1, 2, 0, 1, 0]], dtype=np.int32), 3, 2)
    table = RoutingTables(placement, "cpu").table[0]
    for rows, most in ((ROUTING_ROWS, 0.01), (32, 0.08)):
        for expert, replicas in enumerate(placement.replica_count[0]):
            shares = np.unique(table[:rows, expert].numpy(), return_counts=True)[1] / rows
            assert len(shares) == replicas
            assert np.abs(shares - 1 / replicas).max() < most


def test_routing_tables_follow_commits_in_place():
    first, second, third = (random_placement(seed) for seed in range(3))
    tables = RoutingTables(first, "cpu")
    address = tables.table.data_ptr()
    for placement in (second, third):
        tables.prepare(placement, list(range(placement.num_layers)))
    assert torch.equal(tables.table, RoutingTables(first, "cpu").table)
    for placement in (second, third):
        tables.commit()
        assert torch.equal(tables.table, RoutingTables(placement, "cpu").table)
    tables.prepare(first, [0])
    tables.forget_prepared()
    tables.prepare(first, [1])
    tables.commit()
    assert torch.equal(tables.table[0], RoutingTables(third, "cpu").table[0])
    assert torch.equal(tables.table[1], RoutingTables(first, "cpu").table[1])
    assert tables.table.data_ptr() == address


@pytest.mark.parametrize("replicas", range(1, 17))
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_ranks_with_few_tokens_take_all_replicas(replicas: int, tokens: int):
    """With as many ranks as replicas and few tokens per rank, all replicas get equally many tokens."""
    placement = Placement(np.r_[np.zeros(replicas, dtype=np.int32), np.arange(1, 17)][None], 17, 1)
    taken = [RoutingTables(placement, "cpu", rank).table[0, :tokens, 0].numpy() for rank in range(replicas)]
    assert (np.bincount(np.concatenate(taken), minlength=replicas)[:replicas] == tokens).all()
    agreed = [RoutingTables(placement, "cpu").table[0, :tokens, 0].numpy() for _ in range(replicas)]
    if tokens == 1 < replicas:  # the negative control: one table for all
        assert np.bincount(np.concatenate(agreed)).max() == replicas
