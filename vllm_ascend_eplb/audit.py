# SPDX-License-Identifier: Apache-2.0
"""Audit: does every live slot still hold the weights of its logical expert?

A flipped bit in a slot, or a slot that holds another expert's weights, makes wrong answers and no noise. So each rank
sums its slots, a few at every step between two cycles, and compares the sums with those that the experts had at
start-up (checksum.py), which are the same on all ranks and for all replicas. When a pass over all slots is over, all
ranks learn in one agreed step whether any of them found damage. Only then do the sums travel, and EP rank 0 finds for
each damaged slot another one of its layer that holds what belongs there: a replica, or a slot that was swapped with it.

``SlotAudit`` is one rank's part; ``find_damage`` and ``repair_rounds`` are EP rank 0's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .checksum import UNKNOWN, ChecksumTable, Summer, Sums
from .placement import EMPTY, Int32Array, Placement
from .rounds import Round
from .topology import Topology
from .transport import Streams

Int64Array = npt.NDArray[np.int64]

STEP_SECONDS = 0.001
"""Time of the host that summing may take from one step; one slot is summed all the same."""

STEP_BYTES = 64 << 20
"""Weights that are summed at one step, at most, but at least one slot: some ten microseconds of a GPU's memory."""

MOST_PLACES = 64
"""Slots that are summed at one step, at most."""

MOST_REPAIRS = 256
"""Slots that one repair mends; what is left is found again by the next audit."""

_NOT_YET = -2


