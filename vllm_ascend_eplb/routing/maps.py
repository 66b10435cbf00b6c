# SPDX-License-Identifier: Apache-2.0
"""DispatchMaps, RoutingTables: the tensors that a model's routers read to turn logical expert ids into physical ones.

Their addresses never change, so that captured graphs and compiled code keep working. A new placement is prepared on the
host while serving goes on; its commit only enqueues copies.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import torch

from ..load.ops import entries_of
from ..values.placement import Placement
from .pinned import PinnedRows


class _Prepared:
    """New rows of tensors, prepared commit by commit.

    Args:
        tensors: tensors [L, ...] on one device.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = tensors
        self.pinned = PinnedRows(tensors[0].device)
        self._waiting: deque[tuple[list[int], list[torch.Tensor]]] = deque()

    def add(self, layers: list[int], *rows: npt.NDArray[np.signedinteger]) -> None:
        """Adds the rows of the next commit, [len(layers), ...] for each tensor; from any thread."""
        self._waiting.append((layers, [self.pinned.rows(row) for row in rows]))

    def commit(self) -> None:
        """Puts the oldest prepared rows in force; only enqueues copies on the current stream."""
        layers, hosts = self._waiting.popleft()
        for tensor, host in zip(self._tensors, hosts, strict=True):
            for i, layer in enumerate(layers):
                tensor[layer].copy_(host[i], non_blocking=True)
        self.pinned.keep(*hosts)

    def forget(self) -> None:
        """Drops what was not committed."""
        self._waiting.clear()


class MapError(ValueError):
    """A placement that does not fit into the maps."""


class DispatchMaps:
    """Logical-to-physical maps of all layers on the device.

    Args:
        placement: the placement to start with.
        device: device of the routers.
        width: entries per expert, W: the most replicas that an expert can get.

    Attributes:
        logical_to_physical: int64 [L, E, W], slots of each expert, padded with -1.
        replica_count: int64 [L, E].

    Raises:
        MapError: an expert of ``placement`` has more than ``width`` replicas.
    """

    def __init__(self, placement: Placement, device: torch.device | str, width: int) -> None:
        if placement.replica_count.max() > width:
            raise MapError(f"an expert has {placement.replica_count.max()} replicas; the maps hold {width}")
        self.width = width
        self.device = torch.device(device)
        self.logical_to_physical = torch.from_numpy(placement.logical_to_physical(width).astype(np.int64)).to(device)
        self.replica_count = torch.from_numpy(placement.replica_count.astype(np.int64)).to(device)
        self.prepared = _Prepared(self.logical_to_physical, self.replica_count)

    def prepare(self, placement: Placement, layers: list[int]) -> None:
        """Computes the rows of ``layers`` under ``placement`` for the next unprepared commit.

        May be called for several commits ahead, in order, from another thread than the commits.

        Raises:
            MapError: an expert has more replicas than the maps have entries.
        """
        if placement.replica_count.max() > self.width:
            raise MapError(f"an expert gets {placement.replica_count.max()} replicas; the maps hold {self.width}")
        part = _layers_of(placement, layers)
        slots = part.logical_to_physical(self.width).astype(np.int64)
        self.prepared.add(layers, slots, part.replica_count.astype(np.int64))

    def commit(self) -> None:
        """Switches to the oldest prepared placement; only enqueues copies on the current stream."""
        self.prepared.commit()

    def forget_prepared(self) -> None:
        """Drops what was prepared and not committed."""
        self.prepared.forget()


ROUTING_ROWS = 1024
"""Rows of a routing table, as in vllm-ascend's own."""


def rows_by_token(
    slots: npt.NDArray[np.signedinteger], valid: npt.NDArray[np.signedinteger], offset: int = 0
) -> npt.NDArray[np.int32]:
    """A routing table with the choices of :func:`~vllm_ascend_eplb.load.ops.entries_of`, a row for each token.

    Args:
        slots: int [L, E, W], slots that take an expert's tokens in turn.
        valid: int [L, E], valid entries of each row of ``slots``, 1..W.
        offset: added to the entry that a token takes, modulo the valid entries.

    Returns:
        int32 [L, ROUTING_ROWS, E].
    """
    tokens, experts = torch.arange(ROUTING_ROWS).unsqueeze(1), torch.arange(slots.shape[1])
    valid_entries = torch.from_numpy(valid.astype(np.int64)).unsqueeze(1)
    entries = (entries_of(tokens, experts, valid_entries) + offset) % valid_entries
    taken: npt.NDArray[np.signedinteger] = np.take_along_axis(slots.transpose(0, 2, 1), entries.numpy(), axis=1)
    return np.ascontiguousarray(taken, dtype=np.int32)


class RoutingTables:
    """Routing tables of all layers on the device: token n of a batch takes ``table[layer, n % ROUTING_ROWS, expert]``.

    Args:
        placement: the placement to start with.
        device: device of the routers.
        offset: replicas by which a token's choice is shifted. Ranks that route their own tokens use consecutive
            offsets, so that their n-th tokens take different replicas, even if each rank has a single token. Ranks that
            route the same tokens must use the same offset.

    Attributes:
        table: int32 [L, ROUTING_ROWS, E], slots.
    """

    def __init__(self, placement: Placement, device: torch.device | str, offset: int = 0) -> None:
        self._offset = offset
        self.table = torch.from_numpy(self._rows(placement)).to(device)
        self.prepared = _Prepared(self.table)

    def _rows(self, placement: Placement) -> npt.NDArray[np.int32]:
        counts = placement.replica_count
        return rows_by_token(placement.logical_to_physical(int(counts.max())), counts, self._offset)

    def prepare(self, placement: Placement, layers: list[int]) -> None:
        """Computes the tables of ``layers`` under ``placement`` for the next unprepared commit; from any thread, in
        order."""
        self.prepared.add(layers, self._rows(_layers_of(placement, layers)))

    def commit(self) -> None:
        """Puts the oldest prepared tables in force; only enqueues copies on the current stream."""
        self.prepared.commit()

    def forget_prepared(self) -> None:
        """Drops what was prepared and not committed."""
        self.prepared.forget()


def _layers_of(placement: Placement, layers: list[int]) -> Placement:
    return Placement(placement.physical_to_logical[layers], placement.num_experts, placement.num_ranks)
