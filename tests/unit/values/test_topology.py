# SPDX-License-Identifier: Apache-2.0
"""Topology: which ranks form nodes, and plans that respect nodes."""

import numpy as np
import pytest

from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.planning.request import PlanRequest, Rebalance, plan_request
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.topology import Topology


@pytest.mark.parametrize(
    ("nodes", "blocks"),
    [
        ((0,), 1),
        ((0, 0, 0), 1),
        ((0, 0, 1, 1), 2),
        ((5, 5, 0, 0, 3, 3), 3),
        ((0, 1, 2), 3),
        ((0, 0, 1), 1),  # does not divide
        ((0, 0, 0, 1), 1),  # unequal
        ((0, 1, 0, 1), 1),  # not consecutive
        ((0, 1, 1, 0), 1),
        ((0, 0, 1, 1, 0, 0), 1),
    ],
)
def test_nodes_count_if_they_are_equal_blocks_of_ranks(nodes, blocks):
    assert Topology(nodes).num_blocks == blocks


def request(nodes, num_groups):
    rng = np.random.default_rng(2)
    num_slots = 2 * 3 * len(nodes)
    return PlanRequest(
        number=1,
        load=rng.integers(0, 1000, (1, 4, 12)),
        physical_to_logical=Placement.initial(4, 12, len(nodes), num_slots - 12).physical_to_logical,
        num_experts=12,
        node_of_rank=nodes,
        num_groups=num_groups,
        task=Rebalance("default"),
    )


def nodes_of_group(slots, num_nodes, num_groups):
    """Per layer and group: the nodes that hold copies of the group's experts."""
    group = slots.reshape(len(slots), num_nodes, -1) // (12 // num_groups)
    return [[{n for n in range(num_nodes) if (row[n] == g).any()} for g in range(num_groups)] for row in group]


def test_groups_stay_on_a_node_where_nodes_are_even():
    made = plan_request(request((0, 0, 7, 7), 4)).physical_to_logical
    assert all(len(nodes) == 1 for layer in nodes_of_group(made, 2, 4) for nodes in layer)


@pytest.mark.parametrize("nodes", [(0, 0, 0, 1), (0, 1, 0, 1)])
def test_uneven_nodes_get_the_global_policy(nodes):
    asked = request(nodes, 4)
    made = plan_request(asked).physical_to_logical
    np.testing.assert_array_equal(
        made, plan(asked.load, asked.physical_to_logical, 4, policy="default").physical_to_logical
    )
    assert any(len(nodes) > 1 for layer in nodes_of_group(made, 2, 4) for nodes in layer)
