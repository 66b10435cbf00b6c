# SPDX-License-Identifier: Apache-2.0
"""Elastic expert parallelism: another number of ranks for the same experts, with the weights that are there.

A *rank mapping* gives every old rank its new number, or -1 where it leaves; new numbers that no old rank gets are those
of ranks that join. The slots of a rank stay its own, so the number of slots per layer changes with that of ranks.

::

    depart   while leaving ranks are still there: what only they hold goes to those that stay, over the old group
    arrive   once joining ranks are there: their slots, EMPTY so far, are filled from the others, over the new group
    recover  after ranks were lost with their experts: the same as depart, but from what survived

All three plan with the policy "incremental", so that ranks that stay receive few experts. ``carry_out`` moves the
weights in rounds while serving stands still. Load is counted per logical expert, so it is valid for any number of
ranks; ``hand_over`` passes on what leaving ranks counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..agreement.channel import Agreed, ControlChannel, Facts
from ..load.recorder import LoadRecorder
from ..planning import plan
from ..planning.schedule import schedule_rounds
from ..transfer.loader import D2DExpertWeightLoader
from ..transfer.transport import TransferError
from ..values.placement import EMPTY, Int32Array, Placement
from ..values.plan import Plan
from ..values.rounds import Round
from ..values.topology import Topology

GONE = -1
"""The new rank of an old rank that leaves."""


class ElasticError(ValueError):
    """A change of ranks that cannot be carried out; says why and what would work."""


class ExpertsLostError(ElasticError):
    """Experts of which no rank holds a copy any more.

    Attributes:
        experts: (layer, expert) of all of them.
    """

    def __init__(self, experts: list[tuple[int, int]]) -> None:
        shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        super().__init__(
            f"{len(experts)} experts are gone with the ranks that held their only copies: {shown}{more}; load them "
            "again from the model's files, or restart the server"
        )
        self.experts = experts


@dataclass(frozen=True)
class Departure:
    """What happens over the old group before ranks leave.

    Attributes:
        moves: int32 [M, 4], rows (layer, slot, expert, group) with the old slots' numbers, as in ``Plan.moves``.
        last: the placement over the old ranks after the moves; leaving ranks still hold what they held.
        after: the placement over the ranks that stay, under their new numbers; no slot is empty.
    """

    moves: Int32Array
    last: Placement
    after: Placement


def check_mapping(rank_mapping: Sequence[int], num_old: int, num_new: int) -> None:
    """Raises:
    ElasticError: the mapping does not name every old rank, or gives a new number twice or out of range.
    """
    if len(rank_mapping) != num_old:
        raise ElasticError(f"the mapping names {len(rank_mapping)} ranks; there are {num_old}, each needs an entry")
    stay = [new for new in rank_mapping if new != GONE]
    if num_new < 1 or any(not 0 <= new < num_new for new in stay) or len(set(stay)) != len(stay):
        raise ElasticError(
            f"the mapping {list(rank_mapping)} gives new ranks that are not all different or not in 0..{num_new - 1}; "
            f"use each at most once, and {GONE} for a rank that leaves"
        )
    if not stay:
        raise ElasticError("no rank stays, so no expert does; keep at least one rank")


def remap(placement: Placement, rank_mapping: Sequence[int], num_ranks: int) -> Int32Array:
    """int32 [L, S * num_ranks]: the slots of ranks that stay under their new numbers, EMPTY on ranks that join. Experts
    that only leaving ranks hold are missing.

    Raises:
        ElasticError: the mapping is not valid.
    """
    check_mapping(rank_mapping, placement.num_ranks, num_ranks)
    size = placement.slots_per_rank
    by_rank = np.full((placement.num_layers, num_ranks, size), EMPTY, dtype=np.int32)
    old = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, size)
    for rank, new in enumerate(rank_mapping):
        if new != GONE:
            by_rank[:, new] = old[:, rank]
    return by_rank.reshape(placement.num_layers, -1)


def missing_experts(slots: Int32Array, num_experts: int) -> list[tuple[int, int]]:
    """(layer, expert) of all experts that no slot of ``slots`` [L, P] holds."""
    held = np.zeros((len(slots), num_experts + 1), dtype=bool)
    held[np.arange(len(slots))[:, None], slots] = True  # EMPTY falls into the last, dropped column
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(~held[:, :num_experts])]


def depart(
    placement: Placement, rank_mapping: Sequence[int], load: npt.ArrayLike, topology: Topology, num_groups: int = 1
) -> Departure:
    """Plans a scale-down.

    Args:
        placement: in force over the old ranks.
        rank_mapping: per old rank its new number or ``GONE``; new numbers are 0 .. number of ranks that stay - 1.
        load: numbers [L, E], tokens per logical expert.
        topology: the node of each rank that stays, by new number.
        num_groups: groups of experts as the model routes them.

    Raises:
        ElasticError: the mapping is not valid, or the ranks that stay have fewer slots than there are experts.
    """
    slots = _remapped(placement, rank_mapping, topology)
    after = _settle(slots, placement.num_experts, load, topology, num_groups)
    return _departure(placement, rank_mapping, after)


def recover(
    placement: Placement, rank_mapping: Sequence[int], load: npt.ArrayLike, topology: Topology, num_groups: int = 1
) -> tuple[Placement, Plan]:
    """Plans what follows when ranks were lost with their experts; arguments as for ``depart``.

    Returns:
        The placement that survived, over the ranks that are left, and the plan that balances it.

    Raises:
        ExpertsLostError: experts had no copy on a rank that is left; names them.
        ElasticError: the mapping is not valid.
    """
    lost = missing_experts(remap(placement, rank_mapping, topology.num_ranks), placement.num_experts)
    if lost:
        raise ExpertsLostError(lost)
    slots = _remapped(placement, rank_mapping, topology)
    survived = Placement(slots, placement.num_experts, topology.num_ranks)
    after = _settle(slots, placement.num_experts, load, topology, num_groups)
    return survived, Plan.between(survived, after.physical_to_logical, load, "elastic")


def arrive(
    placement: Placement, rank_mapping: Sequence[int], load: npt.ArrayLike, topology: Topology, num_groups: int = 1
) -> tuple[Placement, Plan]:
    """Plans a scale-up. Arguments as for ``depart``; no rank leaves, and ``topology`` counts those that join.

    Returns:
        The placement over the new ranks when they have joined, their slots EMPTY, and the plan that fills these.

    Raises:
        ElasticError: the mapping is not valid, or a rank leaves.
    """
    if GONE in rank_mapping:
        raise ElasticError(f"rank {list(rank_mapping).index(GONE)} leaves while others join; let it depart first")
    slots = _remapped(placement, rank_mapping, topology)
    joined = Placement(slots, placement.num_experts, topology.num_ranks)
    after = _settle(slots, placement.num_experts, load, topology, num_groups)
    return joined, Plan.between(joined, after.physical_to_logical, load, "elastic")


def carry_out(
    placement: Placement,
    moves: Int32Array,
    loader: D2DExpertWeightLoader,
    channel: ControlChannel,
    topology: Topology,
    max_resends: int = 2,
) -> list[Round]:
    """Moves the weights of ``moves``; all ranks of the loader's group together. Blocks; nothing is served meanwhile.

    Args:
        placement: in force over the ranks of the group.
        moves: int32 [M, 4], equal on all ranks.
        loader: made over the group, its checksums learned under ``placement``.
        channel: over the same ranks, with a lag of 0.
        topology: the node of each rank.
        max_resends: how often a round may be sent again whose checksums did not match.

    Returns:
        The rounds carried out.

    Raises:
        TransferError: a round could not be prepared, sent, or received undamaged, on some rank. What was committed
            before stays, equally on all ranks.
    """
    if channel.lag:
        raise TransferError(f"the channel has a lag of {channel.lag}; moving at once needs a lag of 0")
    rounds = schedule_rounds(placement, moves, topology, loader.buffer_experts)
    loader.forget()
    for sent in rounds:
        for _ in range(max_resends + 1):
            _send(sent, placement, loader, channel)
            if _agree(channel, loader, placement, sent.number).min.rounds_intact > sent.number:
                break
        else:
            raise TransferError(f"round {sent.number} arrived damaged {max_resends + 1} times")
        loader.commit(sent.number)
        placement = placement.with_moves(sent.moves)
    loader.forget()
    return rounds


def _send(round_: Round, placement: Placement, loader: D2DExpertWeightLoader, channel: ControlChannel) -> None:
    """Prepares and issues a round, and returns when it has arrived everywhere."""
    error = ""
    try:
        loader.prepare(round_)
    except TransferError as caught:
        error = str(caught)
    while True:
        agreed = _agree(channel, loader, placement, round_.number, failed=bool(error))
        if agreed.max.failure:
            raise TransferError(error or f"another rank could not prepare round {round_.number}")
        if agreed.min.ready:
            break
        time.sleep(0.0005)
    loader.issue(round_.number)
    while _agree(channel, loader, placement, round_.number).min.rounds_done <= round_.number:
        loader.tick()
        time.sleep(0.0005)


def _agree(
    channel: ControlChannel, loader: D2DExpertWeightLoader, placement: Placement, number: int, failed: bool = False
) -> Agreed:
    channel.post(
        Facts(
            step=number,
            placement=placement.digest,
            ready=int(not failed and loader.ready(number)),
            failure=int(failed),
            poisoned=int(loader.poisoned),
            rounds_done=loader.rounds_done,
            rounds_intact=loader.rounds_intact,
        )
    )
    agreed = channel.read()
    assert agreed is not None  # with a lag of 0
    if agreed.max.poisoned:
        raise TransferError(f"the transfer of round {number} failed: {loader.error or 'on another rank'}")
    if agreed.min.placement != agreed.max.placement:
        raise TransferError(f"the ranks hold different placements at round {number}")
    return agreed


def hand_over(recorder: LoadRecorder, channel: ControlChannel, keeper: bool) -> None:
    """Passes the load counted so far on to the ranks that stay; all old ranks together, before any leaves. Blocks.

    Args:
        recorder: this rank's; flushed before.
        channel: over the old ranks.
        keeper: whether this rank keeps the sum of all ranks; on exactly one rank that stays. The others keep nothing,
            so that every token stays counted once.
    """
    total = channel.sum_everywhere(recorder.window())
    recorder.restore_window(total if keeper else np.zeros_like(total), recorder.steps)


def _remapped(placement: Placement, rank_mapping: Sequence[int], topology: Topology) -> Int32Array:
    slots = remap(placement, rank_mapping, topology.num_ranks)
    if slots.shape[1] < placement.num_experts:
        least = -(-placement.num_experts // placement.slots_per_rank)
        raise ElasticError(
            f"{topology.num_ranks} ranks of {placement.slots_per_rank} slots hold {slots.shape[1]} experts of a layer, "
            f"which has {placement.num_experts}; keep at least {least} ranks"
        )
    return slots


def _settle(slots: Int32Array, num_experts: int, load: npt.ArrayLike, topology: Topology, num_groups: int) -> Placement:
    """A balanced placement without empty slots that changes little of ``slots``."""
    weight = np.asarray(load, dtype=np.float64)
    weight = np.maximum(weight, 1e-6 * max(1.0, float(weight.max(initial=0.0))))  # cold experts are spread as well
    full = slots.copy()
    for layer, row in enumerate(full):
        _cover(row, weight[layer], topology.num_ranks)
        _fill(row, weight[layer], topology.num_ranks)
    made = plan(weight, full, topology.num_ranks, topology.num_blocks, num_groups)
    return Placement(made.physical_to_logical, num_experts, topology.num_ranks)


def _cover(row: Int32Array, weight: npt.NDArray[np.float64], num_ranks: int) -> None:
    """Gives every expert that no slot of ``row`` [P] holds an empty slot, or that of a copy that is missed least."""
    count = np.bincount(row[row != EMPTY], minlength=len(weight))
    lost = np.flatnonzero(count == 0)
    for expert in lost[np.argsort(-weight[lost], kind="stable")]:
        rank_load = _rank_load(row, weight, count, num_ranks)
        best = min(
            (slot for slot in range(len(row)) if row[slot] == EMPTY or count[row[slot]] > 1),
            key=lambda slot: (
                0.0 if row[slot] == EMPTY else weight[row[slot]] / (count[row[slot]] - 1),
                rank_load[slot * num_ranks // len(row)],
            ),
        )
        if row[best] != EMPTY:
            count[row[best]] -= 1
        row[best] = expert
        count[expert] += 1


def _fill(row: Int32Array, weight: npt.NDArray[np.float64], num_ranks: int) -> None:
    """Gives every empty slot of ``row`` [P] the expert with most load per copy that its rank lacks."""
    size = len(row) // num_ranks
    count = np.bincount(row[row != EMPTY], minlength=len(weight))
    for place in range(size):  # by turns, so that the joining ranks share the heavy experts
        for rank in range(num_ranks):
            slot = rank * size + place
            if row[slot] != EMPTY:
                continue
            share = weight / count
            share[row[rank * size : (rank + 1) * size][row[rank * size : (rank + 1) * size] != EMPTY]] = -1.0
            row[slot] = int(np.argmax(share))
            count[row[slot]] += 1


def _rank_load(
    row: Int32Array, weight: npt.NDArray[np.float64], count: npt.NDArray[np.intp], num_ranks: int
) -> npt.NDArray[np.float64]:
    share = np.append(weight / np.maximum(count, 1), 0.0)  # EMPTY takes the zero
    total: npt.NDArray[np.float64] = share[row].reshape(num_ranks, -1).sum(axis=1)
    return total


def _departure(placement: Placement, rank_mapping: Sequence[int], after: Placement) -> Departure:
    size = placement.slots_per_rank
    by_rank = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, size).copy()
    new = after.physical_to_logical.reshape(placement.num_layers, after.num_ranks, size)
    for rank, its_new in enumerate(rank_mapping):
        if its_new != GONE:
            by_rank[:, rank] = new[:, its_new]
    wanted = by_rank.reshape(placement.num_layers, -1)
    made = Plan.between(placement, wanted, np.ones((placement.num_layers, placement.num_experts)), "elastic")
    last = Placement(made.physical_to_logical, placement.num_experts, placement.num_ranks)
    return Departure(made.moves, last, after)
