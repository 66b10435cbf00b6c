# SPDX-License-Identifier: Apache-2.0
"""Ranks leave, join and are lost: weights bit for bit, and the load that was counted, after every change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vllm_ascend_eplb.agreement.channel import ControlChannel
from vllm_ascend_eplb.balancer.elastic import GONE, arrive, carry_out, depart, hand_over, recover
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.transfer.transport import Transport
from vllm_ascend_eplb.values.placement import EMPTY, Placement
from vllm_ascend_eplb.values.topology import Topology

from .faulty import FaultyTransport, interpose
from .model import Slots
from .ranks import Ranks, run_ranks

pytestmark = pytest.mark.distributed

LAYERS, EXPERTS, SIZE = 3, 12, 6

CHANGES: list[tuple[str, list[int], list[int]]] = [
    # (what happens, the processes that are ranks afterwards, old rank -> new rank)
    ("depart", [0, 2, 3], [0, GONE, 1, 2]),
    ("arrive", [0, 2, 3, 4], [0, 1, 2]),
    ("arrive", [0, 1, 2, 3, 4, 5], [0, 2, 3, 4]),  # process 1 is back, its old weights wiped
    ("recover", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, GONE]),
]


@dataclass
class Seen:
    """Observations of one process: per change the digest of the placement, None where it was no rank."""

    digests: list[int | None] = field(default_factory=list)
    wrong: str = ""
    load: Any = None
    moved: list[int] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    damaged: int = 0


class Member:
    """One process: its slots, and while it is a rank, what it needs to move them."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.slots = Slots(Placement.initial(LAYERS, EXPERTS, 4, 4 * SIZE - EXPERTS), process % 4)
        if process >= 4:
            self.wipe()
        self.recorder: LoadRecorder | None = None
        self.loader: Any = None
        self.damaged = 0

    def wipe(self) -> None:
        for layer in self.slots.stacked:
            for kind in layer:
                kind.view(torch.uint8).fill_(0xEE)

    def join(self, processes: list[int], groups: Any, placement: Placement) -> None:
        self.rank, self.num_ranks = processes.index(self.process), len(processes)
        control, transfer = groups
        self.topology = Topology.even(self.num_ranks)
        if self.loader is not None:
            self.loader.close()
        self.channel = ControlChannel(control, self.rank, self.num_ranks, lag=0)
        self.loader = D2DExpertWeightLoader(self.slots.views(), transfer, self.rank, 2, topology=self.topology)
        self.slots.rank = self.rank
        interpose(self.loader, DamagedOnce, self)
        assert self.loader.learn_checksums(placement) == 0
        old, self.recorder = (
            self.recorder,
            LoadRecorder(LAYERS, EXPERTS, placement.num_slots, "cpu", num_entries=2, steps_per_entry=2),
        )
        if old is not None:
            self.recorder.restore_window(old.window(), old.steps)

    def count(self, placement: Placement, tokens: int) -> None:
        """A forward that routes ``tokens`` to every slot that is not empty; adds to the load."""
        assert self.recorder is not None
        self.recorder.begin_step(placement, record=True)
        self.recorder.counts += torch.from_numpy((placement.physical_to_logical != EMPTY) * tokens)
        self.recorder.flush(placement)


class DamagedOnce(FaultyTransport):
    """The first expert that arrives here has one byte changed on the way: the round must be sent again."""

    def __init__(self, real: Transport, member: Member) -> None:
        super().__init__(real)
        self.member, self.left = member, 1

    def arrived(self, received: list[torch.Tensor]) -> None:
        if received and self.left:
            self.left = 0
            self.member.damaged += 1
            received[0][:1] += 1


def change_ranks(ranks: Ranks, leave_out: int) -> Seen:
    """All changes in turn. ``leave_out``: number of a change whose weights are not moved, -1 for none."""
    seen, me = Seen(), Member(ranks.rank)
    load = np.random.default_rng(5).integers(1, 1000, (LAYERS, EXPERTS))
    placement = Placement.initial(LAYERS, EXPERTS, 4, 4 * SIZE - EXPERTS)
    processes = [0, 1, 2, 3]
    counted = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    groups = [dist.new_group(processes, backend="gloo") for _ in range(2)]
    if ranks.rank in processes:
        me.join(processes, groups, placement)
    for number, (what, after, mapping) in enumerate(CHANGES):
        topology, moved = Topology.even(len(after)), 0
        if ranks.rank in processes:
            me.count(placement, 10 + me.rank)
        counted += placement.replica_count * sum(10 + rank for rank in range(len(processes)))
        if what == "depart":
            made = depart(placement, mapping, load, topology)
            if ranks.rank in processes:
                if number != leave_out:
                    moved = len(carry_out(placement, made.moves, me.loader, me.channel, me.topology))
                hand_over(me.recorder, me.channel, keeper=me.rank == 0)
            placement = made.after
        elif what == "recover" and ranks.rank == processes[-1]:
            counted -= me.recorder.window().sum(axis=0)  # lost with the rank; told below
        groups = [dist.new_group(after, backend="gloo") for _ in range(2)]  # every process takes part in making it
        if what != "depart":
            start, plan = (arrive if what == "arrive" else recover)(placement, mapping, load, topology)
            if ranks.rank in after:
                if ranks.rank not in processes:
                    me.wipe()
                    me.recorder = None
                me.join(after, groups, start)
                if number != leave_out:
                    moved = len(carry_out(start, plan.moves, me.loader, me.channel, me.topology))
            placement = Placement(plan.physical_to_logical, EXPERTS, len(after))
        else:
            if ranks.rank in after:
                me.join(after, groups, placement)
        if what == "recover":
            told = [torch.from_numpy(counted)]
            dist.broadcast(told[0], src=processes[-1])
        processes = after
        inside = ranks.rank in processes
        seen.digests.append(placement.digest if inside else None)
        seen.moved.append(moved)
        seen.spread.append(float(placement.par(load).mean()))
        if inside:
            seen.wrong = seen.wrong or me.slots.wrong(placement)
            total = me.channel.sum_everywhere(me.recorder.window()).sum(axis=0)
            seen.wrong = seen.wrong or ("" if np.array_equal(total, counted) else f"load differs after {number}")
            assert me.recorder.steps == number + 1 or ranks.rank in (1, 4, 5)
        dist.barrier()
    seen.damaged = me.damaged
    return seen


def test_ranks_leave_join_and_are_lost_with_weights_bit_for_bit() -> None:
    all_seen = run_ranks(6, change_ranks, -1, timeout=200)
    assert [seen.wrong for seen in all_seen] == [""] * 6
    for number, (_, processes, _) in enumerate(CHANGES):
        digests = {all_seen[process].digests[number] for process in processes}
        assert len(digests) == 1
        assert None not in digests
        assert all(all_seen[process].moved[number] for process in processes)
    assert max(all_seen[0].spread) < 1.1
    assert sum(seen.damaged for seen in all_seen) >= len(CHANGES)


def test_weights_that_were_not_moved_are_noticed() -> None:
    """Negative control of the comparison above."""
    all_seen = run_ranks(6, change_ranks, len(CHANGES) - 1, timeout=200)
    assert any("is not expert" in seen.wrong for seen in all_seen)
