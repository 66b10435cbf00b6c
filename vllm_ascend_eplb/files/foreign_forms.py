# SPDX-License-Identifier: Apache-2.0
"""Placements in the forms of balancers for other engines: TensorRT-LLM, OmniPlacement, DeepSeek's EPLB.

- ``trtllm``: TensorRT-LLM's ``moe_load_balancer.yaml``. ``initial_global_assignments`` has the experts of all slots by
  the model's layer number, which counts layers without experts, too::

    num_slots: 10
    layer_updates_per_iter: 0
    initial_global_assignments:
      3: [7, 2, 0, 3, 5, 6, 1, 4, 7, 2]

- ``omni``: OmniPlacement's pattern, .npy [R, L, E], 1 where a rank holds an expert. It has no slots: a rank's experts
  are read in ascending order, each once.
- ``deepseek``: the three arrays that DeepSeek's ``rebalance_experts`` returns, ``phy2log`` [L, P], ``log2phy``
  [L, E, copies] (padded with -1) and ``logcnt`` [L, E], as .npz or as a file of ``torch.save``.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ..values.placement import Placement
from .disk import show
from .map_forms import MAX_EXPERT, MAX_LAYERS, MAX_SLOTS, ExpertMapError, Found, as_slots, check_count, from_rows, kind

TRTLLM_KEY = "initial_global_assignments"


MAX_YAML_BYTES = 16 << 20


MAX_YAML_DEPTH = 8


DEEPSEEK = {
    "slots": ("phy2log", "physical_to_logical_map", "physical_to_logical", "arr_0"),
    "copies": ("log2phy", "logical_to_physical_map", "logical_to_all_physical_map", "arr_1"),
    "counts": ("logcnt", "expert_count", "logical_replica_count", "arr_2"),
}
"""The three arrays of DeepSeek's EPLB, with the names that DeepSeek and callers of it save them under."""


_NESTED_IN_A_LINE = re.compile(rb"^[ \t]*(?:[-?:][ \t]+){4,}", re.MULTILINE)


_INDENTED = re.compile(rb"^ {40,}\S", re.MULTILINE)


def parse_yaml(data: bytes, name: str) -> Any:
    """The value of a YAML text; it may have lists and tables, but no tags, anchors or many levels.

    Raises:
        ExpertMapError: PyYAML is not installed, or the text is no such YAML.
    """
    if len(data) > MAX_YAML_BYTES:
        raise ExpertMapError(f"{name} has {len(data)} bytes; a YAML map has at most {MAX_YAML_BYTES}")
    codes = np.frombuffer(data, dtype=np.uint8)
    steps = np.isin(codes, (91, 123)).astype(np.int8) - np.isin(codes, (93, 125)).astype(np.int8)
    deep = int(np.cumsum(steps, dtype=np.int64).max(initial=0)) > MAX_YAML_DEPTH
    if deep or _NESTED_IN_A_LINE.search(data) or _INDENTED.search(data):
        raise ExpertMapError(f"{name} is nested more than {MAX_YAML_DEPTH} levels deep; is it the right file?")
    try:
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ExpertMapError(f"{name} is YAML, for which PyYAML is needed; pip install pyyaml") from None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        reader = loader(data)
        try:
            return reader.get_single_data()
        finally:
            reader.dispose()
    except Exception as error:  # YAMLError, and what constructors of dates and numbers raise
        reason = " ".join(str(error).split())
        raise ExpertMapError(f"{name} is not YAML ({show(reason)[:200]}); copy or write it again") from None


def from_trtllm(value: dict[Any, Any], name: str) -> Found:
    """TensorRT-LLM's configuration, its layers in ascending order."""
    table = value.get(TRTLLM_KEY)
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_LAYERS:
        raise ExpertMapError(
            f"{name}: {TRTLLM_KEY} must be a table of 1..{MAX_LAYERS} layers; it is {kind(table)}: TensorRT-LLM would "
            "begin with a placement of its own, and so does this balancer without a map"
        )
    rows: dict[int, Any] = {}
    for key, row in table.items():
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 6 else key
        if type(number) is not int or not 0 <= number < MAX_LAYERS or number in rows:
            raise ExpertMapError(f"{name}: {TRTLLM_KEY} has a layer {kind(key)}; layers are numbers, each given once")
        rows[number] = row
    numbers = sorted(rows)
    try:
        slots = from_rows([rows[number] for number in numbers], f"{name}: {TRTLLM_KEY}")
    except ExpertMapError as error:
        if numbers[0] == 0:
            raise
        raise ExpertMapError(f"{error} (layer 0 of the map is layer {numbers[0]} of the model)") from None
    count = value.get("num_slots")
    if count is not None:
        check_count(count, slots.shape[1], f"{name}: num_slots", "layers have {} slots")
    return Found(slots)


def settings_of_balancer(value: Any, name: str) -> Any:
    """TensorRT-LLM's settings of its balancer, taken out of the settings of its server if they stand there.

    Raises:
        ExpertMapError: the settings of the server name another file.
    """
    around = value.get("moe_config", value) if isinstance(value, dict) else None
    found = around.get("load_balancer", around.get("moe_load_balancer")) if isinstance(around, dict) else None
    if isinstance(found, str):
        raise ExpertMapError(f"{name} names the file of the map, {show(found)}; give that file")
    return found if isinstance(found, dict) else value


