# SPDX-License-Identifier: Apache-2.0
"""Expert weights as the loader sees them: slots, flat views, staging."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from .transport import TransferError

ALIGNMENT = 256
"""Bytes at whose multiples the tensors of an expert begin in staging."""


Weights = Sequence[Sequence[Sequence[torch.Tensor]]]


def default_buffer_experts(num_layers: int, slots_per_rank: int, lag: int = 1, buffers: int = 2) -> int:
    """Experts per staging buffer: at least 2, and enough for a cycle that moves a tenth of all slots to end within 60
    steps, at ``lag + 2`` steps per ``buffers`` rounds."""
    receives = num_layers * slots_per_rank / 10
    return max(2, int(np.ceil(receives * (lag + 2) / (60 * buffers))))


def flat_views(weights: Weights) -> tuple[list[list[tuple[torch.Tensor, ...]]], torch.device]:
    """Every tensor as flat uint8; refuses what cannot be moved expert by expert."""
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
        for (_, end, one), (start, _, other) in pairwise(taken):
            if start < end and one != other:
                raise TransferError(
                    f"layer {number}: slots {one} and {other} share memory; weights that are packed over experts "
                    "cannot be moved: switch dynamic EPLB off for this model"
                )
        result.append(
            [tuple(tensor.detach().view(-1).view(torch.uint8) for tensor in its if tensor.numel()) for its in layer]
        )
    return result, device


def aligned_offsets(tensors: Sequence[torch.Tensor]) -> list[int]:
    """First byte of each tensor in staging, then the size of the whole."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT)
    return offsets
