# SPDX-License-Identifier: Apache-2.0
"""A program's interface to the emulator's race detector."""

import ctypes
from collections.abc import Callable

import torch

_library = ctypes.CDLL("libascendcl.so")
_library.emulatedReport.restype = ctypes.c_char_p
_library.emulatedHostAccess.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def reports() -> list[str]:
    """Races and order violations that this process has seen so far."""
    return [_library.emulatedReport(i).decode() for i in range(_library.emulatedReportCount())]


def host_access(tensor: torch.Tensor, write: bool) -> None:
    """Tell the detector that the CPU now reads or writes a pinned tensor, which it cannot see by itself."""
    if _library.emulatedHostAccess(tensor.data_ptr(), tensor.numel() * tensor.element_size(), int(write)):
        raise RuntimeError(reports()[-1])


def new_reports(program: Callable[[], object]) -> list[str]:
    """Run a program that starts and ends on an idle device, and return its reports."""
    torch.npu.synchronize()
    before = len(reports())
    program()
    torch.npu.synchronize()
    return reports()[before:]
