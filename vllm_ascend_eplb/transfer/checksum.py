# SPDX-License-Identifier: Apache-2.0
"""Checksums of expert weights, so that damaged weights or a wrong expert are never committed.

An expert's weights never change while a server runs, and are equal in all its copies. So the sums are taken once, at
start-up, and a receiver compares the received experts with this table, without a further message. That finds a wrong
expert as well as a wrong byte. Each tensor is summed in up to 16 sections, as 64-bit integers that wrap around.
Sections and tensors are then combined with odd factors, so that their order counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..values.placement import EMPTY, Int32Array, Int64Array, Placement
from .transport import Streams

UNKNOWN = -1
"""Entry of the table for an expert that cannot be verified."""


SECTIONS = 16


_FACTOR = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: consecutive multiples are far apart


_MASK = (1 << 64) - 1


Sums = list[tuple[torch.Tensor, torch.Tensor]]
"""Prepared sums of one expert: for each tensor its words [sections, n], and the output int64 [sections]."""


class Summer:
    """Sums experts on their device; the results come to the host in one copy.

    Args:
        streams: streams of the device.
        places: most experts that are summed between two calls of ``fetch``.
        tensors: most tensors per expert.
    """

    def __init__(self, streams: Streams, places: int, tensors: int) -> None:
        shape = (places, tensors, SECTIONS)
        self._sums = torch.zeros(shape, dtype=torch.int64, device=streams.device)
        pinned = streams.module is not None
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=True) if pinned else self._sums

    def place(self, place: int, tensors: Sequence[torch.Tensor]) -> Sums:
        """Prepares the sums of an expert, given as flat uint8 views, for one of the places."""
        prepared = []
        for number, tensor in enumerate(tensors):
            words = _words(tensor)
            sections = next(count for count in (16, 8, 4, 2, 1) if words.numel() % count == 0)
            prepared.append((words.view(sections, -1), self._sums[place, number, :sections]))
        return prepared

    @staticmethod
    def enqueue(sums: Sums) -> None:
        """Enqueues the sums on the current stream."""
        for words, out in sums:
            torch.sum(words, dim=1, dtype=torch.int64, out=out)

    def fetch(self) -> None:
        """Enqueues the copy to the host on the current stream; ``value`` may be called after the copy is done."""
        if self._host is not self._sums:
            self._host.copy_(self._sums, non_blocking=True)

    def value(self, place: int, sums: Sums) -> int:
        """The checksum of one expert, 0 <= value < 2**62."""
        total = 0
        for number, (_, out) in enumerate(sums):
            for section, part in enumerate(self._host[place, number, : len(out)].tolist()):
                total += part * (_FACTOR * (2 * (number * SECTIONS + section) + 1))
        return (total & _MASK) >> 2


def sum_slots(
    slots: Sequence[Sequence[Sequence[torch.Tensor]]], summer: Summer, streams: Streams, places: int
) -> Int64Array:
    """int64 [L, S]: the checksums of all experts in ``slots`` [L][S], given as flat uint8 views; blocks. Sums
    ``places`` experts at a time."""
    flat = [(layer, slot) for layer, row in enumerate(slots) for slot in range(len(row))]
    values: Int64Array = np.zeros((len(slots), len(slots[0])), dtype=np.int64)
    for first in range(0, len(flat), places):
        group = flat[first : first + places]
        prepared = [summer.place(place, slots[layer][slot]) for place, (layer, slot) in enumerate(group)]
        for sums in prepared:
            summer.enqueue(sums)
        summer.fetch()
        if streams.module is not None:
            streams.current().synchronize()
        for place, (layer, slot) in enumerate(group):
            values[layer, slot] = summer.value(place, prepared[place])
    return values


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes as integers of the largest width that divides their number."""
    width, dtype = next(
        (size, dtype)
        for size, dtype in ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
        if tensor.numel() % size == 0
    )
    if tensor.storage_offset() % width:
        tensor = tensor.clone()
    return tensor.view(dtype)


class ChecksumTable:
    """The checksum of every logical expert.

    Attributes:
        sums: int64 [L, E]; UNKNOWN where an expert cannot be verified.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.sums: npt.NDArray[np.int64] = np.full((num_layers, num_experts), UNKNOWN, dtype=np.int64)

    def learn(self, mine: npt.NDArray[np.int64], placement: Placement, exchange: Callable[[bytes], list[bytes]]) -> int:
        """Fills the table from the sums of all ranks' slots; all ranks call it together.

        Args:
            mine: int64 [L, S], sums of this rank's slots.
            placement: the placement in force.
            exchange: sends bytes to all ranks and returns the bytes of all ranks, in rank order.

        Returns:
            Number of experts whose copies differ (for example because weights were drawn at random per slot). Their
            entries are UNKNOWN.
        """
        parts = [
            np.frombuffer(data, dtype="<i8").reshape(mine.shape) for data in exchange(mine.astype("<i8").tobytes())
        ]
        by_slot = np.concatenate(parts, axis=1)
        slots = placement.physical_to_logical
        layers, places = np.nonzero(slots != EMPTY)
        experts = slots[layers, places]
        low = np.full(self.sums.shape, np.iinfo(np.int64).max, dtype=np.int64)
        high = np.full(self.sums.shape, np.iinfo(np.int64).min, dtype=np.int64)
        np.minimum.at(low, (layers, experts), by_slot[layers, places])
        np.maximum.at(high, (layers, experts), by_slot[layers, places])
        self.sums = np.where(low == high, low, np.int64(UNKNOWN))
        return int(np.count_nonzero(low != high))

    def matches(self, layer: int, expert: int, value: int) -> bool:
        expected = int(self.sums[layer, expert])
        return expected in (UNKNOWN, value)


def wrong_slots(sums: Int64Array, experts: Int32Array, table: ChecksumTable) -> npt.NDArray[np.bool_]:
    """bool [L, n]: where ``sums`` differs from the expert's checksum; False where that is not known."""
    expected = np.take_along_axis(table.sums, np.maximum(experts, 0).astype(np.int64), axis=1)
    wrong: npt.NDArray[np.bool_] = (experts != EMPTY) & (expected != UNKNOWN) & (sums != expected)
    return wrong
