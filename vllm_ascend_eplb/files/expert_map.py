# SPDX-License-Identifier: Apache-2.0
"""Expert maps: placements as files.

Three forms are read and written:

- ``ascend``, vllm-ascend's JSON (``expert_map_path``, ``expert_map_record_path``); ``device_expert[slot]`` is the
  logical expert in that slot of the device::

    {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": [
      {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}

- ``sglang``, the JSON of SGLang's ``--init-expert-location``: ``{"physical_to_logical_map": [[...], ...]}``. It has a
  row for each layer of the model, those without experts too (``dense_layers`` leading rows, 3 for DeepSeek-V3), and
  does not say how many ranks there are.
- ``array``, ``physical_to_logical`` [L, P] as .npy, .npz or a JSON list of lists; .npz carries ``num_experts`` and
  ``num_ranks`` as well.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..values.placement import EMPTY, Int32Array, Placement, PlacementError
from .disk import FileError, parse_json, parse_npy, parse_npz, read_bounded, show, write_atomic

MapForm: TypeAlias = Literal["ascend", "sglang", "array"]


FORMS: tuple[MapForm, ...] = ("ascend", "sglang", "array")


MAX_MAP_BYTES = 256 << 20
"""Largest map file that is read; a map of 100 layers with 1,024 slots has less than 1 MiB."""


MAX_LAYERS = 4096


MAX_SLOTS = 65535
"""Most slots per layer, over all ranks: what the planner works with."""


MAX_EXPERT = 65535


_SGLANG_KEY = "physical_to_logical_map"


_ARRAY_KEY = "physical_to_logical"


class ExpertMapError(ValueError):
    """A map file that no server may start from. The message is one line: file, layer, device, slot, way out."""


def read_expert_map(
    path: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    num_ranks: int | None = None,
    dense_layers: int = 0,
    allow_duplicates: bool = False,
) -> Placement:
    """Reads a map file of any of the three forms; which one it is shows from its contents.

    Args:
        path: of the file. Symbolic links are followed.
        num_layers: MoE layers, L, that the model has; None accepts any number.
        num_experts: logical experts per layer, E, that the model has; None takes the largest id in the file + 1.
        num_ranks: ranks of the server, R. The forms ``sglang`` and ``array`` (but .npz) do not hold it and need it.
        dense_layers: leading rows of the form ``sglang`` that belong to layers without experts.
        allow_duplicates: accepts an expert that one device holds twice; DeepSeek's algorithm makes such maps, but the
            second copy only takes memory.

    Returns:
        The placement, which has no empty slots.

    Raises:
        ExpertMapError: the file cannot be read, is no map, or is a map for another model or number of ranks.
    """
    try:
        data = read_bounded(path, MAX_MAP_BYTES, "expert map")
        slots, found_experts, found_ranks = _parse(data, path, dense_layers)
    except FileError as error:
        raise ExpertMapError(str(error)) from None
    if found_ranks is None:
        found_ranks = num_ranks
    if found_ranks is None:
        raise ExpertMapError(f"{show(path)} does not say how many ranks it is for; give their number")
    name = show(path)
    if num_ranks is not None and found_ranks != num_ranks:
        raise ExpertMapError(
            f"{name} is for {found_ranks} devices, the server has {num_ranks} ranks; use a map made for {num_ranks}"
        )
    if num_layers is not None and len(slots) != num_layers:
        hint = "; give the number of layers without experts" if len(slots) > num_layers and dense_layers == 0 else ""
        raise ExpertMapError(
            f"{name} has {len(slots)} MoE layers, the model has {num_layers}: another model's map?{hint}"
        )
    _check_slots(slots, name, num_experts, found_ranks, allow_duplicates)
    experts = num_experts or found_experts or int(slots.max()) + 1
    try:
        return Placement(slots, experts, found_ranks)
    except PlacementError as error:
        raise ExpertMapError(f"{name}: {error}") from None


def write_expert_map(
    path: str | os.PathLike[str], placement: Placement, form: MapForm | None = None, *, dense_layers: int = 0
) -> None:
    """Writes a map file; readers see the old or the new one, never a part.

    Args:
        path: of the file; for the form ``array`` its ending says which kind (.npy, .npz, else JSON).
        placement: what to write.
        form: ``ascend``, ``sglang`` or ``array``; None takes ``array`` for .npy and .npz, else ``ascend``.
        dense_layers: rows that the form ``sglang`` gets in front, for layers without experts.

    Raises:
        ExpertMapError: the placement has an empty slot, or the file cannot be written.
    """
    form = form or default_form(path)
    empty = np.argwhere(placement.physical_to_logical == EMPTY)
    if empty.size:
        layer, slot = (int(i) for i in empty[0])
        raise ExpertMapError(f"layer {layer}, slot {slot} is empty; a map file must name an expert for every slot")
    try:
        write_atomic(path, _format(placement, form, Path(path).suffix, dense_layers))
    except FileError as error:
        raise ExpertMapError(str(error)) from None


def default_form(path: str | os.PathLike[str]) -> MapForm:
    """The form that a file is written in when nothing else is said."""
    return "array" if Path(path).suffix in (".npy", ".npz") else "ascend"


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


def _format(placement: Placement, form: MapForm, ending: str, dense_layers: int) -> bytes:
    slots = placement.physical_to_logical
    if form == "ascend":
        return json.dumps(to_ascend(placement)).encode() + b"\n"
    if form == "sglang":
        trivial = np.tile(np.arange(placement.num_slots, dtype=np.int32) % placement.num_experts, (dense_layers, 1))
        return json.dumps({_SGLANG_KEY: np.concatenate([trivial, slots]).tolist()}).encode() + b"\n"
    if form != "array":
        raise ExpertMapError(f"form is {form!r}; allowed are {', '.join(FORMS)}")
    stream = io.BytesIO()
    if ending == ".npy":
        np.save(stream, slots)
    elif ending == ".npz":
        np.savez_compressed(
            stream, physical_to_logical=slots, num_experts=placement.num_experts, num_ranks=placement.num_ranks
        )
    else:
        stream.write(json.dumps(slots.tolist()).encode() + b"\n")
    return stream.getvalue()


def _parse(data: bytes, path: str | os.PathLike[str], dense_layers: int) -> tuple[Int32Array, int | None, int | None]:
    """(slots [L, P], experts if said, ranks if said) of a file's contents."""
    name = show(path)
    if data.startswith(b"\x93NUMPY"):
        return _as_slots(parse_npy(data, path), name), None, None
    if data.startswith(b"PK"):
        arrays = parse_npz(data, path, MAX_MAP_BYTES, (_ARRAY_KEY, "num_experts", "num_ranks"))
        keys = [key for key in arrays if key not in ("num_experts", "num_ranks")]
        if not keys:
            raise ExpertMapError(f"{name} has no array {_ARRAY_KEY}; save it under that name")
        return (
            _as_slots(arrays[keys[0]], name),
            _scalar(arrays, "num_experts", name),
            _scalar(arrays, "num_ranks", name),
        )
    value = parse_json(data, path)
    if isinstance(value, list):
        return _from_rows(value, name), None, None
    if isinstance(value, dict) and "layer_list" in value:
        slots, num_ranks = _from_ascend(value, name)
        return slots, None, num_ranks
    if isinstance(value, dict) and _SGLANG_KEY in value:
        slots = _from_rows(value[_SGLANG_KEY], f"{name}: {_SGLANG_KEY}")
        if not 0 <= dense_layers < len(slots):
            raise ExpertMapError(f"{name} has {len(slots)} layers; {dense_layers} of them cannot be without experts")
        return slots[dense_layers:], None, None
    if isinstance(value, dict) and "logical_count" in value:
        raise ExpertMapError(f"{name} holds loads (logical_count), no map; make one from it with the command plan")
    raise ExpertMapError(
        f"{name} is JSON, but no expert map: expected an object with layer_list (vllm-ascend) or {_SGLANG_KEY} "
        f"(SGLang), or a list of lists"
    )


