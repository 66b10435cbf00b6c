# SPDX-License-Identifier: Apache-2.0
"""Transport by Gloo; for weights on a device through pinned host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .transport import Batch, Piece, Streams, TransferError, Transport

MESSAGES = 1 << 12
"""Most messages between two ranks in one part of a round."""


def _check_indices(pieces: Sequence[Piece]) -> None:
    if any(piece.index + len(piece.tensors) > MESSAGES for piece in pieces):
        raise TransferError(f"more than {MESSAGES} messages between two ranks in one round; use a smaller buffer")


def _tag(serial: int, index: int) -> int:
    """The tag of a message. Gloo's tags have 31 bits, so a tag comes again after half a million serials."""
    return (serial * MESSAGES + index) % (1 << 31)


class GlooTransport(Transport):
    """Sockets, for weights on a CPU. One message per tensor, from slot to staging without a copy in between.

    Every message has a tag of its own; otherwise a receive left from an earlier round could take a later send. Nothing
    is polled or timed out: ``run`` waits in the mover thread.

    Args:
        group: a Gloo process group, or backend, that nothing else uses for sends and receives. A ControlChannel must
            not use it: its messages would wait behind experts on the same sockets.
    """

    name = "gloo"

    def __init__(self, group: Any) -> None:
        self._group = group

    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        _check_indices((*sends, *receives))
        return _GlooBatch(self._group, sends, receives)


class _GlooBatch(Batch):
    def __init__(self, group: Any, sends: Sequence[Piece], receives: Sequence[Piece]) -> None:
        self._group, self._sends, self._receives, self._serial = group, sends, receives, 0

    def issue(self, serial: int) -> None:
        self._serial = serial

    def run(self) -> None:
        works = [self._group.recv([tensor], peer, tag) for tensor, peer, tag in self._messages(self._receives)]
        works += [self._group.send([tensor], peer, tag) for tensor, peer, tag in self._messages(self._sends)]
        for work in works:
            work.wait()

    def _messages(self, pieces: Sequence[Piece]) -> Iterator[tuple[torch.Tensor, int, int]]:
        for piece in pieces:
            for number, tensor in enumerate(piece.tensors):
                yield tensor, piece.peer, _tag(self._serial, piece.index + number)


class StagedGlooTransport(Transport):
    """Sockets, for weights on a device: through pinned host memory, one message per piece.

    Copy engines and sockets do all the work, and hold no device core. So nothing on the device can wait for a peer.
    Each receive has pinned memory of its own and is posted first. Sends share fewer rows: a sender with many receivers
    waits, in the mover thread, for a free row. A row becomes free because all receives are posted.

    Args:
        group: as for GlooTransport.
        streams: streams of the device.
        row_bytes: bytes of the largest expert, padding included.
        receive_rows: most pieces that this rank receives in one part.
        send_rows: most pieces that this rank sends at a time.
    """

    name = "gloo"

    def __init__(self, group: Any, streams: Streams, row_bytes: int, receive_rows: int, send_rows: int = 2) -> None:
        pin = streams.module is not None
        self.group, self.streams = group, streams
        self._in = torch.empty(receive_rows * row_bytes, dtype=torch.uint8, pin_memory=pin)
        self.out = torch.empty((send_rows, row_bytes), dtype=torch.uint8, pin_memory=pin)
        self.filled = [streams.event() for _ in range(send_rows)]

    @property
    def pinned_bytes(self) -> int:
        return self._in.numel() + self.out.numel()

    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        _check_indices((*sends, *receives))
        rows, used = [], 0
        flat = self._in
        for piece in receives:  # pieces are packed without gaps: a part of an expert needs no whole row
            if used + piece.nbytes > flat.numel():
                raise TransferError(
                    f"a part of a round has {used + piece.nbytes} bytes; pinned memory holds {flat.numel()}"
                )
            rows.append(flat[used : used + piece.nbytes])
            used += piece.nbytes
        return _StagedBatch(self, sends, list(zip(receives, rows, strict=True)))


class _StagedBatch(Batch):
    def __init__(
        self,
        transport: StagedGlooTransport,
        sends: Sequence[Piece],
        receives: list[tuple[Piece, torch.Tensor]],
    ) -> None:
        self._transport, self._sends, self._receives, self._serial = transport, sends, receives, 0

    def issue(self, serial: int) -> None:
        self._serial = serial

    def run(self) -> None:
        transport, group = self._transport, self._transport.group
        arriving = [group.recv([row], piece.peer, _tag(self._serial, piece.index)) for piece, row in self._receives]
        leaving: list[Any] = [None] * len(transport.out)
        filling: list[tuple[int, Piece]] = []
        for number, piece in enumerate(self._sends):
            row = number % len(transport.out)
            if len(filling) == len(transport.out):
                self._send(*filling.pop(0), leaving)
            if leaving[row] is not None:
                leaving[row].wait()
                leaving[row] = None
            _pack(piece.tensors, transport.out[row])
            if transport.filled[row] is not None:
                transport.filled[row].record(transport.streams.side)
            filling.append((row, piece))
        for row, piece in filling:
            self._send(row, piece, leaving)
        for (piece, packed), work in zip(self._receives, arriving, strict=True):
            work.wait()
            _unpack(packed, piece.tensors)
        for work in leaving:
            if work is not None:
                work.wait()

    def _send(self, row: int, piece: Piece, leaving: list[Any]) -> None:
        transport = self._transport
        if transport.filled[row] is not None:
            transport.filled[row].synchronize()
        packed = transport.out[row][: piece.nbytes]
        leaving[row] = transport.group.send([packed], piece.peer, _tag(self._serial, piece.index))


def _pack(tensors: Sequence[torch.Tensor], row: torch.Tensor) -> None:
    at = 0
    for tensor in tensors:
        row[at : at + tensor.numel()].copy_(tensor, non_blocking=True)
        at += tensor.numel()


def _unpack(row: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    at = 0
    for tensor in tensors:
        tensor.copy_(row[at : at + tensor.numel()], non_blocking=True)
        at += tensor.numel()
