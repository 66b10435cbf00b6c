# SPDX-License-Identifier: Apache-2.0
"""Loads the experts of a model into the slots of a given placement, instead of the slots that vLLM would fill.

vLLM gives every expert weight of a checkpoint to the ``weight_loader`` of its parameter, with the id of a slot: once
for each slot that holds the expert in vLLM's own order (experts 0..E-1, then copies of 0, 1, ...), until a slot is
local. Here the first of these calls loads the expert: its weight goes to every slot that holds the expert in this
layer, and the calls for copies do nothing. No weight is moved after loading, and a rank keeps its own slots only.

A checkpoint with all experts of a layer in one tensor is loaded the same way: vLLM takes the tensor apart and gives
each part to the ``weight_loader`` with the id of a logical expert, so that by itself it leaves the slots of copies
empty. Llama-4's own loader does not take it apart; here it is given one that does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ...values.placement import Placement
from ..patching import patch_once

_LAYER = "_eplb_slots"


_MODEL = "_eplb_placement"

_IN_ONE_TENSOR = ("experts.gate_up_proj", "experts.down_proj")
"""How names of weights of all experts of a layer end in Llama-4's checkpoints."""


class LoadOrder(NamedTuple):
    """The slots that a model is loaded into.

    Attributes:
        placement: of all its layers.
        by_map: whether a map of the user asks for it, so that a model that cannot follow ends the start. Otherwise it
            is vLLM's own order, and such a model is loaded by vLLM alone.
    """

    placement: Placement
    by_map: bool


class LoadingError(RuntimeError):
    """A model whose experts cannot be loaded by a placement."""


