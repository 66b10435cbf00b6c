# SPDX-License-Identifier: Apache-2.0
"""Placements in the forms of vllm-ascend's and SGLang's JSON, and as plain arrays: parsing and formatting.

A reader returns :class:`Found`; expert_map.py checks what all forms have in common.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..values.placement import Int32Array, Placement
from .disk import show

MAX_LAYERS = 4096


MAX_SLOTS = 65535
"""Most slots per layer, over all ranks: the planner's limit."""


MAX_EXPERT = 65535


class ExpertMapError(ValueError):
    """A map file that no server may start from. The message is one line: file, layer, device, slot, way out."""


@dataclass(frozen=True)
class Found:
    """The contents of a map file.

    Attributes:
        slots: int32 [L, P], the logical expert in each slot.
        experts: logical experts per layer; None if the file does not have their number.
        ranks: ranks that the map is made for; None if the file does not have their number.
    """

    slots: Int32Array
    experts: int | None = None
    ranks: int | None = None


def from_ascend(value: dict[str, Any], name: str) -> Found:
    """vllm-ascend's JSON. Layers and devices count by their order, as in vllm-ascend's loader, which reads no ids."""
    layers = value["layer_list"]
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise ExpertMapError(f"{name}: layer_list must be a list of 1..{MAX_LAYERS} layers; it is {kind(layers)}")
    count = value.get("moe_layer_count")
    check_count(count, len(layers), f"{name}: moe_layer_count", "layer_list has {} layers")
    rows: list[list[list[int]]] = []
    for position, layer in enumerate(layers):
        _check_entry(layer, f"{name}: layer_list[{position}]", "device_list")
        rows.append(_devices(layer, f"{name}: layer {position}"))
        if len(rows[-1]) != len(rows[0]):
            raise ExpertMapError(
                f"{name}: layer {position} has {len(rows[-1])} devices, layer 0 has {len(rows[0])}; all layers need "
                "the same number"
            )
    _check_order(layers, "layer_id", name)
    num_slots = len(rows[0][0])
    for number, row in enumerate(rows):
        for device, experts in enumerate(row):
            if len(experts) != num_slots:
                raise ExpertMapError(
                    f"{name}: layer {number}, device {device} has {len(experts)} slots, layer 0, device 0 has "
                    f"{num_slots}; all devices need the same number"
                )
    num_ranks = len(rows[0])
    if num_ranks * num_slots > MAX_SLOTS:
        raise ExpertMapError(f"{name} has {num_ranks * num_slots} slots per layer; allowed are {MAX_SLOTS}")
    return Found(np.array(rows, dtype=np.int32).reshape(len(rows), -1), ranks=num_ranks)


def _devices(layer: dict[str, Any], where: str) -> list[list[int]]:
    """The experts of each device of a layer, in order of the devices."""
    devices = layer.get("device_list")
    if not isinstance(devices, list) or not 0 < len(devices) <= MAX_SLOTS:
        raise ExpertMapError(f"{where}: device_list must be a list of devices; it is {kind(devices)}")
    if layer.get("device_count") is not None:  # vllm-ascend does not read it
        check_count(layer["device_count"], len(devices), f"{where}: device_count", "device_list has {} devices")
    found: list[list[int]] = []
    for position, device in enumerate(devices):
        _check_entry(device, f"{where}, device_list[{position}]", "device_expert")
        experts = device.get("device_expert")
        if not isinstance(experts, list) or not 0 < len(experts) <= MAX_SLOTS:
            raise ExpertMapError(
                f"{where}, device {position}: device_expert must be a list of expert ids; it is {kind(experts)}"
            )
        check_ids(experts, f"{where}, device {position}")
        found.append(experts)
    _check_order(devices, "device_id", where)
    return found


def _check_entry(entry: Any, where: str, key: str) -> None:
    if not isinstance(entry, dict):
        raise ExpertMapError(f"{where} is {kind(entry)}; expected an object with {key}")


def check_count(count: Any, length: int, where: str, what: str) -> None:
    if type(count) is int and count == length:
        return
    if count is None:
        raise ExpertMapError(f"{where} is missing or null, but {what.format(length)}; write the number {length}")
    if isinstance(count, str) and count.strip() == str(length):
        raise ExpertMapError(f"{where} is {kind(count)}, text; write the number {length} without quotes")
    if type(count) is float and count == length:
        raise ExpertMapError(f"{where} is {kind(count)}; write {length} without a decimal point")
    raise ExpertMapError(f"{where} is {kind(count)}, but {what.format(length)}; one of them is wrong")


