# SPDX-License-Identifier: Apache-2.0
"""Flight: a round in transfer, cut into parts under a budget per step; and FlightPlanner, which prepares it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..values.placement import Int32Array
from ..values.plan import EXPERT, LAYER, SLOT
from ..values.rounds import SOURCE, Round
from .checksum import Summer, Sums
from .slots import ExpertSlots
from .transport import Batch, Copies, Piece, TransferError, Transport

CHUNK = 4096
"""Under a budget, transfers are cut at multiples of this number of bytes."""


MOST_PARTS = 64
"""Most steps over which a budget may spread one round."""


@dataclass(eq=False)
class Flight:
    """A round in transfer."""

    round: Round
    buffer: int
    places: list[tuple[int, int, int]]
    """(layer, local slot, expert) per staging place in use."""
    staged: list[tuple[torch.Tensor, ...]]
    """Flat uint8 views of the staging places, per tensor of the expert."""
    sums: list[Sums]
    """The prepared checksums of the staging places; empty if experts are not verified."""
    enters: bool = True
    """Whether issuing enqueues everything on the device, so that the mover thread only waits."""
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
    """Cuts the moves of a round into parts, one per step. In no part does a rank send, or receive, more than the
    budget. The result is equal on all ranks, so that both sides of a message cut it alike.

    Args:
        sizes: bytes of each move's expert.
        ends: sender and receiver of each move; equal for a local copy, which needs no budget.
        num_ranks: ranks in the group.
        budget_bytes: most bytes per rank and part; 0 for one part with everything.

    Returns:
        For each part its (move, first byte, end byte) in order; at least one part.
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


class FlightPlanner:
    """Prepares flights on one rank. Everything that can fail happens here, so that issuing is only the call.

    Args:
        slots: live slots and staging.
        transports: the first one that reaches a pair of ranks carries their experts.
        summers: one for each staging buffer.
        rank, num_ranks: this rank, and the number of ranks.
        budget_bytes: most bytes that a rank may send, and receive, per step; 0 for no limit.
    """

    def __init__(
        self,
        slots: ExpertSlots,
        transports: Sequence[Transport],
        summers: Sequence[Summer],
        rank: int,
        num_ranks: int,
        budget_bytes: int,
    ) -> None:
        self._slots, self._transports, self._summers = slots, transports, summers
        self._rank, self._num_ranks, self._budget_bytes = rank, num_ranks, budget_bytes
        self._on_device = slots.device.type != "cpu"

    def plan(self, round: Round, verify: bool) -> Flight:
        """Prepares a round.

        Args:
            round: the round, equal on all ranks.
            verify: whether received experts are summed.

        Raises:
            TransferError: the round does not fit this rank's slots, staging or budget.
        """
        size, places_left = self._slots.slots_per_rank, self._slots.buffer_experts
        if round.slots_per_rank != size:
            raise TransferError(f"the round is for {round.slots_per_rank} slots per rank; this rank has {size}")
        moves = round.moves
        senders, receivers = moves[:, SOURCE] // size, moves[:, SLOT] // size
        mine = np.flatnonzero(receivers == self._rank)
        if len(mine) > places_left:
            raise TransferError(f"round {round.number} brings {len(mine)} experts, staging holds {places_left}")
        buffer = round.number % len(self._summers)
        received = moves[mine][:, [LAYER, SLOT, EXPERT]].tolist()
        places = [(layer, slot - self._rank * size, expert) for layer, slot, expert in received]
        staged = [self._slots.staged(layer, buffer, place) for place, (layer, _, _) in enumerate(places)]
        summer = self._summers[buffer]
        sums = [summer.place(place, views) for place, views in enumerate(staged)] if verify else []
        flight = Flight(round, buffer, places, staged, sums)
        staged_of = dict(zip(mine.tolist(), staged, strict=True))
        for part in self._cut(moves[:, LAYER], senders, receivers):
            flight.parts.append(self._part(flight, part, moves, senders, receivers, staged_of))
        flight.enters = self._on_device and all(batch.enters for part in flight.parts for batch in part)
        flight.began, flight.ended = [None] * len(flight.parts), [None] * len(flight.parts)
        return flight

    def _cut(self, layers: Int32Array, senders: Int32Array, receivers: Int32Array) -> list[list[tuple[int, int, int]]]:
        """For each part the (move, first byte, end byte) that this rank sends or receives."""
        expert_bytes = self._slots.expert_bytes
        if not self._budget_bytes:
            concern = np.flatnonzero((senders == self._rank) | (receivers == self._rank))
            return [[(move, 0, expert_bytes[layers[move]]) for move in concern.tolist()]]
        sizes = [expert_bytes[layer] for layer in layers.tolist()]
        ends = list(zip(senders.tolist(), receivers.tolist(), strict=True))
        parts = cut_parts(sizes, ends, self._num_ranks, self._budget_bytes)
        if len(parts) > MOST_PARTS:
            raise TransferError(
                f"a round would take {len(parts)} steps under the budget of {self._budget_bytes} bytes per step; "
                f"allowed are {MOST_PARTS}: raise the budget"
            )
        return [[piece for piece in part if self._rank in ends[piece[0]]] for part in parts]

    def _part(
        self,
        flight: Flight,
        part: list[tuple[int, int, int]],
        moves: Int32Array,
        senders: Int32Array,
        receivers: Int32Array,
        staged_of: dict[int, tuple[torch.Tensor, ...]],
    ) -> list[Batch]:
        sends: dict[Transport, list[Piece]] = {carrier: [] for carrier in self._transports}
        receives: dict[Transport, list[Piece]] = {carrier: [] for carrier in self._transports}
        local: list[tuple[torch.Tensor, torch.Tensor]] = []
        count: dict[tuple[int, int], int] = {}
        for move, start, end in part:
            sender, receiver, layer = int(senders[move]), int(receivers[move]), int(moves[move, LAYER])
            slot = int(moves[move, SOURCE]) - sender * self._slots.slots_per_rank
            ranges = self._slots.ranges(layer, start, end)
            if sender == receiver:
                source, staged = self._slots.live[layer][slot], staged_of[move]
                local += [(staged[i][a:b], source[i][a:b]) for i, a, b in ranges]
                continue
            at = count.get((sender, receiver), 0)
            count[sender, receiver] = at + len(ranges)
            transport = next(carrier for carrier in self._transports if carrier.reaches(sender, receiver))
            tensors = self._slots.live[layer][slot] if sender == self._rank else staged_of[move]
            views = tuple(tensors[i][a:b] for i, a, b in ranges)
            if sender == self._rank:
                sends[transport].append(Piece(receiver, at, views, (layer, slot, ranges)))
            else:
                receives[transport].append(Piece(sender, at, views, (layer, slot, ranges)))
                flight.nbytes += end - start
        batches: list[Batch] = [Copies(local, enters=self._on_device)] if local else []
        return batches + [
            carrier.batch(sends[carrier], receives[carrier])
            for carrier in self._transports
            if sends[carrier] or receives[carrier]
        ]