def _from_ascend(value: dict[str, Any], name: str) -> tuple[Int32Array, int]:
    layers = value["layer_list"]
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise ExpertMapError(f"{name}: layer_list must be a list of 1..{MAX_LAYERS} layers; it is {_kind(layers)}")
    count = value.get("moe_layer_count")
    if type(count) is not int or count != len(layers):
        raise ExpertMapError(
            f"{name}: moe_layer_count is {_kind(count)}, but layer_list has {len(layers)} layers; one of them is wrong"
        )
    rows: dict[int, list[list[int]]] = {}
    for position, layer in enumerate(layers):
        number = _index(layer, "layer_id", len(layers), f"{name}: layer_list[{position}]")
        if number in rows:
            raise ExpertMapError(f"{name}: layer {number} stands twice in layer_list")
        rows[number] = _devices(layer, f"{name}: layer {number}")
        if len(rows[number]) != len(next(iter(rows.values()))):
            raise ExpertMapError(
                f"{name}: layer {number} has {len(rows[number])} devices, layer {next(iter(rows))} has "
                f"{len(next(iter(rows.values())))}; all layers need the same number"
            )
    num_slots = len(rows[0][0])
    for number in sorted(rows):
        for device, experts in enumerate(rows[number]):
            if len(experts) != num_slots:
                raise ExpertMapError(
                    f"{name}: layer {number}, device {device} has {len(experts)} slots, layer 0, device 0 has "
                    f"{num_slots}; all devices need the same number"
                )
    num_ranks = len(rows[0])
    if num_ranks * num_slots > MAX_SLOTS:
        raise ExpertMapError(f"{name} has {num_ranks * num_slots} slots per layer; allowed are {MAX_SLOTS}")
    slots = np.array([rows[number] for number in sorted(rows)], dtype=np.int32)
    return slots.reshape(len(rows), -1), num_ranks


