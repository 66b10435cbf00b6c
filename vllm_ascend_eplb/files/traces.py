# SPDX-License-Identifier: Apache-2.0
"""Traces: recorded loads as files, whatever recorded them.

A trace is int or float [T, L, E]: tokens per logical expert in each of T windows. Read are .npz (``load``, ``loads`` or
``logical_count``), .npy, and JSON with ``logical_count`` or a plain list, as SGLang and DeepSeek publish them; one
window [L, E] counts as a trace of one. Leading layers without any load (a model's dense layers) are left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..values.placement import FloatArray
from .disk import FileError, parse_json, parse_npy, parse_npz, read_bounded, show

MAX_TRACE_BYTES = 2 << 30
"""Largest trace that is read, also when unpacked; 1,000 windows of 58 x 256 experts have 119 MB."""


NAMES = ("load", "loads", "logical_count")


class TraceError(ValueError):
    """A file that holds no loads. The message is one line."""


@dataclass(frozen=True)
class Trace:
    """A recorded load.

    Attributes:
        load: float64 [T, L, E], tokens per logical expert, oldest window first.
        skipped_layers: leading layers of the file that had no load and were left out.
    """

    load: FloatArray
    skipped_layers: int = 0

    @property
    def num_windows(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[2])


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a file of loads.

    Raises:
        TraceError: the file cannot be read or holds no loads; the message says what and where.
    """
    name = show(path)
    try:
        data = read_bounded(path, MAX_TRACE_BYTES, "file of loads")
        if data.startswith(b"\x93NUMPY"):
            array = parse_npy(data, path)
        elif data.startswith(b"PK"):
            arrays = parse_npz(data, path, MAX_TRACE_BYTES, NAMES)
            if not arrays:
                raise TraceError(f"{name} has no array {' or '.join(NAMES)}; save the loads under one of these names")
            array = next(iter(arrays.values()))
        else:
            array = _from_json(parse_json(data, path), name)
    except FileError as error:
        raise TraceError(str(error)) from None
    return _checked(array, name)


def _from_json(value: object, name: str) -> npt.NDArray[np.float64]:
    if isinstance(value, dict):
        found = next((value[key] for key in NAMES if key in value), None)
        if found is None:
            raise TraceError(f"{name} is JSON without {' or '.join(NAMES)}; is it a file of loads?")
        value = found
    try:
        return np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise TraceError(f"{name} holds no table of numbers; expected [windows][layers][experts]") from None


def _checked(array: npt.NDArray[np.generic], name: str) -> Trace:
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or not array.size:
        raise TraceError(f"{name} has shape {array.shape}; expected [windows, layers, experts] or [layers, experts]")
    load = array.astype(np.float64)
    bad = ~((load >= 0) & (load <= 1e30))
    if bad.any():
        window, layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise TraceError(
            f"{name}: window {window}, layer {layer}, expert {expert} is {load[window, layer, expert]}; tokens are "
            f"finite numbers from 0 to 1e30"
        )
    loaded = np.flatnonzero(load.sum(axis=(0, 2)) > 0)
    if not loaded.size:
        raise TraceError(f"{name} has no load in any layer; record it while the server serves")
    first = int(loaded[0])
    return Trace(np.ascontiguousarray(load[:, first:]), first)
