# SPDX-License-Identifier: Apache-2.0
"""NCCL and HCCL: batch_isend_irecv on a communicator and a stream of its own.

A communicator's kernel holds cores of the device while it waits for its peer. A kernel that needs all cores at once
(cooperative launch) waits for these cores. If another rank has launched the two in the opposite order, both ranks
deadlock. So on CUDA the communicator must be bounded to few cores, and is refused beside such kernels. All ranks enter
it at the same step, at one fixed point, in the order of the rounds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .transport import Batch, Piece, Streams, TransferError, Transport

MOST_CTAS = 8
"""Most thread blocks that NCCL may use for the transfer group."""


class CollectiveTransport(Transport):
    """batch_isend_irecv of the group's own backend (NCCL, HCCL).

    Args:
        group: a registered process group of all ranks with a backend for the device; nothing else uses it.
        streams: streams of the device.
        cooperative_kernels: whether the engine launches kernels that need all cores at once (DeepEP low latency,
            DeepGEMM mega MoE).

    Raises:
        TransferError: there is no group; or on CUDA the engine has cooperative kernels, or the group is not bounded.
    """

    def __init__(self, group: Any, streams: Streams, *, cooperative_kernels: bool = False) -> None:
        self._group = group
        self.name = "hccl" if streams.device.type == "npu" else "nccl"
        if group is None:
            raise TransferError(f"transport {self.name} needs a process group of its own on the device; none was given")
        if streams.device.type == "cuda":
            if cooperative_kernels:
                raise TransferError(
                    "transport nccl can deadlock beside kernels that need all cores of the GPU (DeepEP low latency, "
                    "DeepGEMM mega MoE); choose transport pull or gloo"
                )
            bound = most_ctas(group, streams.device)
            if bound is None or bound > MOST_CTAS:
                raise TransferError(
                    f"transport nccl needs a communicator of at most {MOST_CTAS} thread blocks, this one may use "
                    f"{bound or 'any number'}: create its group with bounded_nccl_options(), or set NCCL_MAX_CTAS="
                    f"{MOST_CTAS}, or choose transport pull or gloo"
                )

    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        def operations(call: Any, pieces: Sequence[Piece]) -> list[dist.P2POp]:
            return [
                dist.P2POp(call, tensor, dist.get_global_rank(self._group, piece.peer), self._group)
                for piece in pieces
                for tensor in piece.tensors
            ]

        return _CollectiveBatch(operations(dist.isend, sends) + operations(dist.irecv, receives))


class _CollectiveBatch(Batch):
    enters = True

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self._operations = operations

    def issue(self, serial: int) -> None:
        for work in dist.batch_isend_irecv(self._operations) if self._operations else ():
            work.wait()  # the stream waits, not this thread


def most_ctas(group: Any, device: torch.device) -> int | None:
    """Most thread blocks that the NCCL communicator of ``group`` may use; None if it is not bounded."""
    try:
        bound = int(group._get_backend(device).options.config.max_ctas)
    except (AttributeError, RuntimeError):
        bound = -1
    if bound < 1 or bound >= 1 << 30:  # NCCL's "undefined"
        bound = int(os.environ.get("NCCL_MAX_CTAS") or 0)
    return bound if bound > 0 else None


def bounded_nccl_options(most: int = MOST_CTAS) -> Any:
    """``pg_options`` for ``torch.distributed.new_group`` that bound a communicator to ``most`` thread blocks."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = 1
    options.config.max_ctas = most
    return options
