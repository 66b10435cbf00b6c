# SPDX-License-Identifier: Apache-2.0
"""Expert weights as the loader sees them: slots, flat views, staging."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from .transport import TransferError

ALIGNMENT = 256
"""Alignment, in bytes, of an expert's tensors in staging."""


Weights = Sequence[Sequence[Sequence[torch.Tensor]]]


def default_buffer_experts(num_layers: int, slots_per_rank: int, lag: int = 1, buffers: int = 2) -> int:
    """Experts per staging buffer: at least 2, and enough that a cycle which moves a tenth of all slots ends within 60
    steps, at ``lag + 2`` steps per ``buffers`` rounds."""
    receives = num_layers * slots_per_rank / 10
    return max(2, int(np.ceil(receives * (lag + 2) / (60 * buffers))))


def flat_views(weights: Weights) -> tuple[list[list[tuple[torch.Tensor, ...]]], torch.device]:
    """Every tensor as a flat uint8 view, and the device.

    Raises:
        TransferError: weights cannot be moved expert by expert.
    """
    if not weights or not weights[0] or not weights[0][0]:
        raise TransferError("there are no expert weights to move")
    device, slots = weights[0][0][0].device, len(weights[0])
    result: list[list[tuple[torch.Tensor, ...]]] = []
    for number, layer in enumerate(weights):
        if len(layer) != slots:
            raise TransferError(f"layer {number} has {len(layer)} slots on this rank, layer 0 has {slots}")
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in layer[0]]
        taken: list[tuple[int, int, int]] = []
        for slot, tensors in enumerate(layer):
            where = f"layer {number}, slot {slot}"
            if [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] != shapes:
                raise TransferError(f"{where}: its tensors differ in shape or dtype from those of slot 0 of the layer")
            for index, tensor in enumerate(tensors):
                if tensor.device != device:
                    raise TransferError(f"{where}: tensor {index} is on {tensor.device}, others on {device}")
                if not tensor.is_contiguous():
                    raise TransferError(
                        f"{where}: tensor {index} of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not "
                        "contiguous; a layout that cannot be sliced per expert cannot be moved: use a quantisation or "
                        "kernel that keeps each expert's weights together, or switch dynamic EPLB off"
                    )
                if tensor.numel():
                    taken.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, slot))
        taken.sort()
        for (_, end, slot), (start, _, later) in pairwise(taken):
            if start < end and slot != later:
                raise TransferError(
                    f"layer {number}: slots {slot} and {later} share memory; weights that are packed over experts "
                    "cannot be moved: switch dynamic EPLB off for this model"
                )
        result.append(
            [
                tuple(tensor.detach().view(-1).view(torch.uint8) for tensor in tensors if tensor.numel())
                for tensors in layer
            ]
        )
    return result, device


def aligned_offsets(tensors: Sequence[torch.Tensor]) -> list[int]:
    """First byte of each tensor in staging, then the total size."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT)
    return offsets


class ExpertSlots:
    """The live slots of one rank, and the staging buffers in which experts arrive.

    Args:
        weights: [L][S] lists of the engine's own tensors.
        buffers: number of staging buffers.
        buffer_experts: places of a staging buffer; None for ``default_buffer_experts``.

    Attributes:
        live: [L][S] tuples of flat uint8 views of the expert's tensors.
        staging: uint8 [buffers, places, row_bytes].
        expert_bytes: [L], bytes of one expert.
        most_tensors: most tensors of an expert.

    Raises:
        TransferError: weights cannot be sliced per expert.
    """

    def __init__(self, weights: Weights, buffers: int, buffer_experts: int | None) -> None:
        self.live, self.device = flat_views(weights)
        self.num_layers, self.slots_per_rank = len(self.live), len(self.live[0])
        if buffer_experts is None:
            buffer_experts = default_buffer_experts(self.num_layers, self.slots_per_rank, buffers=buffers)
        self.buffer_experts: int = buffer_experts
        self.expert_bytes = [sum(tensor.numel() for tensor in layer[0]) for layer in self.live]
        self.most_tensors = max(len(layer[0]) for layer in self.live)
        self._offsets = [aligned_offsets(layer[0]) for layer in self.live]
        self.row_bytes = max(offsets[-1] for offsets in self._offsets)
        self.staging = torch.empty((buffers, buffer_experts, self.row_bytes), dtype=torch.uint8, device=self.device)

    def staged(self, layer: int, buffer: int, place: int) -> tuple[torch.Tensor, ...]:
        """Flat uint8 views of one staging place, shaped for the tensors of ``layer``."""
        row, offsets = self.staging[buffer, place], self._offsets[layer]
        return tuple(row[at : at + tensor.numel()] for at, tensor in zip(offsets, self.live[layer][0], strict=False))

    def ranges(self, layer: int, start: int, end: int) -> tuple[tuple[int, int, int], ...]:
        """Bytes start..end of an expert as (tensor, first byte, end byte)."""
        ranges, at = [], 0
        for number, tensor in enumerate(self.live[layer][0]):
            a, b = max(start - at, 0), min(end - at, tensor.numel())
            if a < b:
                ranges.append((number, a, b))
            at += tensor.numel()
        return tuple(ranges)
