# SPDX-License-Identifier: Apache-2.0
"""The audit of live weights: damage that it finds, the choice of good copies, and the order of repairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.balancer import audit as audit_module
from vllm_ascend_eplb.balancer.audit import SlotAudit
from vllm_ascend_eplb.balancer.repair import MOST_REPAIRS, Damage, find_damage, repair_rounds
from vllm_ascend_eplb.transfer.checksum import UNKNOWN, ChecksumTable
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.rounds import RoundError, check_rounds
from vllm_ascend_eplb.values.topology import Topology

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
PLACEMENT = Placement([[0, 1, 2, 3, 0, 1]] * 3, num_experts=4, num_ranks=1)


def weights(device: str = "cpu") -> list[list[list[torch.Tensor]]]:
    def expert(layer: int, number: int) -> list[torch.Tensor]:
        tensors = torch.arange(24.0).view(4, 6) + 100 * layer + 7 * number, torch.tensor([number])
        return [tensor.to(device) for tensor in tensors]

    rows = PLACEMENT.physical_to_logical.tolist()
    return [[expert(layer, number) for number in row] for layer, row in enumerate(rows)]


@pytest.fixture(params=["cpu", CUDA])
def slots(request):
    return weights(request.param)


@pytest.fixture
def loader(slots):
    loader = D2DExpertWeightLoader(slots, None, 0, 2)
    assert loader.learn_checksums(PLACEMENT) == 0
    yield loader
    loader.close()


def complete(audit: SlotAudit, most: int = 100) -> int:
    """Run a pass to the end and return the number of steps."""
    for steps in range(most):
        if audit.complete:
            return steps
        audit.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    raise AssertionError("the pass does not end")


def test_pass_takes_its_interval_and_finds_new_damage(slots, loader, monkeypatch):
    monkeypatch.setattr(audit_module, "STEP_SECONDS", 60.0)  # a busy machine is slow
    audit = SlotAudit(loader.slots, loader.streams, 9)
    assert complete(audit) == 9
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 0
    slots[1][2][0][3, 3] = -slots[1][2][0][3, 3]  # one bit
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 0  # the pass is over
    audit.restart()
    assert not audit.complete
    complete(audit)
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 1
    damage, count = find_damage(audit.sums, PLACEMENT, loader.checksums, Topology.even(1))
    assert count == len(damage)
    assert damage == [Damage(layer=1, slot=2, expert=2, source=-1)]


def test_swapped_slots_repair_each_other(slots, loader):
    for first, second in zip(slots[2][2], slots[2][3], strict=True):
        first[:], second[:] = second.clone(), first.clone()
    audit = SlotAudit(loader.slots, loader.streams, 1000)
    assert complete(audit) == 18  # at least one slot per step
    damage, count = find_damage(audit.sums, PLACEMENT, loader.checksums, Topology.even(1))
    assert count == len(damage)
    assert damage == [Damage(2, 2, 2, 3), Damage(2, 3, 3, 2)]
    rounds = repair_rounds(damage, 6, 2)
    assert len(rounds) == 1
    check_rounds(PLACEMENT, rounds, 2, PLACEMENT, repair=True)
    with pytest.raises(RoundError, match="holds expert 3, not 2"):
        check_rounds(PLACEMENT, rounds, 2, PLACEMENT)
    assert repair_rounds(damage, 6, 1) == []  # a swap on one rank needs two staging buffers


def test_replica_is_preferred_as_the_source(slots, loader):
    slots[0][5][0][0, 0] += 1
    audit = SlotAudit(loader.slots, loader.streams, 3)
    complete(audit)
    damage, count = find_damage(audit.sums, PLACEMENT, loader.checksums, Topology.even(1))
    assert count == len(damage)
    assert damage == [Damage(0, 5, 1, source=1)]


def test_slots_written_meanwhile_are_summed_again(slots, loader):
    audit = SlotAudit(loader.slots, loader.streams, 1)
    complete(audit)
    slots[0][0][0].zero_()
    audit.written(np.array([0]), np.array([0]))
    assert not audit.complete
    complete(audit)
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 1


def test_sums_of_a_slot_written_meanwhile_are_discarded(slots, loader):
    audit = SlotAudit(loader.slots, loader.streams, 1)
    audit.step()
    slots[0][0][0].zero_()
    audit.written(np.array([0]), np.array([0]))  # before the sums were read
    complete(audit)
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 1


def test_step_of_an_audit_keeps_its_budget(slots, loader, monkeypatch):
    monkeypatch.setattr(audit_module, "STEP_SECONDS", 60.0)
    audit = SlotAudit(loader.slots, loader.streams, 1)  # all slots in one step
    assert complete(audit) == 1
    monkeypatch.setattr(audit_module, "STEP_BYTES", 1)
    audit.restart()
    assert complete(audit) == 18
    monkeypatch.setattr(audit_module, "STEP_BYTES", 1 << 30)
    monkeypatch.setattr(audit_module, "STEP_SECONDS", 0.0)
    audit.restart()
    assert complete(audit) == 18


def test_experts_without_a_known_sum_are_not_judged(slots, loader):
    loader.checksums.sums[0, 2] = UNKNOWN
    slots[0][2][0].zero_()
    audit = SlotAudit(loader.slots, loader.streams, 1)
    complete(audit)
    assert audit.damaged(PLACEMENT, loader.checksums, 0) == 0


def contents(placement: Placement) -> tuple[np.ndarray, ChecksumTable]:
    """The sums of all slots, and the table, if expert e of layer l has the sum 1000 l + e + 1."""
    table = ChecksumTable(placement.num_layers, placement.num_experts)
    table.sums = 1000 * np.arange(placement.num_layers)[:, None] + np.arange(placement.num_experts) + 1
    return np.take_along_axis(table.sums, placement.physical_to_logical.astype(np.int64), axis=1), table


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_repairs_fit_the_buffer_and_leave_nothing_possible(data: st.DataObject) -> None:
    ranks, size, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5)), data.draw(st.integers(2, 5))
    if ranks * size < experts:
        return
    luck = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spare = luck.integers(0, experts, ranks * size - experts)
    rows = [luck.permutation(np.r_[np.arange(experts), spare]) for _ in range(2)]
    placement = Placement(np.array(rows), experts, ranks)
    good, table = contents(placement)
    live = good.copy()
    for layer in range(2):
        moved = luck.permutation(ranks * size)[: luck.integers(0, ranks * size + 1)]
        live[layer, moved] = live[layer, luck.permutation(moved)]
        live[layer, luck.random(ranks * size) < 0.2] = 10**9
    buffer = data.draw(st.integers(1, 4))
    damage, count = find_damage(live, placement, table, Topology.even(ranks))
    assert count == len(damage)
    assert {(wrong.layer, wrong.slot) for wrong in damage} == set(map(tuple, np.argwhere(live != good).tolist()))
    rounds = repair_rounds(damage, size, buffer)
    check_rounds(placement, rounds, buffer, placement, repair=True)
    for round_ in rounds:
        layers, slots, _, _, sources = round_.moves.T
        live[layers, slots] = live[layers, sources]
    left = {(wrong.layer, wrong.slot): wrong for wrong in damage}
    left = {place: wrong for place, wrong in left.items() if live[place] != good[place]}
    for wrong in left.values():  # no good copy, or a ring that is too long for the buffer
        if wrong.source >= 0:
            ring, at = [], wrong
            while at not in ring:
                ring.append(at)
                assert (at.layer, at.source) in left
                at = left[at.layer, at.source]
            ring = ring[ring.index(at) :]
            assert max(Counter(wrong.slot // size for wrong in ring).values()) > buffer


def test_repair_is_bounded_and_keeps_sources_of_later_ones() -> None:
    experts = MOST_REPAIRS // 2 + 40
    placement = Placement(np.tile(np.arange(experts), (4, 2)), experts, 2)  # each expert on both ranks
    good, table = contents(placement)
    live = good.copy()
    live[:, :experts] = np.roll(live[:, :experts], 1, axis=1)  # on rank 0 every slot holds the neighbour's expert
    live[3] = np.roll(live[3], 1)  # in the last layer all slots are damaged: a ring
    damage, count = find_damage(live, placement, table, Topology.even(2))
    assert count == 5 * experts
    assert len(damage) == MOST_REPAIRS
    assert all(wrong.source == wrong.slot + experts for wrong in damage)  # the good replica
    rounds = repair_rounds(damage, experts, 50)
    assert sum(len(round_.moves) for round_ in rounds) == MOST_REPAIRS
    assert len(rounds) == -(-MOST_REPAIRS // 50)
    for _ in range(10):  # ten audits
        for round_ in repair_rounds(damage, experts, experts):
            layers, slots, _, _, sources = round_.moves.T
            live[layers, slots] = live[layers, sources]
        damage, count = find_damage(live, placement, table, Topology.even(2))
    assert count in (0, 2 * experts)  # a ring over all ranks fits into the buffer only if it is small
