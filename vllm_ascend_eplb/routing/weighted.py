# SPDX-License-Identifier: Apache-2.0
"""DispatchTables: weighted dispatch, which changes the shares of replicas without a transfer.

A table [E, K] per layer has K slots for each expert; the op ``map_and_record`` sends each token to one of them. The
frequency of a slot in a row is its share of the expert's tokens. The tables have buffers of their own: the maps and
replica counts (:class:`~vllm_ascend_eplb.routing.maps.DispatchMaps`) do not change. Addresses never change, so that
captured graphs see every new table.

Equal entries of a row stand side by side, because the op goes through a row in golden-ratio steps, which meet every
stretch of the row evenly. If each rank routes its own tokens (regime *owned*), the rows of rank r of R are turned by
r/R of a row. So ranks with a single token each take different replicas. In every other regime all ranks must route a
token alike, so the tables are equal byte for byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..planning.shares import ShareError, entry_counts
from ..values.placement import EMPTY, FloatArray, Placement
from .maps import rows_by_token
from .pinned import PinnedRows

ENTRIES = range(16, 65)
"""Allowed widths K of a table."""


class TableError(ShareError):
    """The width of a table is out of range."""


def even_shares(placement: Placement) -> FloatArray:
    """float64 [L, P]: the same share for all replicas of an expert, 0 for an empty slot."""
    slots = placement.physical_to_logical
    counts = np.take_along_axis(placement.replica_count, np.maximum(slots, 0).astype(np.int64), axis=1)
    shares: FloatArray = np.where(slots == EMPTY, 0.0, 1.0 / counts)
    return shares


def table_rows(placement: Placement, shares: npt.ArrayLike, entries: int) -> npt.NDArray[np.int64]:
    """Rows that realise shares to within one entry.

    Args:
        placement: placement [L, P] of the layers.
        shares: float [L, P], an argument of :func:`~vllm_ascend_eplb.planning.shares.entry_counts`, or its result.
        entries: K.

    Returns:
        int64 [L, E, K], equal entries side by side.

    Raises:
        ShareError: the shares cannot be turned into a table.
    """
    return _arranged(placement, entry_counts(placement, shares, entries))


def _arranged(placement: Placement, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows [L, E, K] in which each slot stands ``counts`` [L, P] times."""
    slots = placement.physical_to_logical
    layers, places = np.nonzero(counts)
    order = np.lexsort((places, slots[layers, places], layers))
    rows: npt.NDArray[np.int64] = np.repeat(places[order], counts[layers, places][order]).astype(np.int64)
    return rows.reshape(len(slots), placement.num_experts, -1)


class DispatchTables:
    """The dispatch tables of all layers on the device.

    Args:
        placement: the placement to start with, with even shares.
        device: device of the routers.
        entries: K, 16..64: the resolution of the shares.
        rank, num_ranks: given only if each rank routes its own tokens: this rank's rows are turned by rank/num_ranks of
            a row.

    Attributes:
        table: int64 [L, E, K], slots.
        count: int64 [L, E], valid entries of each row; always K.
        shares: float64 [L, P] on the host: the shares in force after the copies that are under way.

    Raises:
        TableError: ``entries`` is out of range.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device | str,
        entries: int = 32,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if entries not in ENTRIES:
            raise TableError(f"a table of {entries} entries per expert; allowed are {ENTRIES[0]}..{ENTRIES[-1]}")
        self.entries, self.device = entries, torch.device(device)
        self._turn = rank * entries // num_ranks
        self.shares = even_shares(placement)
        self.table = torch.from_numpy(self._rows(placement, entry_counts(placement, self.shares, entries))).to(device)
        shape = (placement.num_layers, placement.num_experts)
        self.count = torch.full(shape, entries, dtype=torch.int64, device=device)
        self._prepared: deque[TableRows] = deque()
        self._pinned = PinnedRows(self.device)

    def _rows(self, placement: Placement, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.signedinteger]:
        return np.ascontiguousarray(np.roll(_arranged(placement, counts), -self._turn, axis=2))

    def prepare(self, placement: Placement, layers: Sequence[int], shares: npt.ArrayLike | None = None) -> None:
        """Computes the rows of ``layers`` for the next unprepared commit; from any thread, in order.

        Args:
            placement: the placement in force after the commit.
            layers: the layers that change.
            shares: float [len(layers), P] for these layers; None splits evenly (experts of these layers have moved).

        Raises:
            ShareError: the shares cannot be turned into a table.
        """
        self._prepared.append(self._make(placement, list(layers), shares))

    def rows_of(self, placement: Placement, shares: npt.ArrayLike) -> TableRows:
        """The rows of all layers, for :meth:`put`; from any thread.

        Args:
            placement: the placement in force when the rows are put.
            shares: float [L, P], or the counts of :func:`~vllm_ascend_eplb.planning.shares.entry_counts`.

        Raises:
            ShareError: the shares cannot be turned into a table.
        """
        return self._make(placement, list(range(placement.num_layers)), shares)

    def _make(self, placement: Placement, layers: list[int], shares: npt.ArrayLike | None) -> TableRows:
        part = Placement(placement.physical_to_logical[layers], placement.num_experts, placement.num_ranks)
        counts = entry_counts(part, even_shares(part) if shares is None else shares, self.entries)
        return TableRows(layers, self._pinned.rows(self._rows(part, counts)), counts / self.entries)

    def commit(self) -> None:
        """Puts the oldest prepared rows in force; only enqueues copies on the current stream."""
        self.put(self._prepared.popleft())

    def put(self, prepared: TableRows) -> None:
        """Puts rows in force; only enqueues copies on the current stream."""
        for i, layer in enumerate(prepared.layers):
            self.table[layer].copy_(prepared.rows[i], non_blocking=True)
        self.shares[prepared.layers] = prepared.shares
        self._pinned.keep(prepared.rows)

    def forget_prepared(self) -> None:
        """Drops what was prepared and not committed."""
        self._prepared.clear()


class RoutingDispatchTables(DispatchTables):
    """Dispatch tables for routers that read a row of slots for each token.

    See :class:`~vllm_ascend_eplb.routing.maps.RoutingTables`.

    Attributes:
        table: int32 [L, ROUTING_ROWS, E], slots.
    """

    def _rows(self, placement: Placement, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.signedinteger]:
        rows = super()._rows(placement, counts)
        return rows_by_token(rows, np.full(rows.shape[:2], self.entries))


@dataclass(frozen=True)
class TableRows:
    """New rows of a table.

    Attributes:
        layers: the layers that they are for.
        rows: the rows of each of these layers.
        shares: float64 [len(layers), P], the shares that the rows realise.
    """

    layers: list[int]
    rows: torch.Tensor
    shares: FloatArray
