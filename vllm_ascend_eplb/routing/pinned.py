# SPDX-License-Identifier: Apache-2.0
"""PinnedRows: host memory that a device copies from, kept until the copies are done."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import torch


class PinnedRows:
    """New rows for tensors of one device, on the host. The host may be a step or two ahead of the device's copies.
    Memory that returns to the allocator before a copy is done may be overwritten by its next user.

    Args:
        device: device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_host = device.type == "cpu"
        self._module = None if self._on_host else torch.get_device_module(device)
        self._in_use: deque[tuple[tuple[torch.Tensor, ...], torch.Event]] = deque()

    def rows(self, rows: npt.NDArray[np.signedinteger]) -> torch.Tensor:
        """The rows in host memory from which asynchronous copies can be made; from any thread."""
        tensor = torch.from_numpy(np.ascontiguousarray(rows))
        return tensor if self._on_host else tensor.pin_memory()

    def keep(self, *rows: torch.Tensor) -> None:
        """Keeps ``rows`` until the copies enqueued on the current stream so far are done. Releases older rows whose
        copies are done. Never waits."""
        if self._module is None:
            return
        while self._in_use and self._in_use[0][1].query():
            self._in_use.popleft()
        event = self._module.Event()
        event.record()
        self._in_use.append((rows, event))

    @property
    def num_kept(self) -> int:
        """Number of calls of ``keep`` whose rows are still held."""
        return len(self._in_use)