def _devices(layer: dict[str, Any], where: str) -> list[list[int]]:
    """The experts of each device of a layer, in order of the devices."""
    devices = layer.get("device_list")
    if not isinstance(devices, list) or not 0 < len(devices) <= MAX_SLOTS:
        raise ExpertMapError(f"{where}: device_list must be a list of devices; it is {_kind(devices)}")
    count = layer.get("device_count")
    if type(count) is not int or count != len(devices):
        raise ExpertMapError(
            f"{where}: device_count is {_kind(count)}, but device_list has {len(devices)} devices; one of them is wrong"
        )
    found: dict[int, list[int]] = {}
    for position, device in enumerate(devices):
        number = _index(device, "device_id", len(devices), f"{where}, device_list[{position}]")
        if number in found:
            raise ExpertMapError(f"{where}: device {number} stands twice in device_list")
        experts = device.get("device_expert")
        if not isinstance(experts, list) or not 0 < len(experts) <= MAX_SLOTS:
            raise ExpertMapError(
                f"{where}, device {number}: device_expert must be a list of expert ids; it is {_kind(experts)}"
            )
        _check_ids(experts, f"{where}, device {number}")
        found[number] = experts
    return [found[number] for number in sorted(found)]


def _from_rows(value: Any, name: str) -> Int32Array:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        raise ExpertMapError(f"{name} must be a list of 1..{MAX_LAYERS} layers; it is {_kind(value)}")
    for layer, row in enumerate(value):
        if not isinstance(row, list) or not 0 < len(row) <= MAX_SLOTS:
            raise ExpertMapError(
                f"{name}: layer {layer} must be a list of 1..{MAX_SLOTS} expert ids; it is {_kind(row)}"
            )
        if len(row) != len(value[0]):
            raise ExpertMapError(
                f"{name}: layer {layer} has {len(row)} slots, layer 0 has {len(value[0])}; all layers need the same "
                f"number"
            )
        _check_ids(row, f"{name}: layer {layer}")
    return np.array(value, dtype=np.int32)


