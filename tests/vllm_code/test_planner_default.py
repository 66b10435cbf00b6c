# SPDX-License-Identifier: Apache-2.0
"""The policy "default" equals vLLM's DefaultEplbPolicy bit for bit, also for equal loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.planning.planner_inputs import LOAD_KINDS, draw_load, draw_slots
from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.values.placement import Placement

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("vllm.distributed.eplb.policy.default").DefaultEplbPolicy


def from_vllm(load, slots, num_ranks, num_nodes, num_groups):
    after = theirs.rebalance_experts(
        torch.from_numpy(load), slots.shape[1], num_groups, num_nodes, num_ranks, torch.from_numpy(slots)
    )
    return after.numpy()


@settings(max_examples=1500, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(LOAD_KINDS),
    ranks=st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 4), (32, 1), (32, 4)]),
    num_groups=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.integers(1, 24),
    spare=st.integers(0, 3),
    num_layers=st.integers(1, 4),
)
def test_plan_is_equal_to_vllm(seed, kind, ranks, num_groups, group_size, spare, num_layers):
    num_ranks, num_nodes = ranks
    num_experts = num_groups * group_size
    num_slots = (-(-num_experts // num_ranks) + spare) * num_ranks
    rng = np.random.default_rng(seed)
    load = draw_load(kind, rng, num_layers, num_experts)
    slots = draw_slots(rng, num_layers, num_experts, num_slots)
    made = plan(load, slots, num_ranks, num_nodes, num_groups, policy="default")
    np.testing.assert_array_equal(made.physical_to_logical, from_vllm(load, slots, num_ranks, num_nodes, num_groups))
    made.check(Placement(slots, num_experts, num_ranks))


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(32, 288), (64, 320), (32, 256)])
def test_plan_is_equal_to_vllm_at_full_size(num_ranks, num_slots):
    rng = np.random.default_rng(num_slots)
    for kind in ("counts", "ties", "log-normal"):
        load = draw_load(kind, rng, 58, 256)
        slots = draw_slots(rng, 58, 256, num_slots)
        made = plan(load, slots, num_ranks, policy="default").physical_to_logical
        np.testing.assert_array_equal(made, from_vllm(load, slots, num_ranks, 1, 1))


def test_series_is_added_up():
    rng = np.random.default_rng(0)
    series = rng.integers(0, 1000, (5, 3, 32))
    slots = draw_slots(rng, 3, 32, 40)
    made = plan(series, slots, 8, policy="default").physical_to_logical
    np.testing.assert_array_equal(made, from_vllm(series.sum(axis=0), slots, 8, 1, 1))


def test_comparison_with_vllm_can_fail():
    rng = np.random.default_rng(0)
    load = rng.integers(0, 1000, (3, 32))
    slots = draw_slots(rng, 3, 32, 40)
    made = plan(load, slots, 8, policy="default").physical_to_logical
    assert not np.array_equal(made, from_vllm(load[:, ::-1].copy(), slots, 8, 1, 1))
