# SPDX-License-Identifier: Apache-2.0
"""The "default" policy: DeepSeek's hierarchical and global algorithm, bit for bit as vLLM's DefaultEplbPolicy runs it.

Source of the algorithm: https://github.com/deepseek-ai/EPLB. Float32 sums and sort orders are taken from NumPy by the
same calls as in vLLM, because both (pairwise SIMD sums, unstable sorts) differ between NumPy builds; everything else is
done by the C++ core.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import Int32Array


def rebalance(
    load: npt.NDArray[np.float32], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int, old: Int32Array
) -> Int32Array:
    """The placement that ``DefaultEplbPolicy.rebalance_experts`` returns.

    Args:
        load: float32 [L, E], tokens per logical expert.
        num_slots: slots per layer, P; divisible by ``num_ranks``.
        num_groups: expert groups; where they cannot be shared evenly by the nodes the global algorithm is used.
        num_nodes: nodes; divides ``num_ranks``.
        num_ranks: ranks, R.
        old: int32 [L, P], the placement in force; experts that stay on a rank keep their slots.

    Returns:
        int32 [L, P].
    """
    hierarchy = hierarchical(load, num_slots, *groups_and_nodes(num_groups, num_nodes), num_ranks)
    return _planner.preserve_slots(hierarchy.slots.astype(np.int32), old, num_ranks)


def groups_and_nodes(num_groups: int, num_nodes: int) -> tuple[int, int]:
    """What the hierarchical algorithm is called with: 1, 1 (the global one) where nodes cannot share the groups."""
    return (1, 1) if num_groups % num_nodes else (num_groups, num_nodes)


class Hierarchy(NamedTuple):
    """What the hierarchical algorithm found.

    Attributes:
        slots: int64 [L, P], the expert in each slot.
        copy: int64 [L, P], the number of the copy in each slot, where each node counts its copies in the order in which
            they were made: its experts first, then the redundant ones.
        to_global: int64 [L, E], the experts node by node.
        copies: int32 [L, E], copies of each expert, in the order of ``to_global``.
    """

    slots: npt.NDArray[np.int64]
    copy: npt.NDArray[np.int64]
    to_global: npt.NDArray[np.int64]
    copies: npt.NDArray[np.int32]


def hierarchical(
    load: npt.NDArray[np.floating], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Hierarchy:
    """Whole groups to nodes, redundant copies within each node, copies to the ranks of each node.

    Args:
        load: floating [L, E]; what is divided evenly by all of the following.
    """
    num_layers, num_experts = load.shape
    group_size = num_experts // num_groups
    experts_per_node = num_experts // num_nodes

    # 1. Whole groups to nodes; to_global[l] lists the layer's experts node by node.
    group_load = load.reshape(num_layers, num_groups, group_size).sum(axis=-1)
    group_place = pack(group_load, num_nodes)
    to_local = (group_place[..., None] * group_size + np.arange(group_size)).reshape(num_layers, num_experts)
    to_global = _inverse(to_local)

    # 2. Redundant copies within each node.
    local_load = np.take_along_axis(load, to_global, axis=1).reshape(-1, experts_per_node)
    copy_of, count = _planner.replicate(np.ascontiguousarray(local_load, dtype=np.float64), num_slots // num_nodes)

    # 3. Copies to the ranks of each node.
    copy_load = np.take_along_axis(local_load / count.astype(np.int64), copy_of.astype(np.int64), axis=1)
    copy_in_slot = _inverse(pack(copy_load, num_ranks // num_nodes))
    local = np.take_along_axis(copy_of.astype(np.int64), copy_in_slot, axis=1).reshape(num_layers, num_nodes, -1)
    local = (local + np.arange(num_nodes)[None, :, None] * experts_per_node).reshape(num_layers, -1)
    return Hierarchy(
        np.take_along_axis(to_global, local, axis=1),
        copy_in_slot.reshape(num_layers, num_slots),
        to_global,
        count.reshape(num_layers, num_experts),
    )


def pack(weight: npt.NDArray[np.floating], packs: int) -> npt.NDArray[np.int64]:
    """int64 [X, n]: the place of each item of ``weight`` [X, n] when balanced packs are laid out in a row."""
    order = np.argsort(-weight, axis=-1)
    place: npt.NDArray[np.int64] = _planner.pack_balanced(
        weight.astype(np.float64), order.astype(np.int64), packs
    ).astype(np.int64)
    return place


def _inverse(permutation: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The inverse of each row of ``permutation`` [X, n]."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None, :], axis=1)
    return inverse
