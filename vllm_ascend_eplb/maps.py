# SPDX-License-Identifier: Apache-2.0
"""DispatchMaps: the tensors that a model's routers read to turn logical expert ids into physical ones.

Their addresses never change, so that captured graphs and compiled code keep working. A new placement is prepared on the
host while serving goes on; its commit only enqueues copies.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from .placement import Placement


class MapError(ValueError):
    """A placement that does not fit into the maps."""


class DispatchMaps:
    """Logical-to-physical maps of all layers on the device.

    Args:
        placement: the one to start with.
        device: where the routers run.
        width: entries per expert, W: the most replicas that an expert can get.

    Attributes:
        logical_to_physical: int64 [L, E, W], slots of each expert, -1 beyond its replicas.
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
        self._prepared: deque[tuple[list[int], torch.Tensor, torch.Tensor]] = deque()
        self._in_use: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=2)

    def prepare(self, placement: Placement, layers: list[int]) -> None:
        """Computes the rows of ``layers`` under ``placement`` for the next commit that has none yet.

        May be called for several commits ahead, in order, from another thread than the commits.

        Raises:
            MapError: an expert has more replicas than the maps are wide.
        """
        if placement.replica_count.max() > self.width:
            raise MapError(f"an expert gets {placement.replica_count.max()} replicas; the maps hold {self.width}")
        part = Placement(placement.physical_to_logical[layers], placement.num_experts, placement.num_ranks)
        pinned = self.device.type != "cpu"
        slots = torch.from_numpy(part.logical_to_physical(self.width).astype(np.int64))
        counts = torch.from_numpy(part.replica_count.astype(np.int64))
        self._prepared.append(
            (layers, slots.pin_memory() if pinned else slots, counts.pin_memory() if pinned else counts)
        )

    def commit(self) -> None:
        """Switches over to the oldest prepared placement; only enqueues copies on the current stream."""
        layers, slots, counts = self._prepared.popleft()
        for i, layer in enumerate(layers):
            self.logical_to_physical[layer].copy_(slots[i], non_blocking=True)
            self.replica_count[layer].copy_(counts[i], non_blocking=True)
        # A copy from pinned memory may still be under way, with the host a step or two ahead of the device.
        self._in_use.append((slots, counts))

    def forget_prepared(self) -> None:
        """Drops what was prepared and not committed."""
        self._prepared.clear()
