# SPDX-License-Identifier: Apache-2.0
"""One round in flight, cut into parts under a budget per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..values.rounds import Round
from .checksum import Sums
from .transport import Batch

CHUNK = 4096
"""Under a budget, transfers are cut at multiples of so many bytes."""


MOST_PARTS = 64
"""Steps over which a budget may spread one round, at most."""


@dataclass(eq=False)
class Flight:
    """A round on its way through the loader."""

    round: Round
    buffer: int
    places: list[tuple[int, int, int]]
    """(layer, local slot, expert) per staging place in use."""
    staged: list[tuple[torch.Tensor, ...]]
    """Flat uint8 views of the staging places, per tensor of the expert."""
    sums: list[Sums]
    """The prepared checksums of the staging places; none where nothing is verified."""
    enters: bool = True
    """Whether issuing does it all on the device, so that the mover thread only waits."""
    parts: list[list[Batch]] = field(default_factory=list)
    nbytes: int = 0
    issued: int = 0
    issued_at: float = 0.0
    began: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    """Events on the side stream around each part."""
    arrived: bool = False
    intact: bool = False


def cut_parts(
    sizes: Sequence[int], ends: Sequence[tuple[int, int]], num_ranks: int, budget_bytes: int
) -> list[list[tuple[int, int, int]]]:
    """Cuts the moves of a round into parts, one per step, in none of which a rank sends, or receives, more than the
    budget. Equal on all ranks, so that both sides of a message cut it alike.

    Args:
        sizes: bytes of each move's expert.
        ends: sender and receiver of each move; equal where the copy is local and costs nothing.
        num_ranks: ranks in the group.
        budget_bytes: 0 for one part with everything.

    Returns:
        Per part its (move, first byte, end byte) in order; at least one part.
    """
    if not budget_bytes:
        return [[(move, 0, size) for move, size in enumerate(sizes)]]
    budget = budget_bytes // CHUNK * CHUNK
    parts: list[list[tuple[int, int, int]]] = [[]]
    sent: list[list[int]] = [[0] * num_ranks]
    received: list[list[int]] = [[0] * num_ranks]
    for move, (size, (sender, receiver)) in enumerate(zip(sizes, ends, strict=True)):
        if sender == receiver:
            parts[0].append((move, 0, size))
            continue
        at, part = 0, 0
        while at < size:
            if part == len(parts):
                parts.append([])
                sent.append([0] * num_ranks)
                received.append([0] * num_ranks)
            room = budget - max(sent[part][sender], received[part][receiver])
            take = min(size - at, room if at + room >= size else room // CHUNK * CHUNK)
            if take > 0:
                parts[part].append((move, at, at + take))
                sent[part][sender] += take
                received[part][receiver] += take
                at += take
            part += 1
    return parts