def _as_slots(array: npt.NDArray[Any], name: str) -> Int32Array:
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


def _check_ids(experts: list[Any], where: str) -> None:
    for slot, expert in enumerate(experts):
        if type(expert) is not int or not 0 <= expert <= MAX_EXPERT:
            raise ExpertMapError(
                f"{where}, slot {slot} is {_kind(expert)}; expert ids are integers from 0 to {MAX_EXPERT}"
            )


def _check_slots(slots: Int32Array, name: str, num_experts: int | None, num_ranks: int, allow_duplicates: bool) -> None:
    if num_ranks < 1 or slots.shape[1] % num_ranks:
        raise ExpertMapError(
            f"{name} has {slots.shape[1]} slots per layer, which {num_ranks} ranks cannot share evenly; give the "
            f"number of ranks that it was made for"
        )
    per_rank = slots.shape[1] // num_ranks
    if num_experts is not None and int(slots.max()) >= num_experts:
        layer, slot = (int(i) for i in np.argwhere(slots >= num_experts)[0])
        raise ExpertMapError(
            f"{name}: layer {layer}, device {slot // per_rank}, slot {slot % per_rank} holds expert "
            f"{slots[layer, slot]}; the model has experts 0..{num_experts - 1}: another model's map?"
        )
    experts = num_experts or int(slots.max()) + 1
    if experts > slots.shape[1]:
        raise ExpertMapError(
            f"{name} has {slots.shape[1]} slots per layer, fewer than {experts} experts; every expert needs a slot"
        )
    held = np.zeros((len(slots), experts), dtype=bool)
    held[np.arange(len(slots))[:, None], slots] = True
    if not held.all():
        layer, expert = (int(i) for i in np.argwhere(~held)[0])
        raise ExpertMapError(
            f"{name}: layer {layer} has no copy of expert {expert} on any device ({int((~held).sum())} such experts in "
            f"all layers); every expert of 0..{experts - 1} needs one"
        )
    if allow_duplicates:
        return
    by_rank = slots.reshape(len(slots), num_ranks, per_rank)
    order = np.sort(by_rank, axis=2)
    twice = np.argwhere(order[..., 1:] == order[..., :-1])
    if twice.size:
        layer, device, place = (int(i) for i in twice[0])
        expert = int(order[layer, device, place])
        where = np.flatnonzero(by_rank[layer, device] == expert)
        raise ExpertMapError(
            f"{name}: layer {layer}, device {device} holds expert {expert} twice, in slots {where[0]} and {where[1]} "
            f"({len(twice)} such slots in all); put another expert there, or allow duplicates"
        )


def _index(entry: Any, key: str, count: int, where: str) -> int:
    if not isinstance(entry, dict):
        raise ExpertMapError(f"{where} is {_kind(entry)}; expected an object with {key}")
    number = entry.get(key)
    if type(number) is not int or not 0 <= number < count:
        raise ExpertMapError(f"{where}: {key} is {_kind(number)}; allowed are 0..{count - 1}")
    return number


def _scalar(arrays: dict[str, npt.NDArray[Any]], key: str, name: str) -> int | None:
    if key not in arrays:
        return None
    array = arrays[key]
    if array.size != 1 or array.dtype.kind not in "iu" or not 1 <= int(array.reshape(-1)[0]) <= MAX_SLOTS:
        raise ExpertMapError(f"{name}: {key} must be one integer from 1 to {MAX_SLOTS}")
    return int(array.reshape(-1)[0])


def _kind(value: object) -> str:
    """A value of a JSON text in a few words."""
    if value is None:
        return "missing or null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return show(text if len(text) <= 80 else text[:77] + "...")