class SlotAudit:
    """Sums this rank's live slots, pass after pass.

    Args:
        slots: per layer and local slot the expert's tensors, as flat uint8 views of the live weights.
        streams: of their device.
        interval: steps in which a pass should be over.

    All calls are made by the step thread. Sums are enqueued on the compute stream, so they are in order with commits;
    nothing waits for them.
    """

    def __init__(self, slots: Sequence[Sequence[Sequence[torch.Tensor]]], streams: Streams, interval: int) -> None:
        self._slots, self._streams = slots, streams
        self.num_layers, self.slots_per_rank = len(slots), len(slots[0])
        count = self.num_layers * self.slots_per_rank
        self._per_step = min(MOST_PLACES, -(-count // interval))
        self._summer = Summer(streams, self._per_step, max(len(layer[0]) for layer in slots))
        self._sums: Int64Array = np.full((self.num_layers, self.slots_per_rank), _NOT_YET, dtype=np.int64)
        self._next = 0
        self._under_way: list[tuple[int, int, int, Sums]] = []  # layer, slot, place, prepared sums
        self._event = streams.event()
        for layer in slots:  # what the device's library sets aside is set aside before the engine serves
            self._summer.enqueue(self._summer.prepare(0, layer[0]))
        self._summer.fetch()

    def step(self) -> None:
        """Takes the sums of the last step in, and enqueues the next. Never waits."""
        if self._under_way and not self._collect():
            return
        began, nbytes = time.perf_counter(), 0
        for place in range(self._per_step):
            todo = self._next_slot()
            if todo is None or (place and (nbytes > STEP_BYTES or time.perf_counter() - began > STEP_SECONDS)):
                break
            tensors = self._slots[todo[0]][todo[1]]
            sums = self._summer.prepare(place, tensors)
            self._summer.enqueue(sums)
            self._under_way.append((*todo, place, sums))
            self._next += 1
            nbytes += sum(tensor.numel() for tensor in tensors)
        if self._under_way:
            self._summer.fetch()
            if self._event is not None:
                self._event.record(self._streams.current())

    def _next_slot(self) -> tuple[int, int] | None:
        while self._next < self._sums.size:
            layer, slot = divmod(self._next, self.slots_per_rank)
            if self._sums[layer, slot] == _NOT_YET:
                return layer, slot
            self._next += 1
        return None

    def _collect(self) -> bool:
        if self._event is not None and not self._event.query():
            return False
        for layer, slot, place, sums in self._under_way:
            self._sums[layer, slot] = self._summer.value(place, sums)
        self._under_way.clear()
        return True

    def written(self, layers: Int32Array, slots: Int32Array) -> None:
        """These local slots got other weights: what was summed of them counts no more."""
        self._sums[layers, slots] = _NOT_YET
        gone = set(zip(layers.tolist(), slots.tolist(), strict=True))
        self._under_way = [each for each in self._under_way if each[:2] not in gone]
        self._next = 0

    def restart(self) -> None:
        """Begins a new pass."""
        self._sums.fill(_NOT_YET)
        self._under_way.clear()
        self._next = 0

    @property
    def complete(self) -> bool:
        """Whether every slot has been summed in this pass."""
        if self._under_way:
            self._collect()
        return not self._under_way and bool((self._sums != _NOT_YET).all())

    @property
    def sums(self) -> Int64Array:
        """int64 [L, S], of the pass that is complete."""
        return self._sums

    def damaged(self, placement: Placement, table: ChecksumTable, rank: int) -> int:
        """Slots of this rank that do not hold their expert."""
        first = rank * self.slots_per_rank
        mine = placement.physical_to_logical[:, first : first + self.slots_per_rank]
        return int(np.count_nonzero(_wrong(self._sums, mine, table)))


@dataclass(frozen=True)
class Damage:
    """A slot that does not hold its expert.

    Attributes:
        source: a slot of the same layer with the weights that belong there; -1 where there is none.
    """

    layer: int
    slot: int
    expert: int
    source: int

    def text(self, slots_per_rank: int) -> str:
        return f"layer {self.layer}, slot {self.slot} (rank {self.slot // slots_per_rank}, expert {self.expert})"


def find_damage(
    sums: Int64Array, placement: Placement, table: ChecksumTable, topology: Topology
) -> tuple[list[Damage], int]:
    """Which slots are damaged, and where what belongs there can be had: on the same rank, else on the same node, else
    anywhere, undamaged replicas first.

    Args:
        sums: int64 [L, P], of the live slots of all ranks.
        placement: the placement in force.
        table: the sums that the experts should have.
        topology: the node of each rank.

    Returns:
        The first ``MOST_REPAIRS`` damaged slots, and the number of all. Where there are more, only undamaged replicas
        are sources: a slot whose turn has not come may need what another damaged one holds.
    """
    slots, size = placement.physical_to_logical, placement.slots_per_rank
    wrong = _wrong(sums, slots, table)
    found, places = [], np.argwhere(wrong)
    for layer, slot in places[:MOST_REPAIRS].tolist():
        expert = int(slots[layer, slot])
        rank = slot // size
        good = sums[layer] == table.sums[layer, expert]
        if len(places) > MOST_REPAIRS:
            good &= ~wrong[layer]
        sources = np.flatnonzero(good).tolist()
        best = min(
            sources,
            key=lambda its: (
                bool(wrong[layer, its]),
                its // size != rank,
                not topology.same_node(its // size, rank),
                its,
            ),
            default=-1,
        )
        found.append(Damage(layer, slot, expert, best))
    return found, len(places)


def repair_rounds(damage: Sequence[Damage], slots_per_rank: int, buffer_experts: int) -> list[Round]:
    """Rounds that send good weights into damaged slots; the placement stays what it is.

    A damaged slot may be the source of another one (two slots that were swapped), so it is written in the round that
    it is last read in, or later. A ring of such slots that does not fit into the buffer is left alone.

    Args:
        damage: all that is to be mended; those without a source are left alone.
        slots_per_rank: S.
        buffer_experts: staging places of a rank per round.
    """
    left = {(each.layer, each.slot): each for each in damage if each.source >= 0}
    rounds: list[Round] = []
    while left:
        readers = Counter((each.layer, each.source) for each in left.values())
        chosen: list[Damage] = []
        room: Counter[int] = Counter()
        for place, each in left.items():
            if not readers[place] and room[each.slot // slots_per_rank] < buffer_experts:
                chosen.append(each)
                room[each.slot // slots_per_rank] += 1
        if not chosen:  # every slot that is left is read by another: rings
            ring = _ring(left)
            room = Counter(each.slot // slots_per_rank for each in ring)
            chosen = ring if max(room.values()) <= buffer_experts else []
            if not chosen:
                for each in ring:
                    del left[each.layer, each.slot]
                continue
        for each in chosen:
            del left[each.layer, each.slot]
        number = len(rounds)
        rows = [(each.layer, each.slot, each.expert, each.source, number) for each in chosen]
        rounds.append(Round(number, np.array(rows, dtype=np.int32), slots_per_rank, number - 1))
    return rounds


def _ring(left: dict[tuple[int, int], Damage]) -> list[Damage]:
    """One ring among slots each of which is read by another."""
    place = next(iter(left))
    seen: dict[tuple[int, int], int] = {}
    path: list[Damage] = []
    while place not in seen:
        seen[place] = len(path)
        path.append(left[place])
        place = (path[-1].layer, path[-1].source)
    return path[seen[place] :]


def _wrong(sums: Int64Array, experts: Int32Array, table: ChecksumTable) -> npt.NDArray[np.bool_]:
    """bool [L, n]: where ``sums`` differs from the one that the expert should have; False where that is not known."""
    expected = np.take_along_axis(table.sums, np.maximum(experts, 0).astype(np.int64), axis=1)
    wrong: npt.NDArray[np.bool_] = (experts != EMPTY) & (expected != UNKNOWN) & (sums != expected)
    return wrong
