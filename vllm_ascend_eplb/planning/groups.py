# SPDX-License-Identifier: Apache-2.0
"""Groups of moves that must be committed together, cut to fit a staging buffer.

A move that drops a redundant copy is a group of its own. The other moves of a layer are then a permutation of slots. A
cycle of this permutation that does not fit is cut into shorter ones; each cut costs one extra copy. One staging place
per rank is enough (two if there is only one rank).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..values.placement import EMPTY, Placement
from ..values.rounds import RoundError

Move = tuple[int, int, int]
"""(layer, slot, expert)"""


def checked_rows(placement: Placement, moves: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    rows = np.asarray(moves, dtype=np.int64)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise RoundError(f"moves have shape {rows.shape}; expected [M, 4] with rows (layer, slot, expert, group)")
    for column, name, limit in (
        (0, "layer", placement.num_layers),
        (1, "slot", placement.num_slots),
        (2, "expert", placement.num_experts),
    ):
        bad = (rows[:, column] < 0) | (rows[:, column] >= limit)
        if bad.any():
            at = int(np.argmax(bad))
            raise RoundError(f"move {at} names {name} {rows[at, column]}; allowed are 0..{limit - 1}")
    if np.any(np.diff(rows[:, 3]) < 0):
        raise RoundError("moves are not ordered by group")
    return rows


class Slots:
    """Contents of all slots and replica counts, changed in place."""

    def __init__(self, placement: Placement) -> None:
        self.expert_in: list[list[int]] = placement.physical_to_logical.tolist()
        self.copies: list[list[int]] = placement.replica_count.tolist()

    def apply(self, moves: Iterable[Move]) -> None:
        for layer, slot, expert in moves:
            old = self.expert_in[layer][slot]
            if old != EMPTY:
                self.copies[layer][old] -= 1
            self.copies[layer][expert] += 1
            self.expert_in[layer][slot] = expert


def fitting_groups(
    placement: Placement, rows: npt.NDArray[np.int64], buffer_experts: int, most_moves: int | None
) -> list[list[Move]]:
    """Groups in order, valid one after the other, none of which needs more than ``buffer_experts`` places of a rank.

    If ``most_moves`` is given, groups of more moves are taken apart, too. No group brings an expert to a rank twice:
    the rank makes the second copy itself, in a later group."""
    state, size = Slots(placement), placement.slots_per_rank
    result: list[list[Move]] = []
    bounds = np.flatnonzero(np.diff(rows[:, 3])) + 1
    for part in np.split(rows, bounds) if len(rows) else []:
        if len({(int(row[0]), int(row[1])) for row in part}) != len(part):
            raise RoundError(f"group {part[0, 3]} writes one slot twice")
        group: list[Move] = [
            (int(layer), int(slot), int(expert))
            for layer, slot, expert, _ in part
            if state.expert_in[int(layer)][int(slot)] != expert
        ]
        if not group:
            continue
        whole = group
        group, again = _split_repeated(whole, size)
        dropped = {(layer, state.expert_in[layer][slot]) for layer, slot, _ in whole} - {(m[0], EMPTY) for m in whole}
        fits = max(Counter(slot // size for _, slot, _ in group).values()) <= buffer_experts
        if fits and (most_moves is None or len(group) <= most_moves):
            pieces = [group]
        else:
            pieces = []
            by_layer: dict[int, list[Move]] = defaultdict(list)
            for move in group:
                by_layer[move[0]].append(move)
            for layer, in_layer in by_layer.items():
                pieces += _decompose(layer, in_layer, state, size, placement.num_slots, buffer_experts)
        # Postponing these moves loses nothing: their slots keep what they hold, and the first copy is there.
        pieces += [[move] for move in again]
        for piece in pieces:
            state.apply(piece)
        for layer, expert in dropped:
            if state.copies[layer][expert] < 1:
                raise RoundError(f"group {part[0, 3]} leaves expert {expert} of layer {layer} without a copy")
        result += pieces
    return result


def _split_repeated(group: list[Move], size: int) -> tuple[list[Move], list[Move]]:
    """The moves that bring an expert to a rank first, and those that bring it there again."""
    first: dict[tuple[int, int, int], Move] = {}
    for move in group:
        first.setdefault((move[0], move[1] // size, move[2]), move)
    kept = set(first.values())
    return list(first.values()), [move for move in group if move not in kept]


def _decompose(
    layer: int, moves: list[Move], state: Slots, size: int, num_slots: int, buffer_experts: int
) -> list[list[Move]]:
    """Cuts one layer's change into groups that are valid in order and fit into the buffer.

    A move that drops a redundant copy is a group of its own. Every remaining move drops the last copy of an expert. So
    the same experts are dropped and added, and the remaining moves are a permutation of slots.
    """
    held, copies = list(state.expert_in[layer]), list(state.copies[layer])
    dropping: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        dropping[held[move[1]]].append(move)
    pieces: list[list[Move]] = []
    ready = deque(move for move in moves if held[move[1]] == EMPTY or copies[held[move[1]]] > 1)
    left = dict.fromkeys(moves)
    while ready:
        move = ready.popleft()
        old = held[move[1]]
        if move not in left or (old != EMPTY and copies[old] < 2):
            continue
        del left[move]
        pieces.append([move])
        if old != EMPTY:
            copies[old] -= 1
        copies[move[2]] += 1
        held[move[1]] = move[2]
        ready.extend(waiting for waiting in dropping.get(move[2], ()) if waiting in left)
    source_of = {held[slot]: slot for _, slot, _ in left}
    next_slot = {}
    for _, slot, expert in left:
        if expert not in source_of:
            raise RoundError(f"a group drops the last copy of expert {held[slot]} in layer {layer}, slot {slot}")
        next_slot[slot] = source_of[expert]
    while next_slot:
        first, slot = next(iter(next_slot.items()))
        cycle = [first]
        del next_slot[first]
        while slot != first:
            cycle.append(slot)
            slot = next_slot.pop(slot)
        pieces += _cut_cycle(layer, cycle, held, size, num_slots, buffer_experts)
    return pieces


def _cut_cycle(
    layer: int, cycle: list[int], held: list[int], size: int, num_slots: int, buffer_experts: int
) -> list[list[Move]]:
    """Groups that together let each slot of ``cycle`` take what the next one holds.

    A leading part of the cycle is turned by itself. All its slots but the last are then final. The last one holds what
    the cycle's last slot needs, so it stands for the whole part in the remaining cycle.
    """
    pieces: list[list[Move]] = []
    while len(cycle) > 1:
        ranks = [slot // size for slot in cycle]
        if buffer_experts == 1 and len(set(ranks)) == 1:
            helper = next((slot for slot in range(num_slots) if slot // size != ranks[0] and held[slot] != EMPTY), None)
            if helper is None:
                raise RoundError("slots of a single rank change places; that takes a staging buffer of 2 experts")
            head, rest = [cycle[0], helper], [*cycle, helper]
            pieces.append([(layer, a, held[b]) for a, b in zip(head, head[::-1], strict=True)])
            held[head[0]], held[head[1]] = held[head[1]], held[head[0]]
            cycle = rest
            continue
        if buffer_experts == 1:
            turn = next(i for i in range(len(cycle)) if ranks[i] != ranks[(i + 1) % len(cycle)])
            cycle = cycle[turn:] + cycle[:turn]
        used: Counter[int] = Counter()
        length = 0
        for slot in cycle:
            if used[slot // size] == buffer_experts:
                break
            used[slot // size] += 1
            length += 1
        head = cycle[:length]
        turned = head[1:] + head[:1]
        piece = [(layer, a, held[b]) for a, b in zip(head, turned, strict=True)]
        for _, slot, expert in piece:
            held[slot] = expert
        pieces.append(piece)
        cycle = cycle[length - 1 :] if length < len(cycle) else []
    return pieces
