# SPDX-License-Identifier: Apache-2.0
"""Chooses the transports that carry the weights of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..agreement.exchange import exchange_bytes
from ..values.topology import Topology
from .gloo import GlooTransport, StagedGlooTransport
from .slots import ExpertSlots
from .transport import Streams, TransferError, Transport

ALLOWED = {"cpu": ("auto", "gloo"), "cuda": ("auto", "gloo", "pull", "nccl")}
"""Transports by device; other devices have ``ALLOWED_ELSEWHERE``."""


ALLOWED_ELSEWHERE = ("auto", "gloo", "hccl")


@dataclass(frozen=True)
class Peers:
    """The ranks that share experts.

    Attributes:
        group: process group of all ranks with a CPU backend; None for a single rank.
        device_group: process group with a device backend, or None.
        rank, num_ranks: this rank among all.
        topology: the node of each rank.
    """

    group: Any
    device_group: Any
    rank: int
    num_ranks: int
    topology: Topology


def choose(
    wanted: str, slots: ExpertSlots, peers: Peers, streams: Streams, *, cooperative_kernels: bool
) -> list[Transport]:
    """The transports of this rank; the first one that reaches a pair of ranks carries their experts. All ranks call it
    together.

    Args:
        wanted: one of ``ALLOWED`` for the device.
        slots: the slots whose experts are carried.
        peers: the ranks.
        streams: streams of the device.
        cooperative_kernels: whether the engine launches kernels that need all cores of a GPU at once.

    Raises:
        TransferError: the transport cannot work here; the message names transports that can.
    """
    kind = slots.device.type
    allowed = ALLOWED.get(kind, ALLOWED_ELSEWHERE)
    if wanted not in allowed:
        raise TransferError(f"transport {wanted!r} does not work on {kind}; allowed are {', '.join(allowed)}")
    if peers.num_ranks == 1:
        return []
    if kind == "cpu":
        return [GlooTransport(peers.group)]
    if wanted in ("nccl", "hccl") or (wanted == "auto" and kind != "cuda" and peers.device_group is not None):
        from .collective import CollectiveTransport

        return [CollectiveTransport(peers.device_group, streams, cooperative_kernels=cooperative_kernels)]
    chosen: list[Transport] = []
    if kind == "cuda" and wanted in ("auto", "pull"):
        pull, apart, pairs = _pull(slots, peers, streams)
        if wanted == "pull" and apart:
            why = pull.failures.get(apart[0][0], "they are on different nodes, or a peer failed")
            raise TransferError(
                f"transport pull: rank {apart[0][1]} cannot read the memory of rank {apart[0][0]} ({why}); "
                "choose transport auto or gloo"
            )
        if len(apart) < pairs:
            chosen.append(pull)
        if not apart:
            return chosen
    chosen.append(StagedGlooTransport(peers.group, streams, slots.row_bytes, slots.buffer_experts))
    return chosen


def _pull(slots: ExpertSlots, peers: Peers, streams: Streams) -> tuple[Any, list[tuple[int, int]], int]:
    """The pull transport within nodes, the (source, reader) pairs that it does not reach, and the number of pairs."""
    from .pull import PullTransport

    def exchange(data: bytes) -> list[bytes]:
        return exchange_bytes(peers.group, peers.num_ranks, data)

    ranks = range(peers.num_ranks)
    near = [peers.topology.same_node(peers.rank, peer) for peer in ranks]
    pull = PullTransport(slots.live, peers.rank, peers.num_ranks, near, exchange, streams)
    pairs = [(a, b) for a in ranks for b in ranks if a != b]
    return pull, [pair for pair in pairs if not pull.reaches(*pair)], len(pairs)
