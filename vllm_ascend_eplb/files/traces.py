# SPDX-License-Identifier: Apache-2.0
"""Traces: files of recorded loads, from this package and from other recorders.

A trace is int or float [T, L, E]: tokens per logical expert in each of T windows. Accepted are .npz (``load``,
``loads`` or ``logical_count``), .npy, JSON with ``logical_count`` or a plain list, as SGLang and DeepSeek publish them,
and the .pt files of SGLang's recorder. An array [L, E] is a trace of one window. Layers without any load are left out:
a model's dense layers, and layers of other pipeline stages. :attr:`Trace.layers` has the numbers of the kept layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..values.placement import FloatArray, Placement
from .disk import FileError, parse_json, parse_npy, parse_npz, read_bounded, show
from .map_forms import MAX_EXPERT
from .torch_file import is_torch_file, read_torch

MAX_TRACE_BYTES = 2 << 30
"""Largest trace that is read, also when unpacked; 1,000 windows of 58 x 256 experts have 119 MB."""


ENOUGH = 8
"""Mean tokens per expert of a layer above which an expert without tokens is unlikely to be chance."""


NAMES = ("load", "loads", "logical_count")


class TraceError(ValueError):
    """A file that holds no loads. The message is one line."""


@dataclass(frozen=True)
class Trace:
    """A recorded load.

    Attributes:
        load: float64 [T, L, E], tokens per logical expert, oldest window first, of the layers that have load.
        layers: the numbers of these layers in the file.
        file_layers: number of layers in the file.
        remarks: what may be wrong with the file, one line for each.
    """

    load: FloatArray
    layers: tuple[int, ...]
    file_layers: int
    remarks: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[int, ...]:
        """Numbers of the layers that have no load and were left out."""
        return tuple(sorted(set(range(self.file_layers)) - set(self.layers)))

    @property
    def skipped_layers(self) -> int:
        return self.file_layers - len(self.layers)

    def of_all_layers(self) -> FloatArray:
        """The load of all layers of the file, [T, file_layers, E]."""
        full = np.zeros((self.num_windows, self.file_layers, self.num_experts))
        full[:, list(self.layers)] = self.load
        return full

    def of_layers_with_load(self, placement: Placement) -> Placement:
        """A placement of all layers of the file, reduced to the layers with load. Other placements are unchanged."""
        if placement.num_layers != self.file_layers or not self.skipped_layers:
            return placement
        return Placement(placement.physical_to_logical[list(self.layers)], placement.num_experts, placement.num_ranks)

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
        TraceError: the file cannot be read or holds no loads; the message names file and entry.
    """
    name = show(path)
    try:
        data = read_bounded(path, MAX_TRACE_BYTES, "file of loads")
        if data.startswith(b"\x93NUMPY"):
            array = parse_npy(data, path)
        elif is_torch_file(data):
            array = _from_torch(read_torch(data, path, MAX_TRACE_BYTES), name)
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
        raise TraceError(f"{name} does not hold a table of numbers; expected [windows][layers][experts]") from None


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
    kept = np.ascontiguousarray(load[:, loaded])
    return Trace(kept, tuple(loaded.tolist()), load.shape[1], _remarks(kept, name))


def _from_torch(value: Any, name: str) -> npt.NDArray[Any]:
    """The loads in a dump of SGLang's recorder: counts by step, or a record of each forward pass with counts by
    slot."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict) and isinstance(value.get("records"), list):
        return _from_records(value["records"], value.get("last_physical_to_logical_map"), name)
    found = next((value[key] for key in NAMES if key in value), None) if isinstance(value, dict) else None
    if not isinstance(found, np.ndarray) or found.ndim not in (2, 3) or found.dtype.kind not in "iufb":
        raise TraceError(
            f"{name} is a file of torch.save without counts [windows, layers, experts] under {' or '.join(NAMES)}; is "
            "it a dump of SGLang's recorder?"
        )
    if found.ndim == 2:
        return found
    filled = found.any(axis=(1, 2))  # the recorder's buffer also has places for future steps
    return found[filled] if filled.any() else found


def _from_records(records: list[Any], slots: Any, name: str) -> npt.NDArray[np.float64]:
    """Tokens per expert and forward pass, from tokens per slot; records of one pass are added up."""
    if not isinstance(slots, np.ndarray) or slots.ndim != 2 or not slots.size or slots.dtype.kind not in "iu":
        raise TraceError(f"{name} has records, but no last_physical_to_logical_map [layers, slots] to read them by")
    experts = int(slots.max()) + 1
    if int(slots.min()) < 0 or experts > MAX_EXPERT or len(records) * len(slots) * experts * 8 > MAX_TRACE_BYTES:
        raise TraceError(f"{name} has records of {len(slots)} layers, {experts} experts; is it the right file?")
    windows: dict[Any, npt.NDArray[np.float64]] = {}
    for number, record in enumerate(records):
        counts = record.get("global_physical_count") if isinstance(record, dict) else None
        if not isinstance(counts, np.ndarray) or counts.shape != slots.shape or counts.dtype.kind not in "iuf":
            raise TraceError(
                f"{name}: record {number} has no global_physical_count of shape {slots.shape}; is it a dump of "
                "SGLang's recorder?"
            )
        passed = record.get("forward_pass_id")
        key = passed if isinstance(passed, int) else ("record", number)
        window = windows.setdefault(key, np.zeros((len(slots), experts)))
        np.add.at(window, (np.arange(len(slots))[:, None], slots), counts.astype(np.float64))
    if not windows:
        raise TraceError(f"{name} has no records; record it while the server serves")
    return np.stack(list(windows.values()))


def _remarks(load: FloatArray, name: str) -> tuple[str, ...]:
    """Signs that a file holds the counts of one rank only.

    Args:
        load: float64 [T, L, E] of the layers that have load.
    """
    experts, by_layer = load.shape[2], load.sum(axis=0)
    used = np.flatnonzero(by_layer.sum(axis=0) > 0)
    first, last = int(used[0]), int(used[-1])
    enough = (by_layer.sum(axis=1) >= ENOUGH * experts).all()
    if experts >= 4 and last - first + 1 <= experts // 2:
        return (
            f"{name}: only experts {first} to {last} of {experts} have load, in every layer; it looks like the counts "
            "of one rank or a few: add up those of all ranks",
        )
    most = int((by_layer > 0).sum(axis=1).max())
    if experts >= 4 and enough and most <= experts // 2:
        return (
            f"{name}: at most {most} of {experts} experts have load in a layer; it looks like the counts of one rank: "
            "add up those of all ranks",
        )
    return ()
