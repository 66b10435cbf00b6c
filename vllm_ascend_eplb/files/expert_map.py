# SPDX-License-Identifier: Apache-2.0
"""Expert maps: placements as files.

These forms are read and written; the form of a file is recognised from its contents:

- ``ascend``, vllm-ascend's JSON (``expert_map_path``, ``expert_map_record_path``); ``device_expert[slot]`` is the
  logical expert in that slot of the device. Layers and devices count by their order::

    {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": [
      {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}

- ``sglang``, the file of SGLang's ``--init-expert-location``, ``{"physical_to_logical_map": [[...], ...]}`` as JSON or
  .pt. It has a row for each layer of the model, those without experts too (``dense_layers`` leading rows, 3 for
  DeepSeek-V3), and does not say how many ranks there are.
- ``array``, ``physical_to_logical`` [L, P] as .npy, .npz or a JSON list of lists; .npz carries ``num_experts`` and
  ``num_ranks`` as well.
- ``trtllm``, ``omni``, ``deepseek``: forms of other balancers, see foreign_forms.py.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..values.placement import EMPTY, Int32Array, Placement, PlacementError
from .disk import FileError, parse_json, parse_npy, parse_npz, read_bounded, show, write_atomic
from .foreign_forms import (
    DEEPSEEK,
    TRTLLM_KEY,
    from_deepseek,
    from_omni,
    from_trtllm,
    parse_yaml,
    settings_of_balancer,
    to_deepseek,
    to_omni,
    to_trtllm,
)
from .map_forms import (
    ExpertMapError,
    Found,
    as_slots,
    from_ascend,
    from_rows,
    scalar,
    to_ascend,
)
from .torch_file import is_torch_file, read_torch, write_torch

__all__ = ["FORMS", "MAX_MAP_BYTES", "ExpertMapError", "MapForm", "read_expert_map", "to_ascend", "write_expert_map"]


MapForm: TypeAlias = Literal["ascend", "sglang", "array", "trtllm", "omni", "deepseek"]


FORMS: tuple[MapForm, ...] = ("ascend", "sglang", "array", "trtllm", "omni", "deepseek")


MAX_MAP_BYTES = 256 << 20
"""Largest map file that is read; a map of 100 layers with 1,024 slots has less than 1 MiB."""


_SGLANG_KEY = "physical_to_logical_map"


_SGLANG_KEYS = (_SGLANG_KEY, "last_physical_to_logical_map")
"""The second key is in the records that SGLang writes for each forward pass."""


_ARRAY_KEY = "physical_to_logical"


def read_expert_map(
    path: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    num_ranks: int | None = None,
    dense_layers: int | Collection[int] = 0,
    allow_duplicates: bool = False,
) -> Placement:
    """Reads a map file of any form; the form is recognised from the contents.

    Args:
        path: of the file. Symbolic links are followed.
        num_layers: MoE layers, L, that the model has; None accepts any number.
        num_experts: logical experts per layer, E, that the model has; None takes the largest id in the file + 1.
        num_ranks: ranks of the server, R. Only the forms ``ascend`` and ``omni``, and ``array`` as .npz, hold it.
        dense_layers: rows of the form ``sglang`` that belong to layers without experts: the number of leading ones, or
            the layer numbers if they stand between layers with experts. A file of form ``trtllm`` names its layers.
        allow_duplicates: accepts an expert that one device holds twice; DeepSeek's algorithm makes such maps, but the
            second copy only takes memory.

    Returns:
        The placement, which has no empty slots.

    Raises:
        ExpertMapError: the file cannot be read, is not a map, or is a map for another model or number of ranks.
    """
    try:
        data = read_bounded(path, MAX_MAP_BYTES, "expert map")
        found = _parse(data, path, dense_layers)
    except FileError as error:
        raise ExpertMapError(str(error)) from None
    slots = found.slots
    found_ranks = found.ranks if found.ranks is not None else num_ranks
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
    _check_slots(slots, name, num_experts or found.experts, found_ranks, allow_duplicates)
    experts = num_experts or found.experts or int(slots.max()) + 1
    try:
        return Placement(slots, experts, found_ranks)
    except PlacementError as error:
        raise ExpertMapError(f"{name}: {error}") from None


def write_expert_map(
    path: str | os.PathLike[str],
    placement: Placement,
    form: MapForm | None = None,
    *,
    dense_layers: int | Collection[int] = 0,
    layers: Sequence[int] | None = None,
) -> None:
    """Writes a map file; readers see the old or the new one, never a part.

    Args:
        path: of the file; its ending says which kind where a form has several (.npy, .npz, .pt, else JSON).
        placement: what to write.
        form: one of ``FORMS``; None takes that of :func:`default_form`.
        dense_layers: layers without experts, as in :func:`read_expert_map`. The form ``sglang`` gets rows for them;
            layer numbers of the form ``trtllm`` count them.
        layers: layer numbers, in the model, of the placement's layers, ascending; instead of ``dense_layers`` if layers
            without experts stand between them.

    Raises:
        ExpertMapError: the placement has an empty slot, the form cannot hold it, or the file cannot be written.
    """
    form = form or default_form(path)
    empty = np.argwhere(placement.physical_to_logical == EMPTY)
    if empty.size:
        layer, slot = (int(i) for i in empty[0])
        raise ExpertMapError(f"layer {layer}, slot {slot} is empty; a map file must name an expert for every slot")
    if layers is not None:
        numbers, total = list(layers), layers[-1] + 1
    else:
        dense = _dense(dense_layers)
        total = placement.num_layers + len(dense)
        numbers = [row for row in range(total) if row not in dense]
        if len(numbers) != placement.num_layers:
            raise ExpertMapError(
                f"layer {max(dense)} cannot be without experts: with {placement.num_layers} layers that have them, the "
                f"model has {total}"
            )
    try:
        write_atomic(path, _format(placement, form, Path(path).suffix, numbers, total))
    except FileError as error:
        raise ExpertMapError(str(error)) from None


def default_form(path: str | os.PathLike[str]) -> MapForm:
    """The form in which a file is written by default, from its ending."""
    by_ending: dict[str, MapForm] = {
        ".npy": "array", ".npz": "array", ".pt": "sglang", ".yaml": "trtllm", ".yml": "trtllm"
    }  # fmt: skip
    return by_ending.get(Path(path).suffix.lower(), "ascend")


def _format(placement: Placement, form: MapForm, ending: str, layers: list[int], total: int) -> bytes:
    slots, ending = placement.physical_to_logical, ending.lower()
    if form == "ascend":
        return json.dumps(to_ascend(placement)).encode() + b"\n"
    if form == "sglang":
        rows = np.tile(np.arange(placement.num_slots, dtype=np.int32) % placement.num_experts, (total, 1))
        rows[layers] = slots
        if ending == ".pt":
            return write_torch({_SGLANG_KEY: rows.astype(np.int64)})
        return json.dumps({_SGLANG_KEY: rows.tolist()}).encode() + b"\n"
    if form == "trtllm":
        return to_trtllm(placement, layers)
    if form == "omni":
        return _npy(to_omni(placement))
    if form == "deepseek":
        arrays = to_deepseek(placement)
        return write_torch(arrays) if ending == ".pt" else _npz(**arrays)
    if form != "array":
        raise ExpertMapError(f"form is {form!r}; allowed are {', '.join(FORMS)}")
    if ending == ".npy":
        return _npy(slots)
    if ending == ".npz":
        return _npz(physical_to_logical=slots, num_experts=placement.num_experts, num_ranks=placement.num_ranks)
    return json.dumps(slots.tolist()).encode() + b"\n"


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _parse(data: bytes, path: str | os.PathLike[str], dense_layers: int | Collection[int]) -> Found:
    """The map in a file's contents.

    Raises:
        ExpertMapError, FileError: the contents are not a map.
    """
    name = show(path)
    if data.startswith(b"\x93NUMPY"):
        array = parse_npy(data, path)
        return from_omni(array, name) if array.ndim == 3 else Found(as_slots(array, name))
    if is_torch_file(data):
        return _from_torch(read_torch(data, path, MAX_MAP_BYTES), name, dense_layers)
    if data.startswith(b"PK"):
        return _from_npz(data, path, name)
    value = parse_yaml(data, name) if _is_yaml(data, path) else parse_json(data, path)
    value = settings_of_balancer(value, name)
    if isinstance(value, list):
        return Found(from_rows(value, name))
    if isinstance(value, dict) and "layer_list" in value:
        return from_ascend(value, name)
    if isinstance(value, dict) and _SGLANG_KEY in value:
        return Found(_without_dense(from_rows(value[_SGLANG_KEY], f"{name}: {_SGLANG_KEY}"), name, dense_layers))
    if isinstance(value, dict) and (TRTLLM_KEY in value or "num_slots" in value):
        return from_trtllm(value, name)
    if isinstance(value, dict) and "logical_count" in value:
        raise ExpertMapError(f"{name} holds loads (logical_count), no map; make one from it with the command plan")
    raise ExpertMapError(
        f"{name} is not an expert map: expected an object with layer_list (vllm-ascend), {_SGLANG_KEY} (SGLang) or "
        f"{TRTLLM_KEY} (TensorRT-LLM), or a list of lists"
    )


def _is_yaml(data: bytes, path: str | os.PathLike[str]) -> bool:
    """Whether a file is YAML, by its ending or by TensorRT-LLM's keys; never if it begins as JSON does."""
    begin = data[:4096].lstrip()
    if begin[:1] in (b"{", b"["):
        return False
    return Path(path).suffix.lower() in (".yaml", ".yml") or any(
        key in begin for key in (b"num_slots:", b"layer_updates_per_iter:", TRTLLM_KEY.encode() + b":")
    )


