# SPDX-License-Identifier: Apache-2.0
"""Pull: the receiver copies experts from slots of other ranks on its host, through mapped device memory.

The copies are plain device-to-device copies on a stream of the receiver, done by copy engines. The sender does nothing,
and no kernel waits for a peer. So nothing can hold the cores that another kernel needs.

Because the sender does nothing, its stream order does not protect the receiver, which could read a commit that is
enqueued but only half executed. The loader therefore reports a round as ready only after the commits that it depends on
have been executed on this device (``one_sided``).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from .transport import Batch, Copies, Piece, Streams, Transport

Weights = Sequence[Sequence[Sequence[torch.Tensor]]]


class PullTransport(Transport):
    """One-sided copies between devices of a host (CUDA).

    Args:
        weights: this rank's slots: for each layer and local slot, flat uint8 views.
        rank: rank of this process in the group.
        num_ranks: ranks in the group.
        same_host: for each rank, whether to try it.
        exchange: sends bytes to all ranks and returns the bytes of all ranks, in rank order; blocks. Called twice.
        streams: streams of this rank's device.

    All ranks construct it together. Afterwards ``reaches`` gives the same answer on all ranks.
    """

    name = "pull"
    one_sided = True

    def __init__(
        self, weights: Weights, rank: int, num_ranks: int, same_host: Sequence[bool], exchange: Any, streams: Streams
    ) -> None:
        self._rank = rank
        offers = exchange(_offer(weights))
        self._peers: dict[int, list[list[list[torch.Tensor]]]] = {}
        self.failures: dict[int, str] = {}
        for peer in range(num_ranks):
            if peer == rank or not same_host[peer]:
                continue
            try:
                self._peers[peer] = _map(offers[peer], streams.device)
            except Exception as error:  # any error of the driver or the allocator: the peer cannot be mapped
                self.failures[peer] = str(error)
        mine = bytes(peer in self._peers for peer in range(num_ranks))
        self._reach = [list(row) for row in exchange(mine)]

    def reaches(self, sender: int, receiver: int) -> bool:
        return bool(self._reach[receiver][sender])

    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        pairs = []
        for piece in receives:
            layer, slot, ranges = piece.source
            tensors = self._peers[piece.peer][layer][slot]
            for target, (number, first, end) in zip(piece.tensors, ranges, strict=True):
                pairs.append((target, tensors[number][first:end]))
        return Copies(pairs, enters=True)


def _offer(weights: Weights) -> bytes:
    """Handles of all storages behind the weights, with each tensor's place in them; b"" if they cannot be shared."""
    storages: dict[int, Any] = {}
    table: list[list[list[tuple[int, int, int]]]] = []
    try:
        for layer in weights:
            table.append([])
            for slot in layer:
                table[-1].append([])
                for tensor in slot:
                    storage = tensor.untyped_storage()
                    key = storage.data_ptr()
                    if key not in storages:
                        storages[key] = storage._share_cuda_()  # type: ignore[no-untyped-call]
                    table[-1][-1].append((key, int(tensor.storage_offset()), tensor.numel()))
    except (RuntimeError, AttributeError):
        return b""
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump((storages, table))
    return buffer.getvalue()


def _map(offer: bytes, device: torch.device) -> list[list[list[torch.Tensor]]]:
    if not offer:
        raise RuntimeError("the peer's allocator cannot share device memory")
    shared, table = pickle.loads(offer)
    index = device.index if device.index is not None else torch.cuda.current_device()
    # mapped into this rank's own device: takes no context and no memory on the peer's device
    storages = {key: torch.UntypedStorage._new_shared_cuda(index, *handle[1:]) for key, handle in shared.items()}

    def view(key: int, offset: int, length: int) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storages[key], offset, (length,), (1,))

    return [[[view(*where) for where in slot] for slot in layer] for layer in table]