def _check_order(entries: list[Any], key: str, where: str) -> None:
    """Refuses ids that contradict the order of a list, because readers by id and by order would disagree. Ids may be
    missing, or begin at any number."""
    ids = [entry.get(key) for entry in entries]
    if any(type(number) is not int for number in ids):
        return
    word = key.removesuffix("_id")
    for before, after in itertools.pairwise(ids):
        if after == before:
            raise ExpertMapError(f"{where}: {word} {after} stands twice in {word}_list")
        if after < before:
            raise ExpertMapError(
                f"{where}: {key} {after} stands after {before} in {word}_list; vllm-ascend goes by the order of the "
                "list whatever the ids say: sort it by id"
            )


def from_rows(value: Any, name: str) -> Int32Array:
    """A list of layers, each a list of expert ids by slot."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        raise ExpertMapError(f"{name} must be a list of 1..{MAX_LAYERS} layers; it is {kind(value)}")
    for layer, row in enumerate(value):
        if not isinstance(row, list) or not 0 < len(row) <= MAX_SLOTS:
            raise ExpertMapError(
                f"{name}: layer {layer} must be a list of 1..{MAX_SLOTS} expert ids; it is {kind(row)}"
            )
        if len(row) != len(value[0]):
            raise ExpertMapError(
                f"{name}: layer {layer} has {len(row)} slots, layer 0 has {len(value[0])}; all layers need the same "
                f"number"
            )
        check_ids(row, f"{name}: layer {layer}")
    return np.array(value, dtype=np.int32)


def as_slots(array: npt.NDArray[Any], name: str) -> Int32Array:
    """An array of expert ids by layer and slot."""
    if array.ndim != 2 or not array.size or len(array) > MAX_LAYERS or array.shape[1] > MAX_SLOTS:
        raise ExpertMapError(
            f"{name} has shape {array.shape}; expected [layers, slots] with at most {MAX_LAYERS} layers and "
            f"{MAX_SLOTS} slots"
        )
    bad = ~(np.isfinite(array) & (array >= 0) & (array <= MAX_EXPERT) & (array == np.floor(array)))
    if bad.any():
        layer, slot = (int(i) for i in np.argwhere(bad)[0])
        raise ExpertMapError(
            f"{name}: layer {layer}, slot {slot} is {array[layer, slot]}; expert ids are integers from 0"
        )
    return array.astype(np.int32)


def check_ids(experts: list[Any], where: str) -> None:
    for slot, expert in enumerate(experts):
        if type(expert) is not int or not 0 <= expert <= MAX_EXPERT:
            raise ExpertMapError(
                f"{where}, slot {slot} is {kind(expert)}; expert ids are integers from 0 to {MAX_EXPERT}"
                f"{_form_of_number(expert)}"
            )


def _form_of_number(value: Any) -> str:
    """What is wrong with the form of a value that is a number in other ones."""
    if isinstance(value, str) and value.strip().isdecimal():
        return ", written without quotes"
    return ", written without a decimal point" if type(value) is float and value.is_integer() else ""


def scalar(arrays: dict[str, npt.NDArray[Any]], key: str, name: str) -> int | None:
    """One of the numbers beside the array in an archive."""
    if key not in arrays:
        return None
    array = arrays[key]
    if array.size != 1 or array.dtype.kind not in "iu" or not 1 <= int(array.reshape(-1)[0]) <= MAX_SLOTS:
        raise ExpertMapError(f"{name}: {key} must be one integer from 1 to {MAX_SLOTS}")
    return int(array.reshape(-1)[0])


def to_ascend(placement: Placement) -> dict[str, Any]:
    """The object that vllm-ascend's JSON holds."""
    by_rank = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, -1).tolist()
    return {
        "moe_layer_count": placement.num_layers,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": placement.num_ranks,
                "device_list": [
                    {"device_id": device, "device_expert": experts} for device, experts in enumerate(devices)
                ],
            }
            for layer, devices in enumerate(by_rank)
        ],
    }


def kind(value: object) -> str:
    """Describes a value of a JSON text in a few words."""
    if value is None:
        return "missing or null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = (
        json.dumps(value, default=str)
        if not isinstance(value, int) or abs(value) < 10**40
        else "a number of more than 40 digits"
    )
    return show(text if len(text) <= 80 else text[:77] + "...")
