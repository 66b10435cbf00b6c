# SPDX-License-Identifier: Apache-2.0
"""A transport with faults. It replaces a loader's own transport, and still carries the bytes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.transfer.transport import Batch, Piece, Transport


class FaultyTransport(Transport):
    """Carries bytes by ``real``; subclasses add the faults."""

    def __init__(self, real: Transport) -> None:
        self.real, self.name, self.one_sided = real, real.name, real.one_sided

    def batch(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Batch:
        received = [tensor for piece in receives for tensor in piece.tensors]
        return _FaultyBatch(self, self.real.batch(sends, receives), received)

    def reaches(self, sender: int, receiver: int) -> bool:
        return self.real.reaches(sender, receiver)

    def issuing(self, serial: int) -> int:
        """Called in the step thread before the real issue; returns the serial to issue with."""
        return serial

    def running(self) -> None:
        """Called in the mover thread before the real transfer, unless ``issue`` does the whole transfer."""

    def arrived(self, received: list[torch.Tensor]) -> None:
        """Called after the bytes have arrived and before they are summed; on a device both are only enqueued."""


class _FaultyBatch(Batch):
    def __init__(self, faults: FaultyTransport, real: Batch, received: list[torch.Tensor]) -> None:
        self._faults, self._real, self._received, self.enters = faults, real, received, real.enters

    def issue(self, serial: int) -> None:
        self._real.issue(self._faults.issuing(serial))
        if self.enters:
            self._faults.arrived(self._received)

    def run(self) -> None:
        self._faults.running()
        self._real.run()
        self._faults.arrived(self._received)


def interpose(loader: D2DExpertWeightLoader, make: Callable[..., FaultyTransport], *args: Any) -> None:
    """Replace every transport of ``loader`` with ``make(real, *args)``, for rounds that are prepared later."""
    loader.transports[:] = [make(real, *args) for real in loader.transports]
