# SPDX-License-Identifier: Apache-2.0
"""Transports: carry the bytes of experts from the slots of one rank into the staging buffer of another.

A transport gets the pieces that this rank sends and receives in one part of a round, and returns a ``Batch``::

    prepare   everything that can throw; builds the batch, contacts no peer
    issue     called in the step thread, at the same step on all ranks: only the call
    run       called afterwards in the loader's mover thread: blocks until all pieces have arrived and were sent

Each transport decides whether ``issue`` or ``run`` does the work. Work that is only enqueued on the device belongs into
``issue``: communicators must be entered in the same order everywhere, and launches from another thread would wait for
the step thread's launches. Work that blocks a host thread belongs into ``run``.

=========  ==========================================================================================================
local      copies within a rank
gloo       sockets; on a CPU from slot to staging, on a device through pinned host memory; no device cores
pull       the receiver reads the slots of peers on its host through mapped memory: copy engines only; CUDA
nccl/hccl  batch_isend_irecv on a communicator of its own, on the side stream; kernels hold some of the device's cores
=========  ==========================================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class TransferError(RuntimeError):
    """Weights cannot be transferred, or a transfer failed."""


@dataclass(frozen=True)
class Piece:
    """Bytes of one expert that travel from one rank to another.

    Attributes:
        peer: rank, in the group, on the other side.
        index: number of tensors that this pair of ranks exchanges in this part before this piece; equal on both sides.
        tensors: views of the slot at the sender, of staging at the receiver.
        source: place of the bytes at the sender, for one-sided transports: (layer, local slot, one (tensor number,
            first byte, end byte) per view).
    """

    peer: int
    index: int
    tensors: tuple[torch.Tensor, ...]
    source: tuple[int, int, tuple[tuple[int, int, int], ...]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)


class Batch:
    """The prepared pieces of one part of a round on one rank.

    Attributes:
        enters: whether ``issue`` enqueues all work on the current stream; ``run`` is then not called.
    """

    enters = False

    def issue(self, serial: int) -> None:
        """Called in the step thread; never blocks. ``serial`` is unique to the part, and equal on all ranks."""

    def run(self) -> None:
        """Called in the mover thread, on the side stream; returns when everything has arrived and was sent.

        Raises:
            Exception: the transfer failed; the group must not be used any more.
        """


class Transport(ABC):
    """One way to move bytes. ``one_sided``: peers read this rank's slots without an action of this rank."""

    name: str
    one_sided = False

    @abstractmethod
    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        """Prepares one part.

        Raises:
            TransferError: the part cannot be transferred; nothing was changed.
        """

    def reaches(self, sender: int, receiver: int) -> bool:
        """Whether this transport connects the two ranks; the same answer on all ranks."""
        return True


class Streams:
    """The streams and events of one device; on a CPU stand-ins that do nothing.

    Args:
        device: device of the weights.
        own: whether to make streams; False uses the device's default stream, for engines without side streams.
    """

    def __init__(self, device: torch.device, own: bool = True) -> None:
        self.device = device
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.side: Any = self._stream(own)
        """Stream of the mover thread alone: its work must not wait behind a later round."""
        self.entry: Any = self._stream(own)
        """Stream of the step thread, for transfers that are enqueued when a round is issued."""

    def _stream(self, own: bool) -> Any:
        if self.module is None:
            return None
        return self.module.Stream(device=self.device) if own else self.module.default_stream(self.device)

    def event(self) -> Any:
        """An event whose host wait sleeps instead of spinning; None on a CPU."""
        return None if self.module is None else self.module.Event(blocking=True)

    def mark(self, stream: Any) -> Any:
        """A point in time on a stream, as an event; None on a CPU."""
        if self.module is None:
            return None
        event = self.module.Event(enable_timing=True)
        event.record(stream)
        return event

    def on_entry(self) -> Any:
        """Context in which work goes to the entry stream."""
        return _Nothing() if self.module is None else self.module.stream(self.entry)

    def current(self) -> Any:
        return None if self.module is None else self.module.current_stream(self.device)

    def on_side(self) -> Any:
        """Context in which work goes to the side stream."""
        return _Nothing() if self.module is None else self.module.stream(self.side)

    def enter_thread(self) -> None:
        """Makes the device current in a new thread."""
        if self.module is not None:
            self.module.set_device(self.device)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class Copies(Batch):
    """Copies into staging from memory that this rank can read: its own slots, or mapped slots of a peer."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], enters: bool) -> None:
        self._pairs, self.enters = pairs, enters

    def issue(self, serial: int) -> None:
        if self.enters:
            self._copy()

    def run(self) -> None:
        self._copy()

    def _copy(self) -> None:
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