def to_trtllm(placement: Placement, layers: list[int]) -> bytes:
    """TensorRT-LLM's configuration with this placement as a static one.

    Args:
        layers: layer numbers, in the model, of the placement's layers.
    """
    rows = placement.physical_to_logical.tolist()
    lines = [f"num_slots: {placement.num_slots}", "layer_updates_per_iter: 0", f"{TRTLLM_KEY}:"]
    lines += [f"  {number}: [{', '.join(map(str, row))}]" for number, row in zip(layers, rows, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def from_omni(array: npt.NDArray[Any], name: str) -> Found:
    """OmniPlacement's pattern [R, L, E]."""
    ranks, layers, experts = array.shape
    if not array.size or layers > MAX_LAYERS or ranks > MAX_SLOTS or experts > MAX_EXPERT:
        raise ExpertMapError(f"{name} has shape {array.shape}; expected [ranks, layers, experts]")
    bad = ~((array == 0) | (array == 1))
    if bad.any():
        rank, layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise ExpertMapError(
            f"{name}: rank {rank}, layer {layer}, expert {expert} is {array[rank, layer, expert]}; a pattern "
            "[ranks, layers, experts] has 1 where a rank holds an expert, else 0"
        )
    held = array.astype(bool)
    counts = held.sum(axis=2)
    per_rank = int(counts[0, 0])
    if (counts != per_rank).any():
        rank, layer = (int(i) for i in np.argwhere(counts != per_rank)[0])
        raise ExpertMapError(
            f"{name}: rank {rank} holds {counts[rank, layer]} experts in layer {layer}, rank 0 holds {per_rank} in "
            "layer 0; all ranks and layers need the same number"
        )
    if per_rank == 0 or ranks * per_rank > MAX_SLOTS:
        raise ExpertMapError(f"{name} has {ranks * per_rank} slots per layer; allowed are 1..{MAX_SLOTS}")
    slots = np.nonzero(held.transpose(1, 0, 2))[2].reshape(layers, ranks * per_rank)
    return Found(slots.astype(np.int32), experts, ranks)


def to_omni(placement: Placement) -> npt.NDArray[np.int64]:
    """The pattern of a placement.

    Raises:
        ExpertMapError: a rank holds an expert twice, which a pattern cannot hold.
    """
    if placement.num_duplicates:
        raise ExpertMapError(
            f"a rank holds an expert twice ({placement.num_duplicates} such slots), which OmniPlacement's form cannot "
            "hold; choose another form"
        )
    by_rank = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, -1)
    pattern = np.zeros((placement.num_layers, placement.num_ranks, placement.num_experts), dtype=np.int64)
    np.put_along_axis(pattern, by_rank.astype(np.int64), 1, axis=2)
    return np.ascontiguousarray(pattern.transpose(1, 0, 2))


def from_deepseek(arrays: dict[str, Any], name: str) -> Found:
    """DeepSeek's arrays; the second and the third, if present, are compared with the first."""
    first, array = _named(arrays, "slots")
    if array is None:
        raise ExpertMapError(f"{name} has none of the arrays {', '.join(DEEPSEEK['slots'][:3])}")
    slots = as_slots(array, f"{name}: {first}")
    third, counts = _named(arrays, "counts")
    experts = int(counts.shape[1]) if counts is not None and counts.ndim == 2 else int(slots.max()) + 1
    if experts > MAX_EXPERT:
        raise ExpertMapError(f"{name}: {third} is for {experts} experts; allowed are {MAX_EXPERT}")
    if int(slots.max()) >= experts:
        raise ExpertMapError(f"{name}: {first} has expert {int(slots.max())}, {third} is for {experts} experts")
    held = np.zeros((len(slots), experts), dtype=np.int64)
    np.add.at(held, (np.arange(len(slots))[:, None], slots), 1)
    if counts is not None and not np.array_equal(counts, held):
        raise ExpertMapError(f"{name}: {third} does not count the copies in {first}; are they of one plan?")
    second, copies = _named(arrays, "copies")
    if copies is not None:
        _check_copies(copies, slots, held, f"{name}: {second}", first)
    return Found(slots, experts)


def to_deepseek(placement: Placement) -> dict[str, npt.NDArray[np.int64]]:
    """DeepSeek's three arrays of a placement."""
    slots = placement.physical_to_logical.astype(np.int64)
    counts = placement.replica_count.astype(np.int64)
    copies = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int64)
    seen = np.zeros_like(counts)
    layers = np.arange(len(slots))
    for slot in range(slots.shape[1]):
        experts = slots[:, slot]
        copies[layers, experts, seen[layers, experts]] = slot
        seen[layers, experts] += 1
    return {"phy2log": slots, "log2phy": copies, "logcnt": counts}


def _named(arrays: dict[str, Any], which: str) -> tuple[str, npt.NDArray[Any] | None]:
    for name in DEEPSEEK[which]:
        if isinstance(arrays.get(name), np.ndarray):
            return name, arrays[name]
    return DEEPSEEK[which][0], None


def _check_copies(
    copies: npt.NDArray[Any], slots: npt.NDArray[Any], held: npt.NDArray[Any], where: str, first: str
) -> None:
    """Each slot that ``log2phy`` names must hold the expert, and all its copies must be named."""
    fits = copies.ndim == 3 and copies.shape[:2] == held.shape and copies.dtype.kind in "iu"
    if fits:
        named = copies >= 0
        fits = bool((copies < slots.shape[1]).all()) and bool((named.sum(axis=2) == held).all())
    if fits:
        layer, expert, _ = np.nonzero(named)
        fits = bool((slots[layer, copies[named]] == expert).all())
    if not fits:
        raise ExpertMapError(f"{where} does not name the slots in {first}; are they of one plan?")
