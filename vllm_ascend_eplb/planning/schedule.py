# SPDX-License-Identifier: Apache-2.0
"""Rounds: moves that are sent and committed together, so that a small staging buffer is enough.

``schedule_rounds`` makes a list of rounds from the ordered moves of a plan. For every such list:

- After each round every expert of every layer still has a copy.
- No rank fills more than ``buffer_experts`` staging places in a round; a copy within a rank takes a place, too.
- All sources of a round are slots that hold the expert when the round begins. All are read before any slot is written,
  so any permutation of slots within a round is legal.
- A group that fits into the buffer is not split, unless it has more moves than ranks and would cost many rounds whole.
  A larger group (policy "default": a whole layer) is decomposed by :mod:`.groups`. One staging place per rank suffices.
- After all rounds the placement is the one that all moves lead to.
- An expert with two slots on a rank is sent there once; the rank copies it from one slot to the other.

``Round.after`` limits how far rounds may overlap: a round reads and writes no slot that a round later than ``after``
writes. The scheduler keeps the plan's order per receiving rank. The ranks with most left to receive go first, so that
the number of rounds stays near the bound ceil(receives of the busiest rank / buffer).

One file, because choosing a round's moves, relaying and looking for a better order work on the same lists.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..values.placement import EMPTY, Placement
from ..values.rounds import NONE, Round, RoundError, receive_bound
from ..values.topology import Topology
from .groups import Move, Slots, checked_rows, fitting_groups

TOLERANCE = 1.1
"""Rounds over the bound, as a ratio; a second try is made only above it."""


def schedule_rounds(
    placement: Placement,
    moves: npt.NDArray[np.integer],
    topology: Topology,
    buffer_experts: int,
    *,
    overlap: bool = True,
    relay: bool = True,
) -> list[Round]:
    """Rounds that lead from ``placement`` to the placement after all ``moves``.

    Args:
        placement: the placement in force.
        moves: integers [M, 4], rows (layer, slot, expert, group) as in ``Plan.moves``; the placement after every
            group is valid.
        topology: the node of each rank; sources on the same rank, then on the same node are preferred.
        buffer_experts: staging places of a rank per round, at least 1.
        overlap: arrange rounds so that each may be in flight while the one before is being agreed, where possible.
        relay: send an expert that several ranks of a node need across the node boundary once, and from there to the
            others, where that delays nothing.

    Returns:
        Rounds in order; the same on every machine for the same arguments.

    Raises:
        RoundError: a move or the buffer is out of range, the topology has another number of ranks, a group leaves an
            expert without a copy, or a rank's slots cannot be permuted with this buffer (message names the way out).
    """
    if buffer_experts < 1:
        raise RoundError(f"a staging buffer of {buffer_experts} experts holds nothing; give at least 1")
    if topology.num_ranks != placement.num_ranks:
        raise RoundError(f"the topology has {topology.num_ranks} ranks, the placement {placement.num_ranks}")
    rows = checked_rows(placement, moves)
    best: list[Round] | None = None
    whole_groups = 0
    for most_moves, sends in ((None, 1.0), (None, 1.5), (placement.num_ranks, 1.5)):
        # Try whole groups and level senders first; relax them only if they cost many rounds.
        groups = fitting_groups(placement, rows, buffer_experts, most_moves)
        if best is not None and most_moves is not None and len(groups) == whole_groups:
            break  # none was taken apart
        whole_groups = len(groups)
        most_sends = max(1, int(sends * buffer_experts))
        rounds = _Scheduler(placement, groups, topology, buffer_experts, most_sends, overlap, relay).run()
        if best is None or len(rounds) < len(best):
            best = rounds
        bound = receive_bound(placement, best, buffer_experts)
        if len(best) <= max(bound + 1, TOLERANCE * bound):
            break
    return best or []


@dataclass(eq=False)
class _Group:
    """A group that is not yet in a round."""

    order: int
    moves: list[Move]
    places: dict[int, int]
    """Staging places it needs, by rank."""
    change: dict[tuple[int, int], int] = field(default_factory=dict)
    """Net change of copies by (layer, expert)."""
    done: bool = False


class _Scheduler:
    """List scheduling of groups into rounds: ranks with most left to receive choose first."""

    SCAN = 64
    """Most groups of a rank that are tried per round without fitting."""

    def __init__(
        self,
        placement: Placement,
        groups: list[list[Move]],
        topology: Topology,
        buffer_experts: int,
        most_sends: int,
        overlap: bool,
        relay: bool,
    ) -> None:
        self.size, self.topology, self.buffer = placement.slots_per_rank, topology, buffer_experts
        self.most_sends = most_sends  # of a rank per round, for moves that are not urgent
        self.overlap, self.relay = overlap, relay and topology.num_nodes > 1
        self.state = Slots(placement)
        self.holders: dict[tuple[int, int], list[int]] = defaultdict(list)
        """Slots by (layer, expert), kept only for experts that move."""
        self.left = [0] * placement.num_ranks
        """Staging places still needed, by rank."""
        self.waiting: list[list[_Group]] = [[] for _ in range(placement.num_ranks)]
        self.writers: dict[tuple[int, int], deque[_Group]] = defaultdict(deque)
        """Waiting groups by (layer, slot), in order: only the first may write."""
        self.touching: dict[tuple[int, int], list[_Group]] = defaultdict(list)
        """Waiting groups by (layer, expert) whose copies they change, in order."""
        self.bringing: dict[tuple[int, int, int], deque[_Group]] = defaultdict(deque)
        """Waiting groups by (layer, expert, rank) to which they bring it, in order: only the first may send it."""
        self.written: dict[tuple[int, int], int] = {}
        """The latest round that writes a (layer, slot)."""
        self.wanted: Counter[tuple[int, int, int]] = Counter()
        """Waiting moves by (layer, expert, node)."""
        self.groups = [self._enter(order, moves) for order, moves in enumerate(groups)]
        wanted_experts = {(layer, expert) for layer, expert, _ in self.wanted}
        for layer, expert in wanted_experts:
            self.holders[layer, expert] = []
        for layer in {layer for layer, _ in wanted_experts}:
            for slot, expert in enumerate(self.state.expert_in[layer]):
                if (layer, expert) in self.holders:
                    self.holders[layer, expert].append(slot)

    def _enter(self, order: int, moves: list[Move]) -> _Group:
        group = _Group(order, moves, dict(Counter(slot // self.size for _, slot, _ in moves)))
        change: Counter[tuple[int, int]] = Counter()
        for layer, slot, expert in moves:
            earlier = self.writers[layer, slot]
            old = self._written_by(earlier[-1], layer, slot) if earlier else self.state.expert_in[layer][slot]
            if old != EMPTY:
                change[layer, old] -= 1
            change[layer, expert] += 1
            earlier.append(group)
            self.wanted[layer, expert, self.topology.node_of_rank[slot // self.size]] += 1
            self.bringing[layer, expert, slot // self.size].append(group)
        group.change = {key: delta for key, delta in change.items() if delta}
        for key in group.change:
            self.touching[key].append(group)
        for rank, places in group.places.items():
            self.left[rank] += places
            self.waiting[rank].append(group)
        return group

    @staticmethod
    def _written_by(group: _Group, layer: int, slot: int) -> int:
        return next(move[2] for move in group.moves if move[:2] == (layer, slot))

    def run(self) -> list[Round]:
        rounds: list[Round] = []
        while any(self.left):
            chosen = self._choose(len(rounds), self.overlap) or self._choose(len(rounds), False)
            if not chosen:
                raise RoundError("no group fits into a round; the moves are not valid in their order")
            rounds.append(self._finish(len(rounds), chosen))
        return rounds

    def _choose(self, number: int, overlap: bool) -> list[_Group]:
        """Groups for one round: first those that the bound on the number of rounds needs, then others that fit well."""
        self.room = [self.buffer] * len(self.left)
        self.new_copies: Counter[tuple[int, int]] = Counter()
        self.busy_slots: set[tuple[int, int]] = set()
        self.sending = [0] * len(self.left)
        self.crossing: set[tuple[int, int, int]] = set()
        self.arriving: set[tuple[int, int, int]] = set()
        self.closed = number - 1 if overlap else number
        """Slots written by this round or later ones are neither read nor written."""
        chosen: list[_Group] = []
        fewest = max(-(-left // self.buffer) for left in self.left)
        order = sorted(range(len(self.left)), key=lambda rank: -self.left[rank])
        for urgent in (True, False):
            before = -1
            while len(chosen) > before:  # an expert that has just got a new place may be overwritten in its old one
                before = len(chosen)
                for rank in order:
                    # what this rank must receive now so that the rest fits into one round fewer
                    must = self.left[rank] - self.buffer * (fewest - 1) if urgent else self.buffer
                    self._fill(rank, must, urgent, number, chosen)
        if not chosen:
            for rank in order:
                self._fill(rank, self.buffer, True, number, chosen)
        return chosen

    def _fill(self, rank: int, places: int, urgent: bool, number: int, chosen: list[_Group]) -> None:
        missed, kept = 0, self.waiting[rank]
        for group in kept:
            if missed > self.SCAN or self.room[rank] <= 0 or self.buffer - self.room[rank] >= places:
                break
            if group.done:
                continue
            if self._fits(group, urgent, number):
                self._take(group)
                chosen.append(group)
            else:
                missed += 1
        if len(kept) > 2 * self.left[rank] + 8:
            self.waiting[rank] = [group for group in kept if not group.done]

    def _fits(self, group: _Group, urgent: bool, number: int) -> bool:
        if any(self.room[rank] < places for rank, places in group.places.items()):
            return False
        for layer, slot, expert in group.moves:
            if (
                (layer, slot) in self.busy_slots
                or self.written.get((layer, slot), NONE) >= self.closed
                or self.writers[layer, slot][0] is not group
            ):
                return False
            sources = self._sources(layer, expert)
            if not sources or self._is_sent_in_vain(group, layer, slot, expert, sources):
                return False
            if not urgent and not self._worthwhile(layer, slot, expert, sources):
                return False
        return all(delta > 0 or self._survives(key, group, delta) for key, delta in group.change.items())

    def _sources(self, layer: int, expert: int) -> list[int]:
        return [slot for slot in self.holders[layer, expert] if self.written.get((layer, slot), NONE) < self.closed]

    def _is_sent_in_vain(self, group: _Group, layer: int, slot: int, expert: int, sources: list[int]) -> bool:
        """Whether the rank can copy the expert from its own slot in a later round: from a slot just written, or from
        one that an earlier group will write."""
        rank = slot // self.size
        if any(source // self.size == rank for source in sources):
            return False
        if any(held // self.size == rank for held in self.holders[layer, expert]):
            return True
        return (layer, expert, rank) in self.arriving or self.bringing[layer, expert, rank][0] is not group

    def _worthwhile(self, layer: int, slot: int, expert: int, sources: list[int]) -> bool:
        """Whether a move that is not urgent should go into this round."""
        rank = slot // self.size
        node = self.topology.node_of_rank[rank]
        ranks = {source // self.size for source in sources}
        if rank in ranks:
            return True
        near = {source for source in ranks if self.topology.node_of_rank[source] == node}
        if self.relay and not near:
            if (layer, expert, node) in self.crossing:
                return False  # it crosses to this node in this round; a later round takes it from there
            if any(self.topology.node_of_rank[holder // self.size] == node for holder in self.holders[layer, expert]):
                return False  # it has just arrived on this node
        return min(self.sending[source] for source in (near or ranks)) < self.most_sends

    def _survives(self, key: tuple[int, int], group: _Group, delta: int) -> bool:
        """Whether the expert keeps a copy if this group goes before the earlier groups that still wait."""
        layer, expert = key
        copies = self.state.copies[layer][expert] + self.new_copies[key] + delta
        if copies < 1:
            return False
        for waiting in self.touching[key]:
            if waiting is group:
                return True
            if not waiting.done:
                copies += waiting.change[key]
                if copies < 1:
                    return False
        return True

    def _take(self, group: _Group) -> None:
        group.done = True
        for rank, places in group.places.items():
            self.room[rank] -= places
            self.left[rank] -= places
        for key, delta in group.change.items():
            self.new_copies[key] += delta
            self.touching[key].remove(group)
        for layer, slot, expert in group.moves:
            self.busy_slots.add((layer, slot))
            self.writers[layer, slot].popleft()
            self.bringing[layer, expert, slot // self.size].remove(group)
            self.arriving.add((layer, expert, slot // self.size))
            rank = slot // self.size
            node = self.topology.node_of_rank[rank]
            self.wanted[layer, expert, node] -= 1
            ranks = {source // self.size for source in self._sources(layer, expert)}
            if rank in ranks:
                continue
            near = [source for source in ranks if self.topology.node_of_rank[source] == node]
            if not near:
                self.crossing.add((layer, expert, node))
            self.sending[min(near or ranks, key=lambda source: (self.sending[source], source))] += 1

    def _finish(self, number: int, chosen: list[_Group]) -> Round:
        chosen.sort(key=lambda group: group.order)
        moves = [(move, group.order) for group in chosen for move in group.moves]
        candidates = [self._best_sources(layer, slot, expert) for (layer, slot, expert), _ in moves]
        sources = level_senders(candidates, self.size, len(self.left), [move[1] for move, _ in moves])
        rows = np.array(
            [(*move, order, source) for (move, order), source in zip(moves, sources, strict=True)], dtype=np.int32
        )
        after = max(
            self.written.get((layer, used), NONE)
            for (layer, slot, _), source in zip((m for m, _ in moves), sources, strict=True)
            for used in (slot, source)
        )
        for group in chosen:
            for layer, slot, expert in group.moves:
                old = self.state.expert_in[layer][slot]
                if (layer, old) in self.holders:
                    self.holders[layer, old].remove(slot)
                self.holders[layer, expert].append(slot)
                self.written[layer, slot] = number
            self.state.apply(group.moves)
        return Round(number, rows, self.size, after)

    def _best_sources(self, layer: int, slot: int, expert: int) -> list[int]:
        """The nearest slots that hold the expert: on the same rank, else on the same node, else anywhere."""
        sources, rank = sorted(self._sources(layer, expert)), slot // self.size
        own = [source for source in sources if source // self.size == rank]
        node = self.topology.node_of_rank[rank]
        return own[:1] or [s for s in sources if self.topology.node_of_rank[s // self.size] == node] or sources


def level_senders(
    candidates: Sequence[Sequence[int]], slots_per_rank: int, num_ranks: int, slots: Sequence[int]
) -> list[int]:
    """Chooses one source per move such that the busiest sender sends as little as possible.

    Starts from the least busy sender for each move, then shifts sends along augmenting paths from the busiest rank to
    one that sends at least two less, until there is none: the optimum of this assignment problem.

    Args:
        candidates: per move the slots that may be its source, at least one.
        slots_per_rank: S.
        num_ranks: R.
        slots: per move its destination; a source on the same rank is not a send.

    Returns:
        Per move its source slot.
    """
    sends = [0] * num_ranks
    chosen = [-1] * len(candidates)
    by_rank: list[set[int]] = [set() for _ in range(num_ranks)]
    remote = []
    for move, sources in enumerate(candidates):
        if sources[0] // slots_per_rank == slots[move] // slots_per_rank:
            chosen[move] = sources[0]
        else:
            remote.append(move)
    slot_on = [{slot // slots_per_rank: slot for slot in reversed(sources)} for sources in candidates]
    for move in sorted(remote, key=lambda m: (len(slot_on[m]), m)):
        rank = min(slot_on[move], key=lambda r: (sends[r], r))
        chosen[move] = slot_on[move][rank]
        by_rank[rank].add(move)
        sends[rank] += 1
    while remote:
        most = max(sends)
        path = next(
            (p for r in range(num_ranks) if sends[r] == most and (p := _shift(r, by_rank, slot_on, sends))), None
        )
        if path is None:
            break
        for move, source, target in path:
            by_rank[source].remove(move)
            by_rank[target].add(move)
            chosen[move] = slot_on[move][target]
        sends[path[0][1]] -= 1
        sends[path[-1][2]] += 1
    return chosen


def _shift(
    start: int, by_rank: list[set[int]], slot_on: list[dict[int, int]], sends: list[int]
) -> list[tuple[int, int, int]] | None:
    """A chain of (move, from rank, to rank) that takes one send off ``start``, or None."""
    came: dict[int, tuple[int, int]] = {start: (-1, -1)}
    queue = deque([start])
    while queue:
        rank = queue.popleft()
        if sends[rank] <= sends[start] - 2:
            path = []
            while rank != start:
                move, source = came[rank]
                path.append((move, source, rank))
                rank = source
            return path[::-1]
        for move in sorted(by_rank[rank]):
            for target in sorted(slot_on[move]):
                if target not in came:
                    came[target] = (move, rank)
                    queue.append(target)
    return None
