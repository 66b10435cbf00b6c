# SPDX-License-Identifier: Apache-2.0
"""Start placements, and the moves from one placement to another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


def greedy_placement(load: FloatArray, num_slots: int, num_ranks: int) -> Slots:
    """Place experts greedily like DeepSeek, but none twice on a rank: the placement in force when the load changes."""
    num_layers, num_experts = load.shape
    per_rank = num_slots // num_ranks
    slots = np.empty((num_layers, num_slots), dtype=np.int32)
    for layer in range(num_layers):
        count = np.ones(num_experts, dtype=int)
        for _ in range(num_slots - num_experts):
            open_experts = np.where(count < num_ranks, load[layer] / count, -1.0)
            count[int(np.argmax(open_experts))] += 1
        share = load[layer] / count
        held: list[list[int]] = [[] for _ in range(num_ranks)]
        total = np.zeros(num_ranks)
        closed = np.zeros((num_experts, num_ranks), dtype=bool)  # the rank is full, or holds the expert
        # Experts with copies first where they would run out of ranks: otherwise heaviest replica first.
        for expert in np.argsort(-share, kind="stable"):
            for _ in range(count[expert]):
                rank = int(np.argmin(np.where(closed[expert], np.inf, total)))
                if closed[expert, rank]:
                    rank = _make_room(held, int(expert), per_rank)
                    for full, experts in enumerate(held):
                        closed[:, full] = len(experts) == per_rank
                        closed[experts, full] = True
                held[rank].append(int(expert))
                total[rank] += share[expert]
                closed[expert, rank] = True
                if len(held[rank]) == per_rank:
                    closed[:, rank] = True
        slots[layer] = np.concatenate(held)
    return slots


def _make_room(held: list[list[int]], expert: int, per_rank: int) -> int:
    """Moves an expert so that a rank without ``expert`` has a free slot; returns that rank."""
    free = next(r for r in range(len(held)) if len(held[r]) < per_rank)
    for rank, experts in enumerate(held):
        if expert in experts:
            continue
        for held_expert in experts:
            if held_expert not in held[free]:
                experts.remove(held_expert)
                held[free].append(held_expert)
                return rank
    raise RuntimeError("no rank can take the expert")


def contiguous_placement(num_layers: int, num_experts: int, num_ranks: int, num_slots: int) -> Slots:
    """Each rank holds the next experts in order, and the first of the rank after it once more."""
    own, extra = num_experts // num_ranks, num_slots // num_ranks - num_experts // num_ranks
    first = np.arange(num_ranks)[:, None] * own
    row = np.concatenate([first + np.arange(own), first + own + np.arange(extra)], axis=1) % num_experts
    return np.tile(row.reshape(-1).astype(np.int32), (num_layers, 1))


def receipts(before: Slots, after: Slots, num_ranks: int) -> npt.NDArray[np.int64]:
    """int64 [R]: experts that each rank holds after and did not before, over all layers."""
    num_layers = len(before)
    old, new = (slots.reshape(num_layers, num_ranks, 1, -1) for slots in (before, after))
    first = np.sort(new[:, :, 0], axis=2)
    fresh = ~(first[..., None] == old).any(axis=3)
    fresh[..., 1:] &= first[..., 1:] != first[..., :-1]
    return np.asarray(fresh.sum(axis=(0, 2)))