def _from_npz(data: bytes, path: str | os.PathLike[str], name: str) -> Found:
    numbers = ("num_experts", "num_ranks")
    three = tuple(key for keys in DEEPSEEK.values() for key in keys)
    arrays = parse_npz(data, path, MAX_MAP_BYTES, (_ARRAY_KEY, *numbers, *three))
    keys = [key for key in arrays if key not in numbers]
    if not keys:
        raise ExpertMapError(f"{name} has no array {_ARRAY_KEY}; save it under that name")
    if len(keys) > 1 or keys[0] in three:
        found = from_deepseek(arrays, name)
    else:
        array = arrays[keys[0]]
        found = from_omni(array, name) if array.ndim == 3 else Found(as_slots(array, name))
    experts, ranks = scalar(arrays, "num_experts", name), scalar(arrays, "num_ranks", name)
    return Found(found.slots, experts or found.experts, ranks or found.ranks)


def _from_torch(value: Any, name: str, dense_layers: int | Collection[int]) -> Found:
    """SGLang's table, DeepSeek's three arrays in a table or in their order, or one array."""
    if isinstance(value, list) and 0 < len(value) <= 3 and all(isinstance(entry, np.ndarray) for entry in value):
        return from_deepseek({f"arr_{number}": array for number, array in enumerate(value)}, name)
    if isinstance(value, np.ndarray):
        return from_omni(value, name) if value.ndim == 3 else Found(as_slots(value, name))
    if isinstance(value, dict):
        if any(key in value for key in (*DEEPSEEK["copies"][:1], *DEEPSEEK["counts"][:1])):
            return from_deepseek(value, name)
        for key in (*_SGLANG_KEYS, *DEEPSEEK["slots"]):
            if key in value:
                rows = value[key]
                slots = as_slots(rows, name) if isinstance(rows, np.ndarray) else from_rows(rows, f"{name}: {key}")
                return Found(_without_dense(slots, name, dense_layers))
        if "logical_count" in value:
            raise ExpertMapError(f"{name} holds loads (logical_count), no map; make one from it with the command plan")
    raise ExpertMapError(
        f"{name} is a file of torch.save, but no expert map: expected {_SGLANG_KEY} (SGLang) or DeepSeek's phy2log, "
        "log2phy and logcnt"
    )


def _without_dense(slots: Int32Array, name: str, dense_layers: int | Collection[int]) -> Int32Array:
    dense = _dense(dense_layers)
    if len(dense) >= len(slots):
        raise ExpertMapError(f"{name} has {len(slots)} layers; {len(dense)} of them cannot be without experts")
    if dense and max(dense) >= len(slots):
        raise ExpertMapError(f"{name} has layers 0..{len(slots) - 1}; layer {max(dense)} cannot be without experts")
    return slots[[row for row in range(len(slots)) if row not in dense]]


def _dense(dense_layers: int | Collection[int]) -> frozenset[int]:
    """Numbers of the layers without experts."""
    given = [dense_layers] if isinstance(dense_layers, int) else list(dense_layers)
    if min(given, default=0) < 0:
        raise ExpertMapError(f"dense_layers is {dense_layers}; give how many leading layers, or numbers from 0")
    return frozenset(range(dense_layers) if isinstance(dense_layers, int) else given)


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
