# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's functions under their own names, for code that was written against them or against vLLM's copies.

Sources: https://github.com/deepseek-ai/EPLB (names, arguments and what is returned) and ``DefaultEplbPolicy`` of vLLM
0.32 (values, bit for bit: where loads are equal, order follows vLLM's NumPy code, not DeepSeek's torch code). Loads are
NumPy arrays, torch tensors (on any device) or nested lists; results are int64, torch CPU tensors where the load was a
tensor and NumPy arrays otherwise. The work is done by the C++ core of the policy "default".
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _planner
from . import default
from .inputs import as_array
from .options import PlanInputError

Int64Array = npt.NDArray[np.int64]


def balanced_packing(weight: Any, num_packs: int) -> tuple[Any, Any]:
    """Packs n weighted items into m packs of n/m items each, as evenly by weight as a greedy choice makes them.

    Args:
        weight: [X, n], numbers >= 0.
        num_packs: m, divides n.

    Returns:
        pack_index: int64 [X, n], the pack of each item.
        rank_in_pack: int64 [X, n], its place in the pack.

    Raises:
        PlanInputError: the shape or a number is out of range.
    """
    array = _checked(weight)
    _require_divides("num_packs", num_packs, "items", array.shape[1])
    place = default.pack(array, num_packs)
    per_pack = array.shape[1] // num_packs
    return _like(weight, place // per_pack), _like(weight, place % per_pack)


def replicate_experts(weight: Any, num_phy: int) -> tuple[Any, Any, Any]:
    """Gives the experts copies until there are ``num_phy``, each to the expert with the most load per copy.

    Args:
        weight: [X, num_log], numbers >= 0.
        num_phy: copies in all, at least num_log.

    Returns:
        phy2log: int64 [X, num_phy], the expert of each copy.
        rank: int64 [X, num_phy], how many copies of that expert come before it. vLLM leaves this one out.
        logcnt: int64 [X, num_log], copies of each expert.

    Raises:
        PlanInputError: the shape or a number is out of range.
    """
    array = _checked(weight)
    if num_phy < array.shape[1]:
        raise PlanInputError(f"num_phy is {num_phy}; {array.shape[1]} experts need at least {array.shape[1]} copies")
    copy_of, count = _planner.replicate(np.ascontiguousarray(array, dtype=np.float64), num_phy)
    phy2log = copy_of.astype(np.int64)
    return _like(weight, phy2log), _like(weight, _nth(phy2log)), _like(weight, count.astype(np.int64))


def rebalance_experts_hierarchical(
    weight: Any, num_physical_experts: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Any, Any, Any]:
    """Whole expert groups to nodes, redundant copies within each node, copies to the GPUs of each node.

    Args:
        weight: [L, E], tokens per logical expert and layer.
        num_physical_experts: P, slots per layer; divisible by ``num_gpus``.
        num_groups: groups of experts, divides E.
        num_nodes: divides ``num_groups`` and ``num_gpus``.
        num_gpus: ranks.

    Returns:
        physical_to_logical_map: int64 [L, P]. vLLM returns only this one.
        physical_rank: int64 [L, P], which copy of its expert a slot holds, 0, 1, ... in the order of their making.
        logical_count: int64 [L, E], copies of each expert.

    Raises:
        PlanInputError: the shape or a number is out of range.
    """
    array = _checked(weight)
    _require_divides("num_groups", num_groups, "experts", array.shape[1])
    _require_divides("num_nodes", num_nodes, "groups", num_groups)
    _require_divides("num_nodes", num_nodes, "GPUs", num_gpus)
    _require_divides("num_gpus", num_gpus, "physical experts", num_physical_experts)
    if num_physical_experts < array.shape[1]:
        raise PlanInputError(
            f"num_physical_experts is {num_physical_experts}; {array.shape[1]} experts need at least as many"
        )
    maps = _hierarchical(array, num_physical_experts, num_groups, num_nodes, num_gpus)
    return tuple(_like(weight, made) for made in maps)


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    old_global_expert_indices: Any = None,
) -> tuple[Any, Any, Any]:
    """A placement from scratch: hierarchical where the nodes can share the groups evenly, global otherwise.

    Args:
        weight: [L, E], tokens per logical expert and layer; used as float32, as DeepSeek and vLLM do.
        num_replicas: P, slots per layer; divisible by ``num_gpus``.
        num_groups: groups of experts, divides E.
        num_nodes: divides ``num_gpus``.
        num_gpus: ranks.
        old_global_expert_indices: vLLM's addition: integers [L, P], the placement in force, -1 for an empty slot, or
            more slots than P after a scale-down. Experts that stay on a GPU keep their slots.

    Returns:
        physical_to_logical_map: int64 [L, P]. vLLM returns only this one.
        logical_to_physical_map: int64 [L, E, X], the slots of each expert in the order in which its copies were
            made, -1 beyond; X is the largest count.
        expert_count: int64 [L, E], copies of each expert.

    Raises:
        PlanInputError: the shape or a number is out of range.
    """
    array = _checked(weight).astype(np.float32)
    if num_nodes < 1:
        raise PlanInputError(f"num_nodes is {num_nodes}; it must be at least 1")
    groups, nodes = default.groups_and_nodes(num_groups, num_nodes)
    slots, nth, count = rebalance_experts_hierarchical(array, num_replicas, groups, nodes, num_gpus)
    if old_global_expert_indices is not None:
        old = as_array(old_global_expert_indices)
        if old.ndim != 2 or len(old) != len(array) or old.shape[1] < num_replicas or old.dtype.kind not in "iu":
            raise PlanInputError(
                f"old_global_expert_indices has shape {old.shape}, {old.dtype}; give integers "
                f"[{len(array)}, {num_replicas}] (-1 for an empty slot), or more slots after a scale-down"
            )
        before = slots
        slots = _planner.preserve_slots(
            before.astype(np.int32), np.ascontiguousarray(old[:, :num_replicas], dtype=np.int32), num_gpus
        ).astype(np.int64)
        nth = _carried(nth, before, slots, num_gpus)
    num_layers, num_experts = array.shape
    by_expert = np.full((num_layers, num_experts, int(count.max())), -1, dtype=np.int64)
    by_expert[np.arange(num_layers)[:, None], slots, nth] = np.arange(num_replicas)
    return _like(weight, slots), _like(weight, by_expert), _like(weight, count)


