# SPDX-License-Identifier: Apache-2.0
"""Topology: which ranks share a node, so that a transfer need not leave it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topology:
    """The node of every rank.

    Attributes:
        node_of_rank: one integer per rank; ranks with equal integers share a host.

    Example (4 ranks on 2 hosts)::

        >>> t = Topology((0, 0, 1, 1))
        >>> t.same_node(0, 1), t.same_node(1, 2), t.ranks_of(1)
        (True, False, (2, 3))
    """

    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_of_rank", tuple(int(node) for node in self.node_of_rank))
        if not self.node_of_rank:
            raise ValueError("a topology needs at least one rank; give the node of each rank, for example (0, 0, 1, 1)")

    @classmethod
    def even(cls, num_ranks: int, num_nodes: int = 1) -> Topology:
        """Ranks in order, the same number on each node.

        Raises:
            ValueError: ``num_ranks`` is not divisible by ``num_nodes``.
        """
        if num_nodes < 1 or num_ranks < 1 or num_ranks % num_nodes:
            raise ValueError(
                f"{num_ranks} ranks cannot be shared evenly by {num_nodes} nodes; name the node of each rank"
            )
        per_node = num_ranks // num_nodes
        return cls(tuple(rank // per_node for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_of_rank))

    @property
    def num_blocks(self) -> int:
        """The number of nodes to plan with: all of them if each has the same number of ranks, in a row; otherwise 1, so
        that the plan knows no nodes."""
        ranks, nodes = self.num_ranks, self.num_nodes
        if ranks % nodes:
            return 1
        first = self.node_of_rank[:: ranks // nodes]
        even = tuple(node for node in first for _ in range(ranks // nodes))
        return nodes if even == self.node_of_rank and len(set(first)) == nodes else 1

    def same_node(self, a: int, b: int) -> bool:
        return self.node_of_rank[a] == self.node_of_rank[b]

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """The ranks on ``node``, in order."""
        return tuple(rank for rank, own in enumerate(self.node_of_rank) if own == node)


def host_identity() -> str:
    """A text that is equal for the processes of one host and differs between hosts, or between containers that have
    names of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"
