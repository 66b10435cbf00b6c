# SPDX-License-Identifier: Apache-2.0
"""EplbUpdator on a single rank: every action has a method, and its parts hold nothing between cycles."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.engine_adaptor import EngineAdaptor
from vllm_ascend_eplb.agreement.phases import Command, Do, Phase
from vllm_ascend_eplb.balancer import start
from vllm_ascend_eplb.balancer.orders import NumberedOrder, Order, OrderFacts, PostedOrders
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.planning.request import PlanAnswer, PlanRequest, Rebalance, Restore, plan_request
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.topology import Topology

AUDIT_ONLY = {Do.END_AUDIT, Do.REDUCE_SUMS, Do.PLAN_REPAIR}


class OneRank(EngineAdaptor):
    """A model whose experts are all on one rank, so that nothing can move."""

    def __init__(self) -> None:
        self.name, self.rank, self.topology, self.num_groups = "one rank", 0, Topology.even(1), 1
        self.placement = Placement.initial(2, 4, 1)
        self.recorder = LoadRecorder(2, 4, 4, "cpu")
        self.control_group = self.transfer_group = self.device_group = None
        self.device = torch.device("cpu")
        self.maps = DispatchMaps(self.placement, "cpu", 1)
        self.switched = [self.maps]

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [[[torch.full((8,), float(4 * layer + slot))] for slot in range(4)] for layer in range(2)]


class PlannerHere:
    """A planner that answers in this process and keeps the requests."""

    starts = 1

    def __init__(self) -> None:
        self.asked: list[PlanRequest] = []

    def submit(self, request: PlanRequest) -> None:
        self.asked.append(request)

    def answer(self, number: int) -> PlanAnswer:
        return PlanAnswer(number, plan_request(self.asked[-1]), np.zeros((0, 7), dtype=np.int32))

    def close(self, wait: float = 0.0) -> None: ...


@pytest.fixture
def planner() -> Any:
    return PlannerHere()


def built(planner: EplbProcess, **settings: Any) -> EplbUpdator:
    config = EplbConfig(
        dynamic_eplb=True, expert_heat_collection_interval=4, algorithm_execution_interval=1, **settings
    )
    return start.build_updator(OneRank(), config, planner)


@pytest.fixture
def updator(planner: Any) -> Iterator[EplbUpdator]:
    updator = built(planner)
    yield updator
    updator.close()


def step_to(updator: EplbUpdator, cycle: int) -> None:
    """Step until ``cycle`` cycles are over."""
    for _ in range(200):
        updator.forward_before()
        updator.parts.recorder.counts += 1
        updator.forward_end()
        if updator.state.cycle >= cycle and updator.state.phase is Phase.COLLECT:
            return
        time.sleep(0.001)
    raise AssertionError(f"no cycle {cycle} in 200 steps: {updator.state}")


@pytest.mark.parametrize("audit_interval", [0, 50])
def test_every_action_has_a_method(planner: Any, audit_interval: int) -> None:
    updator = built(planner, audit_interval=audit_interval)
    assert set(updator.methods) == set(Do) - (set() if audit_interval else AUDIT_ONLY)
    assert (updator.auditor is not None) == bool(audit_interval)
    updator.close()


def test_cycle_asks_for_a_better_placement(updator: EplbUpdator, planner: PlannerHere) -> None:
    step_to(updator, 2)
    assert [request.number for request in planner.asked] == [1, 2]
    task = planner.asked[0].task
    assert isinstance(task, Rebalance)
    assert (task.policy, task.options.effort) == ("incremental", updator.parts.config.planner_effort)
    stats = updator.stats.stats()
    assert [cycle.result for cycle in stats.cycles] == ["skipped"] * 2
    assert stats.cycles[0].reason == "nothing to move at PAR 1.000"
    assert stats.window is not None
    assert stats.window.tokens == planner.asked[1].load.sum() > 0


def test_order_to_restore_asks_for_the_start_placement(updator: EplbUpdator, planner: PlannerHere) -> None:
    class Box:
        newest = NumberedOrder(1, Order(command="restore"))

        def close(self) -> None: ...

    updator.parts.orders = Box()  # type: ignore[assignment]
    updator.work.state = replace(updator.state, listen_at=1, due=10**6)
    step_to(updator, 1)
    task = planner.asked[0].task
    assert isinstance(task, Restore)
    np.testing.assert_array_equal(task.target, updator.parts.start.physical_to_logical)
    assert updator.state.paused


def test_order_to_reapply_asks_for_the_placement_of_before(updator: EplbUpdator, planner: PlannerHere) -> None:
    """The one that was given up for the initial placement, not a state on the way there."""
    start = updator.parts.start
    before, partly = (
        Placement(np.roll(start.physical_to_logical, by, axis=1), start.num_experts, start.num_ranks) for by in (1, 2)
    )
    asked = []
    for wanted, in_force in (
        (Command.REAPPLY, before),  # nothing was given up yet
        (Command.RESTORE, before),
        (Command.RESTORE, partly),  # the first one failed on the way
        (Command.REAPPLY, start),
        (Command.REAPPLY, partly),
    ):
        updator.work.placement = in_force
        updator.work.state = replace(updator.state, wanted=wanted)
        asked.append(updator.lead.task().target.tolist())
    targets = [before, start, start, before, before]
    assert asked == [placement.physical_to_logical.tolist() for placement in targets]
    updator.work.placement = start


def test_no_part_of_a_cycle_outlives_it(updator: EplbUpdator, planner: PlannerHere) -> None:
    step_to(updator, 1)
    assert updator.rollout.num_rounds == updator.rollout.moved == 0
    assert updator.work.offer is None
    assert not updator.gather.summed()
    assert updator.gather.result() is None
    assert updator.lead is not None
    assert updator.lead.case is None
    assert len(planner.asked) == 1


def test_orders_are_posted_until_they_take_effect() -> None:
    posted = PostedOrders()
    assert posted.facts(None, 0) == OrderFacts()
    first, second = (NumberedOrder(number, Order(command="pause")) for number in (1, 2))
    assert posted.facts(first, 0).order == 1
    assert posted.facts(second, 0).order == 2
    assert posted.facts(second, 2) == OrderFacts()
    assert posted.take(1) is first.order
    assert posted.take(1) is None
    assert posted.take(2) is second.order
