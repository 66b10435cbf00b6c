# SPDX-License-Identifier: Apache-2.0
"""Orders given to EP rank 0 take effect on all ranks at the same step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from vllm_ascend_eplb.balancer import start
from vllm_ascend_eplb.balancer.orders import Order, OrderBox, write_order
from vllm_ascend_eplb.settings.config import EplbConfig

from .pace import PatientPlanner, settle
from .ranks import Ranks, run_ranks
from .routing_model import REDUNDANT, RoutingModel

pytestmark = pytest.mark.distributed

ORDERS: tuple[dict[str, Any], ...] = (
    {"command": "pause"},
    {"command": "cycle"},
    {"command": "restore"},
    {"command": "reapply"},
    {"command": "intervals", "collect_steps": 5, "execution_steps": 2},
    {"command": "resume"},
)
STEPS_BETWEEN = 90
"""Steps from the effect of an order to the next order: enough for more than one cycle."""


@dataclass(frozen=True)
class Moment:
    """State of one rank after a step."""

    step: int
    phase: str
    cycle: int
    order: int
    paused: bool
    intervals: tuple[int, int]
    digest: int


def serve(ranks: Ranks, folder: str, steps: int) -> tuple[list[Moment], str, Any]:
    start.LISTEN_STEPS = 16
    model = RoutingModel(ranks)
    config = EplbConfig(
        dynamic_eplb=True,
        num_redundant_experts=REDUNDANT,
        expert_heat_collection_interval=10,
        algorithm_execution_interval=1,
        policy="random",
    )
    first = ranks.rank == 0
    box = OrderBox(Path(folder, "order")) if first else None
    updator = start.build_updator(model, config, PatientPlanner() if first else None, orders=box)
    moments, wrong, given, since = [], "", 0, 0
    for _ in range(steps):
        state = updator.state
        since = since + 1 if state.order == given else 0
        if box is not None and given < len(ORDERS) and state.order == given and since > STEPS_BETWEEN:
            write_order(box.path, Order(**ORDERS[given]))
            box.look()
            given += 1
        updator.forward_before()
        model.forward()
        updator.forward_end()
        state = updator.state
        intervals = (state.collect_steps, state.execution_steps)
        moments.append(
            Moment(
                state.step,
                state.phase.name,
                state.cycle,
                state.order,
                state.paused,
                intervals,
                updator.placement.digest,
            )
        )
        wrong = wrong or model.slots.wrong(updator.placement)
        dist.barrier()
        settle(updator)
    stats = updator.stats.stats() if first else None
    updator.close()
    return moments, wrong, stats


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_obey_at_the_same_step(num_ranks: int, tmp_path: Path) -> None:
    results = run_ranks(num_ranks, serve, str(tmp_path), 1020, timeout=240)
    moments, _, stats = results[0]
    for seen, wrong, _ in results:
        assert wrong == ""
        assert seen == moments
    by_order = {order: list(group) for order, group in itertools.groupby(moments, key=lambda moment: moment.order)}
    assert list(by_order) == [0, 1, 2, 3, 4, 5, 6]
    start = moments[0].digest
    digests, cycles = (
        {order: [getattr(moment, name) for moment in group] for order, group in by_order.items()}
        for name in ("digest", "cycle")
    )
    assert len(set(digests[0])) > 2  # cycles moved experts
    assert len(set(digests[1])) == len(set(cycles[1])) == 1  # paused: nothing moves
    assert all(moment.paused for order in (1, 2, 3, 4, 5) for moment in by_order[order])
    assert cycles[2][-1] == cycles[1][-1] + 1  # exactly one cycle
    assert digests[2][-1] != digests[1][-1]
    assert start not in digests[2]
    assert cycles[3][-1] == cycles[2][-1] + 1
    assert digests[3][-1] == start
    assert cycles[4][-1] == cycles[3][-1] + 1
    assert digests[4][-1] == digests[2][-1]  # where experts were before they went to the initial slots
    assert set(digests[5]) == {digests[2][-1]}
    assert {moment.intervals for moment in by_order[5]} == {(5, 2)}
    assert not by_order[6][-1].paused
    assert cycles[6][-1] > cycles[5][-1] + 2
    assert digests[6][-1] not in (start, digests[2][-1])
    assert (stats.paused, stats.collect_steps, stats.execution_steps) == (False, 5, 2)
    assert stats.order_step == by_order[6][0].step
    assert stats.cycles_failed == 0
    assert list(tmp_path.iterdir()) == []
