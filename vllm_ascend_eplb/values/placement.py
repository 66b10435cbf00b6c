# SPDX-License-Identifier: Apache-2.0
"""Placement: which logical expert every slot of every layer holds.

Words (used everywhere in this package):

- *logical expert*: an expert of the model, ``0..E-1`` in each MoE layer.
- *slot* (physical expert): a place that holds one expert's weights, ``0..P-1`` in each layer; rank ``r`` of ``R`` owns
  the slots ``r*S .. (r+1)*S-1`` with ``S = P / R``.
- *replica*: a slot seen from its logical expert. Redundant experts: ``P - E``.
- *load*: tokens per logical expert, ``[L, E]``.
- *PAR*: peak-to-average ratio of the ranks' load in a layer; 1.0 is perfect.

A placement is built only through checked constructors and never changes; everything else (replica counts, inverse
maps, expert maps of a rank, loads of ranks) is derived from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

EMPTY = -1
"""The entry of a slot that holds no expert (a rank that has just joined)."""


Int32Array = npt.NDArray[np.int32]


FloatArray = npt.NDArray[np.float64]


class PlacementError(ValueError):
    """A placement, or a change to one, that no server may serve from."""


class Placement:
    """Where every copy of every expert lives.

    Args:
        physical_to_logical: integers [L, P]; entry ``[l, p]`` is the logical expert in slot ``p`` of MoE layer ``l``,
            or -1 for an empty slot. Copied, kept as read-only int32.
        num_experts: logical experts per layer, E.
        num_ranks: ranks that share the slots evenly, R.

    Raises:
        PlacementError: the array is not [L, P] of integers, P is not divisible by R, an entry is out of range, or an
            expert has no copy. The message names the first offending layer and slot or expert.

    Example (1 layer, 4 experts, 2 ranks, 2 redundant experts)::

        >>> p = Placement([[0, 1, 2, 3, 0, 1]], num_experts=4, num_ranks=2)
        >>> p.replica_count.tolist()
        [[2, 2, 1, 1]]
        >>> p.expert_map(1).tolist()
        [[1, 2, -1, 0]]
    """

    def __init__(self, physical_to_logical: npt.ArrayLike, num_experts: int, num_ranks: int) -> None:
        array = np.asarray(physical_to_logical)
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
            raise PlacementError(
                f"a placement is a non-empty integer array [layers, slots]; got {array.dtype} of shape {array.shape}"
            )
        if num_experts < 1 or num_ranks < 1:
            raise PlacementError(f"need at least 1 expert and 1 rank; got {num_experts} experts, {num_ranks} ranks")
        num_slots = array.shape[1]
        if num_slots % num_ranks:
            raise PlacementError(
                f"{num_slots} slots per layer cannot be shared evenly by {num_ranks} ranks; "
                f"change the number of redundant experts by {-num_slots % num_ranks}"
            )
        bad = np.argwhere((array < EMPTY) | (array >= num_experts))
        if bad.size:
            layer, slot = (int(i) for i in bad[0])
            raise PlacementError(
                f"layer {layer}, slot {slot} (rank {slot * num_ranks // num_slots}) holds expert {array[layer, slot]}; "
                f"allowed are 0..{num_experts - 1}, or -1 for an empty slot"
            )
        slots = np.array(array, dtype=np.int32, order="C")
        slots.setflags(write=False)
        self._slots: Int32Array = slots
        self.num_experts = int(num_experts)
        self.num_ranks = int(num_ranks)
        missing = np.argwhere(self.replica_count == 0)
        if missing.size:
            layer, expert = (int(i) for i in missing[0])
            raise PlacementError(
                f"layer {layer}: expert {expert} has no copy in any slot ({len(missing)} such experts in all); "
                f"every expert needs at least one"
            )

    @classmethod
    def initial(cls, num_layers: int, num_experts: int, num_ranks: int, num_redundant: int = 0) -> Placement:
        """The placement that vLLM's weight loader fills: experts in order, then redundant copies of experts 0, 1, ...

        Raises:
            PlacementError: ``num_redundant`` is negative or exceeds ``num_experts * (num_ranks - 1)``, or the slots
                cannot be shared evenly.
        """
        if num_layers < 1 or num_experts < 1:
            raise PlacementError(f"need at least 1 layer and 1 expert; got {num_layers} layers, {num_experts} experts")
        most = num_experts * (num_ranks - 1)
        if not 0 <= num_redundant <= most:
            raise PlacementError(
                f"{num_redundant} redundant experts; allowed are 0..{most} "
                f"({num_experts} experts on each of {num_ranks} ranks but one)"
            )
        row = np.arange(num_experts + num_redundant, dtype=np.int32) % num_experts
        return cls(np.tile(row, (num_layers, 1)), num_experts, num_ranks)

    @property
    def physical_to_logical(self) -> Int32Array:
        """int32 [L, P], read-only: the logical expert of each slot, -1 where empty."""
        return self._slots

    @property
    def num_layers(self) -> int:
        return int(self._slots.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots per layer over all ranks, P."""
        return int(self._slots.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots per layer of one rank, S."""
        return self.num_slots // self.num_ranks

    @cached_property
    def replica_count(self) -> Int32Array:
        """int32 [L, E]: number of slots that hold each expert."""
        counts = np.zeros((self.num_layers, self.num_experts + 1), dtype=np.int32)
        layers = np.broadcast_to(np.arange(self.num_layers)[:, None], self._slots.shape)
        np.add.at(counts, (layers, self._slots), 1)  # entry -1 falls into the last, dropped column
        counts = np.ascontiguousarray(counts[:, : self.num_experts])
        counts.setflags(write=False)
        return counts

    def logical_to_physical(self, width: int | None = None) -> Int32Array:
        """int32 [L, E, width]: the slots of each expert in rising order, padded with -1.

        Args:
            width: entries per expert; default the largest replica count.

        Raises:
            PlacementError: an expert has more than ``width`` replicas.
        """
        most = int(self.replica_count.max())
        width = most if width is None else width
        if width < most:
            raise PlacementError(f"an expert has {most} replicas, more than the {width} entries asked for")
        table = np.full((self.num_layers, self.num_experts, width), -1, dtype=np.int32)
        layers, slots = np.nonzero(self._slots != EMPTY)
        experts = self._slots[layers, slots]
        order = np.lexsort((slots, experts, layers))
        layers, slots, experts = layers[order], slots[order], experts[order]
        key = layers * self.num_experts + experts
        starts = np.r_[0, np.flatnonzero(np.diff(key)) + 1]
        nth = np.arange(len(key)) - np.repeat(starts, np.diff(np.r_[starts, len(key)]))
        table[layers, experts, nth] = slots
        return table

    def expert_map(self, rank: int) -> Int32Array:
        """int32 [L, E]: the local slot (0..S-1) of each expert on ``rank``, -1 where the rank does not hold it.

        Where a rank holds an expert twice the first slot counts.
        """
        first = rank * self.slots_per_rank
        local = self._slots[:, first : first + self.slots_per_rank]
        table = np.full((self.num_layers, self.num_experts), -1, dtype=np.int32)
        for slot in reversed(range(self.slots_per_rank)):
            layers = np.flatnonzero(local[:, slot] != EMPTY)
            table[layers, local[layers, slot]] = slot
        return table

    @cached_property
    def num_duplicates(self) -> int:
        """Slots, over all layers, that hold an expert their rank already has in a lower slot."""
        by_rank = np.sort(self._slots.reshape(self.num_layers, self.num_ranks, -1), axis=2)
        return int(np.count_nonzero((by_rank[..., 1:] == by_rank[..., :-1]) & (by_rank[..., 1:] != EMPTY)))

    def slot_load(self, load: npt.ArrayLike) -> FloatArray:
        """float64 [L, P]: tokens per slot when every expert's load [L, E] is split evenly over its replicas."""
        per_replica = np.asarray(load, dtype=np.float64) / self.replica_count
        if per_replica.shape != (self.num_layers, self.num_experts):
            raise PlacementError(f"load has shape {np.shape(load)}; expected {(self.num_layers, self.num_experts)}")
        padded = np.pad(per_replica, ((0, 0), (0, 1)))  # an empty slot (-1) takes the zero column
        return np.take_along_axis(padded, self._slots.astype(np.int64), axis=1)

    def rank_load(self, load: npt.ArrayLike) -> FloatArray:
        """float64 [L, R]: tokens per rank when every expert's load [L, E] is split evenly over its replicas."""
        total: FloatArray = self.slot_load(load).reshape(self.num_layers, self.num_ranks, -1).sum(axis=2)
        return total

    def par(self, load: npt.ArrayLike, rank_speed: npt.ArrayLike | None = None) -> FloatArray:
        """float64 [L]: peak-to-average ratio of the ranks' load per layer; 1.0 for a layer without load. With
        ``rank_speed`` [R] it is the longest time of a rank over that of a perfect split."""
        by_rank = self.rank_load(load)
        if rank_speed is None:
            return peak_to_average(by_rank)
        speed = np.asarray(rank_speed, dtype=np.float64)
        longest, best = (by_rank / speed).max(axis=1), by_rank.sum(axis=1) / speed.sum()
        ratio: FloatArray = np.divide(longest, best, out=np.ones_like(best), where=best > 0)
        return ratio

    def with_moves(self, moves: Iterable[Iterable[int]] | npt.NDArray[Any]) -> Placement:
        """A new placement after all ``moves`` (rows that begin with layer, slot, expert) took place at once.

        Raises:
            PlacementError: a layer or slot is out of range, or the result is not a valid placement.
        """
        rows = np.asarray(list(moves) if not isinstance(moves, np.ndarray) else moves, dtype=np.int64)
        if not rows.size:
            return self
        layers, slots, experts = rows[:, 0], rows[:, 1], rows[:, 2]
        bad = (layers < 0) | (layers >= self.num_layers) | (slots < 0) | (slots >= self.num_slots)
        if bad.any():
            row = rows[int(np.argmax(bad))]
            raise PlacementError(
                f"a move names layer {row[0]}, slot {row[1]}; "
                f"allowed are layers 0..{self.num_layers - 1} and slots 0..{self.num_slots - 1}"
            )
        after = self._slots.copy()
        out_of_range = (experts < 0) | (experts >= self.num_experts)
        if out_of_range.any():
            row = rows[int(np.argmax(out_of_range))]
            raise PlacementError(
                f"a move puts expert {row[2]} into layer {row[0]}, slot {row[1]}; "
                f"allowed are experts 0..{self.num_experts - 1}"
            )
        after[layers, slots] = experts
        return Placement(after, self.num_experts, self.num_ranks)

    @cached_property
    def digest(self) -> int:
        """A hash of shape and contents, 0 <= digest < 2**62, equal on every machine and in every process."""
        shape = f"{self.num_layers},{self.num_slots},{self.num_experts},{self.num_ranks};".encode()
        data = hashlib.blake2b(shape + self._slots.astype("<i4").tobytes(), digest_size=8).digest()
        return int.from_bytes(data, "little") >> 2

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (self.num_experts, self.num_ranks) == (other.num_experts, other.num_ranks) and np.array_equal(
            self._slots, other._slots
        )

    def __hash__(self) -> int:
        return self.digest

    def __repr__(self) -> str:
        return (
            f"Placement({self.num_layers} layers, {self.num_experts} experts, {self.num_slots} slots on "
            f"{self.num_ranks} ranks, digest {self.digest:016x})"
        )


def peak_to_average(rank_load: npt.ArrayLike) -> FloatArray:
    """float64 [...]: largest over mean along the last axis of ``rank_load`` [..., R]; 1.0 where all loads are zero."""
    loads = np.asarray(rank_load, dtype=np.float64)
    mean = loads.mean(axis=-1)
    ratio: FloatArray = np.divide(loads.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)
    return ratio


Int64Array = npt.NDArray[np.int64]
