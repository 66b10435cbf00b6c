# SPDX-License-Identifier: Apache-2.0
"""Rounds: groups of moves that are sent together and committed together, and their checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .placement import EMPTY, Int32Array, Placement
from .plan import EXPERT, LAYER, SLOT

SOURCE = 4
"""The column of ``Round.moves`` behind those of a plan's moves (values/plan.py): the slot that is copied."""


NONE = -1
"""``Round.after`` of a round that waits for no other."""


class RoundError(ValueError):
    """Rounds that must not be carried out, or moves that no rounds can carry out."""


@dataclass(frozen=True, eq=False)
class Round:
    """Moves that are sent together and committed together.

    Attributes:
        number: position in the plan, 0, 1, ...
        moves: int32 [n, 5], rows (layer, slot, expert, group, source_slot): copy ``expert`` of ``layer`` from
            ``source_slot`` into ``slot``. ``group`` counts the scheduler's groups, which may be parts of the plan's.
        slots_per_rank: S; the rank of a slot is ``slot // S``.
        after: the latest earlier round that must be committed before this one may be issued, -1 for none.
    """

    number: int
    moves: Int32Array
    slots_per_rank: int
    after: int = NONE


def receive_bound(placement: Placement, rounds: Sequence[Round], buffer_experts: int) -> int:
    """The fewest rounds that could carry the same moves: ceil(staging places the busiest rank needs / buffer)."""
    places = np.zeros(placement.num_ranks, dtype=np.int64)
    for round in rounds:
        np.add.at(places, round.moves[:, SLOT] // round.slots_per_rank, 1)
    return -(-int(places.max()) // buffer_experts)


def check_rounds(
    placement: Placement,
    rounds: Sequence[Round],
    buffer_experts: int,
    target: Placement | None = None,
    *,
    repair: bool = False,
) -> None:
    """Replays ``rounds`` and checks everything that ``planning/schedule.py`` promises, whoever made them.

    Args:
        placement: the placement in force.
        rounds: to be checked.
        buffer_experts: staging places of a rank per round.
        target: the placement that the rounds must lead to; None skips this check.
        repair: whether slots may hold other experts than ``placement`` says, because an audit found damage. Then any
            slot may be a source; the checksums of the received experts decide.

    Raises:
        RoundError: the message names the round and what is wrong with it.
    """
    row_of, slots_per_rank = placement.physical_to_logical.copy(), placement.slots_per_rank
    written = np.full(row_of.shape, NONE, dtype=np.int64)
    for number, round in enumerate(rounds):
        name, moves = f"round {number}", round.moves
        if round.number != number or round.slots_per_rank != slots_per_rank or not NONE <= round.after < number:
            raise RoundError(
                f"{name} has number {round.number}, {round.slots_per_rank} slots per rank and after {round.after}; "
                f"expected {number}, {slots_per_rank} and an earlier round"
            )
        if moves.ndim != 2 or moves.shape[1] != 5 or moves.dtype != np.int32 or not len(moves):
            raise RoundError(f"{name} has moves of shape {moves.shape}, {moves.dtype}; expected int32 [n >= 1, 5]")
        limits = (placement.num_layers, placement.num_slots, placement.num_experts, placement.num_slots)
        named = moves[:, [LAYER, SLOT, EXPERT, SOURCE]]
        if (named < 0).any() or (named >= limits).any():
            raise RoundError(f"{name} names a layer, slot or expert out of range; limits are {limits}")
        layers, slots, experts, sources = named.T
        if len(np.unique(layers.astype(np.int64) * placement.num_slots + slots)) != len(moves):
            raise RoundError(f"{name} writes one slot twice")
        places = np.bincount(slots // slots_per_rank, minlength=placement.num_ranks)
        if places.max() > buffer_experts:
            raise RoundError(f"{name}: rank {places.argmax()} needs {places.max()} places, it has {buffer_experts}")
        wrong = row_of[layers, sources] != experts
        if wrong.any() and not repair:
            at = int(np.argmax(wrong))
            raise RoundError(
                f"{name}: slot {sources[at]} of layer {layers[at]} holds expert {row_of[layers[at], sources[at]]}, "
                f"not {experts[at]}"
            )
        if max(written[layers, sources].max(), written[layers, slots].max()) > round.after:
            raise RoundError(f"{name} uses a slot that a round later than {round.after} writes")
        row_of[layers, slots] = experts
        written[layers, slots] = number
        for layer in np.unique(layers):
            present = row_of[layer][row_of[layer] != EMPTY]
            if len(np.unique(present)) != placement.num_experts:
                raise RoundError(f"{name} leaves an expert of layer {layer} without a copy")
    if target is not None and not np.array_equal(row_of, target.physical_to_logical):
        raise RoundError("the rounds do not lead to the placement asked for")


def rounds_to_array(rounds: Sequence[Round]) -> Int32Array:
    """int32 [N, 7]: all moves of all rounds, each behind its round's number and ``after``; for broadcasts."""
    parts = [
        np.column_stack([np.full((len(round.moves), 2), (round.number, round.after), dtype=np.int32), round.moves])
        for round in rounds
    ]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros((0, 7), dtype=np.int32)


def rounds_from_array(array: Int32Array, slots_per_rank: int) -> list[Round]:
    """The inverse of ``rounds_to_array``.

    Raises:
        RoundError: not int32 [N, 7], or the rounds are not in order.
    """
    if array.ndim != 2 or array.shape[1] != 7 or array.dtype != np.int32:
        raise RoundError(f"packed rounds have shape {array.shape}, {array.dtype}; expected int32 [N, 7]")
    if not len(array):
        return []
    steps = np.diff(array[:, 0], prepend=-1)
    starts = np.flatnonzero(steps)
    if not np.array_equal(array[starts, 0], np.arange(len(starts))):
        raise RoundError("packed rounds are not numbered 0, 1, 2, ... in order")
    return [
        Round(number, np.ascontiguousarray(part[:, 2:]), slots_per_rank, int(part[0, 1]))
        for number, part in enumerate(np.split(array, starts[1:]))
    ]