def _hierarchical(
    load: npt.NDArray[Any], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    found = default.hierarchical(load, num_slots, num_groups, num_nodes, num_ranks)
    num_layers, num_experts = load.shape
    # An expert's copies are all on one node, so they are in the order of their making where the node's copies are.
    made = np.full((num_layers, num_slots), -1, dtype=np.int64)
    node_first = np.repeat(np.arange(num_nodes), num_slots // num_nodes) * (num_slots // num_nodes)
    np.put_along_axis(made, found.copy + node_first, found.slots, axis=1)
    nth = np.take_along_axis(_nth(made), found.copy + node_first, axis=1)
    count = np.empty((num_layers, num_experts), dtype=np.int64)
    np.put_along_axis(count, found.to_global, found.copies.astype(np.int64), axis=1)
    return found.slots, nth, count


def _nth(experts: Int64Array) -> Int64Array:
    """int64 like ``experts`` [X, n]: how many entries of the row before each are equal to it."""
    order = np.argsort(experts, axis=1, kind="stable")
    ordered = np.take_along_axis(experts, order, axis=1)
    place = np.broadcast_to(np.arange(experts.shape[1]), experts.shape)
    new = np.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    nth = np.empty_like(experts)
    np.put_along_axis(nth, order, place - first, axis=1)
    return nth


def _carried(nth: Int64Array, before: Int64Array, after: Int64Array, num_ranks: int) -> Int64Array:
    """``nth`` [L, P] for ``after``, which has on every rank the experts of ``before``, in other slots."""
    layers = np.broadcast_to(np.arange(len(before))[:, None], before.shape).ravel()
    ranks = np.broadcast_to(np.repeat(np.arange(num_ranks), before.shape[1] // num_ranks), before.shape).ravel()
    result = np.empty(before.size, dtype=np.int64)
    result[np.lexsort((after.ravel(), ranks, layers))] = nth.ravel()[np.lexsort((before.ravel(), ranks, layers))]
    return result.reshape(before.shape)


def _like(given: Any, result: npt.NDArray[np.int64]) -> Any:
    torch = sys.modules.get("torch")  # a caller with a tensor has imported it; the planner's process never does
    return torch.from_numpy(result) if torch is not None and isinstance(given, torch.Tensor) else result


def _checked(weight: Any) -> npt.NDArray[Any]:
    array = as_array(weight)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iuf":
        raise PlanInputError(f"the load has shape {array.shape}, {array.dtype}; give numbers [rows, experts]")
    if not (np.isfinite(array).all() and array.min() >= 0):
        raise PlanInputError("the load has entries that are negative, infinite or no numbers; give numbers >= 0")
    return array.astype(np.int64) if array.dtype.kind == "u" else array


def _require_divides(name: str, value: int, what: str, number: int) -> None:
    if value < 1 or number < 1 or number % value:
        raise PlanInputError(f"{name} is {value}; it must divide the {number} {what}")