class LayerSlots:
    """Where the experts of one layer go.

    Args:
        slots_of_expert: for each logical expert, the slots that hold it.
        by_map: whether a tensor of all experts, which cannot follow a placement, is refused.
    """

    def __init__(self, slots_of_expert: list[list[int]], by_map: bool = True) -> None:
        self._slots_of_expert = slots_of_expert
        self._by_map = by_map
        self._loaded: dict[str, set[int]] = {}

    def loader(self, original: Callable[..., bool | None]) -> Callable[..., bool | None]:
        """A ``weight_loader`` that follows the placement, built on vLLM's, which loads one slot."""

        @functools.wraps(original)
        def weight_loader(
            param: Any, loaded_weight: Any, weight_name: str, shard_id: str, expert_id: int,
            return_success: bool = False,
        ) -> bool | None:  # fmt: skip
            if expert_id >= len(self._slots_of_expert):
                return False if return_success else None  # a copy: loaded with its expert
            if param.dim() >= 3 and loaded_weight.dim() >= param.dim():
                if not self._by_map:  # vLLM's own loader fills the slots of this rank at once
                    return original(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
                raise LoadingError(
                    f"{weight_name} has all experts in one tensor, which eplb_config.expert_map_path cannot take "
                    "apart; leave it out"
                )
            # No early end: one rank may hold an expert twice, and some scales are kept for remote slots as well.
            loaded = [
                slot
                for slot in self._slots_of_expert[expert_id]
                if original(param, loaded_weight, weight_name, shard_id, slot, True)
            ]
            self._loaded.setdefault(shard_id, set()).update(loaded)
            return bool(loaded) if return_success else None

        return weight_loader

    def forget(self) -> None:
        """Forgets what was loaded, before a reload."""
        self._loaded = {}

    def expert_of_slot(self) -> list[int]:
        """The expert that goes to each slot, [P]."""
        found = {slot: expert for expert, slots in enumerate(self._slots_of_expert) for slot in slots}
        return [found[slot] for slot in range(len(found))]

    def missing(self, local: range) -> list[int]:
        """Slots of ``local`` that are missing a part of their expert; all of them where nothing was loaded."""
        parts = list(self._loaded.values())
        return [slot for slot in local if not parts or any(slot not in part for part in parts)]

    def require_filled(self, name: str, number: int, rank: int, slots_per_rank: int) -> None:
        """Checks that every slot of this rank was filled, if a map asks for it.

        Args:
            name: of the model, for the error message.
            number: of the layer.
            rank: this rank.
            slots_per_rank: S.

        Raises:
            LoadingError: a slot was left out, because this kind of model or checkpoint is loaded in another way; names
                layer, device and slot.
        """
        missing = self.missing(range(rank * slots_per_rank, (rank + 1) * slots_per_rank)) if self._by_map else []
        if missing:
            raise LoadingError(
                f"{name} cannot be loaded by eplb_config.expert_map_path: layer {number}, device {rank}, "
                f"slot {missing[0] - rank * slots_per_rank} got no weights; leave expert_map_path out, or use another "
                "--load-format"
            )


@contextlib.contextmanager
def loading_by(read: Callable[[int, int, Any], LoadOrder | None]) -> Iterator[None]:
    """Lets models that are built in this context load by a placement.

    Args:
        read: gives the order for so many MoE layers and logical experts of a model of this configuration, or None
            where vLLM's own loader is to be left alone.
    """
    base_loader: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")
    initialize = base_loader.initialize_model

    @functools.wraps(initialize)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

        model = initialize(*args, **kwargs)
        moe: Any = get_mixture_of_experts_model(model)
        config = kwargs.get("model_config")
        order = read(moe.num_moe_layers, moe.num_logical_experts, config) if moe is not None else None
        if order is not None:
            load_by(moe, order)
            reload.record_metadata_for_reloading(model)  # once more: a reload goes through the loaders noted here
        return model

    base_loader.initialize_model = initialize_model
    try:
        yield
    finally:
        base_loader.initialize_model = initialize


def load_by(moe: Any, order: LoadOrder) -> None:
    """Lets a model that was built, and not loaded yet, load by a placement.

    Args:
        moe: the MixtureOfExperts part of the model.
        order: the placement of its layers, experts and ranks. A model that cannot follow it is left alone, unless a map
            asks for it.

    Raises:
        LoadingError: a map does not fit the model as it was built, or the model cannot follow a map.
    """
    placement = order.placement
    built = _slots(moe)
    if placement.num_slots != built:
        if not order.by_map:
            return
        raise LoadingError(
            f"the expert map has {placement.num_slots} slots per layer, the model was built with {built}; the file was "
            "changed while the server started: start it again"
        )
    unfit = next((reason for layer in moe.moe_layers if (reason := _unfit(_experts(layer)))), None)
    if unfit is not None:
        if order.by_map:
            raise LoadingError(unfit)
        return
    for layer, slots in zip(moe.moe_layers, placement.logical_to_physical().tolist(), strict=True):
        experts = _experts(layer)
        layer_slots = LayerSlots([[slot for slot in row if slot >= 0] for row in slots], order.by_map)
        for parameter in experts.parameters():
            original = getattr(parameter, "weight_loader", None)
            if original is not None:
                parameter.weight_loader = layer_slots.loader(original)
        setattr(experts, _LAYER, layer_slots)
    for module in moe.modules():
        if hasattr(module, "load_moe_expert_weights"):
            patch_once(module, "load_moe_expert_weights", _expert_by_expert)
    setattr(moe, _MODEL, placement)


def _expert_by_expert(original: Callable[..., bool]) -> Callable[..., bool]:
    """Llama-4's loader of experts, with tensors of all experts taken apart. By itself it picks the experts of this rank
    from such a tensor by ids of slots, which reach beyond it where there are copies."""

    @functools.wraps(original)
    def load_moe_expert_weights(
        name: str, loaded_weight: Any, params_dict: Any, loaded_params: Any, expert_params_mapping: Any,
        fused: bool = True,
    ) -> bool:  # fmt: skip
        if not fused or loaded_weight.dim() != 3 or not name.endswith(_IN_ONE_TENSOR):
            return original(name, loaded_weight, params_dict, loaded_params, expert_params_mapping, fused=fused)
        for param_name, weight_name, _, shard_id in expert_params_mapping:
            experts, _, projection, _ = weight_name.split(".")
            full_name = name.replace(f"{experts}.{projection}", f"{param_name}weight")
            if not name.endswith(projection) or full_name not in params_dict:  # or of another pipeline stage
                continue
            weights = loaded_weight.transpose(-1, -2)
            if shard_id != "w2":
                weights = weights.chunk(2, dim=-2)[shard_id == "w3"]
            param = params_dict[full_name]
            for expert, weight in enumerate(weights):
                param.weight_loader(param, weight, full_name, shard_id=shard_id, expert_id=expert)
            loaded_params.add(full_name)
        return True

    return load_moe_expert_weights


def _unfit(experts: Any) -> str | None:
    """Why a layer cannot be loaded by a placement, and the way out; None where it can."""
    if getattr(getattr(experts, "expert_map_manager", None), "num_fused_shared_experts", 0):
        return (
            "a model with shared experts fused into the routed ones cannot be loaded by eplb_config.expert_map_path; "
            "leave it out, or switch the fusion off"
        )
    if "MegaMoE" in type(experts).__name__:  # its loader takes ids of logical experts, and fills copies by itself
        return (
            f"{type(experts).__name__} loads experts by itself, so eplb_config.expert_map_path cannot be followed; "
            "leave it out, or use another --moe-backend"
        )
    return None


@contextlib.contextmanager
def reloading(moe: Any, rank: int) -> Iterator[None]:
    """Context of a reload of a model that may have been loaded by a placement.

    Raises:
        LoadingError: as for :func:`placement_loaded`; the model then holds a mixture of weights.
    """
    if getattr(moe, _MODEL, None) is not None:
        for layer in moe.moe_layers:
            getattr(_experts(layer), _LAYER).forget()
    yield
    placement_loaded(moe, rank)


def placement_loaded(moe: Any, rank: int) -> Placement | None:
    """The placement that a model was loaded by; None where vLLM's own loader was left alone.

    Args:
        moe: the MixtureOfExperts part of the model.
        rank: this rank.

    Raises:
        LoadingError: a map was asked for, and a slot of this rank was left out, because this kind of model or
            checkpoint is loaded in another way; names layer, device and slot.
    """
    placement: Placement | None = getattr(moe, _MODEL, None)
    if placement is not None:
        for number, layer in enumerate(moe.moe_layers):
            getattr(_experts(layer), _LAYER).require_filled(type(moe).__name__, number, rank, placement.slots_per_rank)
    return placement


def slots_of_layer(layer: Any) -> LayerSlots | None:
    """Where the experts of a layer went; None where vLLM's own loader was left alone.

    Args:
        layer: the MoE layer, or the module that holds its expert weights.
    """
    return getattr(_experts(layer), _LAYER, None)


def _slots(moe: Any) -> int:
    """Slots of a layer. Under vllm-ascend's first model runner layers have slots that the model does not know of."""
    layer = next(iter(moe.moe_layers), None)
    config = getattr(_experts(layer), "moe_config", None)
    return int(getattr(config, "num_experts", moe.num_physical_experts))


def _experts(layer: Any) -> Any:
    """The module that holds the expert weights of a layer."""
    return getattr(layer, "routed_experts", layer)
