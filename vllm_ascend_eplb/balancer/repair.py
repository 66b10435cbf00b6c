# SPDX-License-Identifier: Apache-2.0
"""Finds damaged slots from the checksums of all slots, and makes rounds that repair them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..transfer.checksum import ChecksumTable, wrong_slots
from ..values.placement import Int64Array, Placement
from ..values.rounds import Round
from ..values.topology import Topology

MOST_REPAIRS = 256
"""Most slots of one repair; the next audit finds the rest again."""


@dataclass(frozen=True)
class Damage:
    """A slot that does not hold its expert.

    Attributes:
        source: a slot of the same layer with the expert's weights; -1 if there is none.
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
    """Finds the damaged slots and a source for each: undamaged replicas first, then on the same rank, on the same node,
    or anywhere.

    Args:
        sums: int64 [L, P], sums of the live slots of all ranks.
        placement: the placement in force.
        table: the experts' checksums.
        topology: the node of each rank.

    Returns:
        The first ``MOST_REPAIRS`` damaged slots, and the number of all. If there are more, only undamaged replicas are
        sources: a slot of a later repair may need the weights in another damaged slot.
    """
    slots, size = placement.physical_to_logical, placement.slots_per_rank
    wrong = wrong_slots(sums, slots, table)
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
            key=lambda source: (
                bool(wrong[layer, source]),
                source // size != rank,
                not topology.same_node(source // size, rank),
                source,
            ),
            default=-1,
        )
        found.append(Damage(layer, slot, expert, best))
    return found, len(places)


def repair_rounds(damage: Sequence[Damage], slots_per_rank: int, buffer_experts: int) -> list[Round]:
    """Rounds that send good weights into damaged slots; the placement does not change.

    A damaged slot may be the source of another one (two slots that were swapped). So it is written in the last round
    that reads it, or later. A ring of such slots that does not fit into the buffer is not repaired.

    Args:
        damage: slots to repair; those without a source are left out.
        slots_per_rank: S.
        buffer_experts: staging places of a rank per round.
    """
    left = {(damaged.layer, damaged.slot): damaged for damaged in damage if damaged.source >= 0}
    rounds: list[Round] = []
    while left:
        readers = Counter((damaged.layer, damaged.source) for damaged in left.values())
        chosen: list[Damage] = []
        room: Counter[int] = Counter()
        for place, damaged in left.items():
            if not readers[place] and room[damaged.slot // slots_per_rank] < buffer_experts:
                chosen.append(damaged)
                room[damaged.slot // slots_per_rank] += 1
        if not chosen:  # every remaining slot is read by another: rings
            ring = _ring(left)
            room = Counter(damaged.slot // slots_per_rank for damaged in ring)
            chosen = ring if max(room.values()) <= buffer_experts else []
            if not chosen:
                for damaged in ring:
                    del left[damaged.layer, damaged.slot]
                continue
        for damaged in chosen:
            del left[damaged.layer, damaged.slot]
        number = len(rounds)
        rows = [(damaged.layer, damaged.slot, damaged.expert, number, damaged.source) for damaged in chosen]
        rounds.append(Round(number, np.array(rows, dtype=np.int32), slots_per_rank, number - 1))
    return rounds


def _ring(left: dict[tuple[int, int], Damage]) -> list[Damage]:
    """One ring among slots that are all read by another slot."""
    place = next(iter(left))
    seen: dict[tuple[int, int], int] = {}
    path: list[Damage] = []
    while place not in seen:
        seen[place] = len(path)
        path.append(left[place])
        place = (path[-1].layer, path[-1].source)
    return path[seen[place] :]
