# SPDX-License-Identifier: Apache-2.0
"""Loads the experts of a model into the slots of a given placement, instead of the slots that vLLM would fill.

vLLM gives every expert weight of a checkpoint to the ``weight_loader`` of its parameter, with the id of a slot: once
for each slot that holds the expert in vLLM's own order (experts 0..E-1, then copies of 0, 1, ...), until a slot is
local. Here the first of these calls loads the expert: its weight goes to every slot that holds the expert in this
layer, and the calls for copies do nothing. No weight is moved after loading, and a rank keeps its own slots only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ...values.placement import Placement

_LAYER = "_eplb_slots"


_MODEL = "_eplb_placement"


class LoadingError(RuntimeError):
    """A model whose experts cannot be loaded by a placement."""


class LayerSlots:
    """Where the experts of one layer go.

    Args:
        slots_of_expert: for each logical expert, the slots that hold it.
    """

    def __init__(self, slots_of_expert: list[list[int]]) -> None:
        self._slots_of_expert = slots_of_expert
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

    def missing(self, local: range) -> list[int]:
        """Slots of ``local`` that are missing a part of their expert; all of them where nothing was loaded."""
        parts = list(self._loaded.values())
        return [slot for slot in local if not parts or any(slot not in part for part in parts)]


@contextlib.contextmanager
def loading_by(read: Callable[[int, int, Any], Placement | None]) -> Iterator[None]:
    """Lets models that are built in this context load by a placement.

    Args:
        read: gives the placement for so many MoE layers and logical experts of a model of this configuration, or None
            for vLLM's own order.
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
        placement = read(moe.num_moe_layers, moe.num_logical_experts, config) if moe is not None else None
        if placement is not None:
            load_by(moe, placement)
            reload.record_metadata_for_reloading(model)  # once more: a reload goes through the loaders noted here
        return model

    base_loader.initialize_model = initialize_model
    try:
        yield
    finally:
        base_loader.initialize_model = initialize


def load_by(moe: Any, placement: Placement) -> None:
    """Lets a model that was built, and not loaded yet, load by a placement.

    Args:
        moe: the MixtureOfExperts part of the model.
        placement: of its layers, experts and ranks.

    Raises:
        LoadingError: the placement does not fit the model as it was built, or the model fuses shared experts.
    """
    if placement.num_slots != moe.num_physical_experts:
        raise LoadingError(
            f"the expert map has {placement.num_slots} slots per layer, the model was built with "
            f"{moe.num_physical_experts}; the file was changed while the server started: start it again"
        )
    for layer, slots in zip(moe.moe_layers, placement.logical_to_physical().tolist(), strict=True):
        experts = _experts(layer)
        if getattr(getattr(experts, "expert_map_manager", None), "num_fused_shared_experts", 0):
            raise LoadingError(
                "a model with shared experts fused into the routed ones cannot be loaded by "
                "eplb_config.expert_map_path; leave it out, or switch the fusion off"
            )
        layer_slots = LayerSlots([[slot for slot in row if slot >= 0] for row in slots])
        for parameter in experts.parameters():
            original = getattr(parameter, "weight_loader", None)
            if original is not None:
                parameter.weight_loader = layer_slots.loader(original)
        setattr(experts, _LAYER, layer_slots)
    setattr(moe, _MODEL, placement)


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
    """The placement that a model was loaded by; None where it was loaded in vLLM's own order.

    Args:
        moe: the MixtureOfExperts part of the model.
        rank: this rank.

    Raises:
        LoadingError: a slot of this rank was left out, because this kind of model or checkpoint is loaded in another
            way; names layer, device and slot.
    """
    placement: Placement | None = getattr(moe, _MODEL, None)
    if placement is None:
        return None
    per_rank = placement.slots_per_rank
    for number, layer in enumerate(moe.moe_layers):
        slots: LayerSlots = getattr(_experts(layer), _LAYER)
        missing = slots.missing(range(rank * per_rank, (rank + 1) * per_rank))
        if missing:
            raise LoadingError(
                f"{type(moe).__name__} cannot be loaded by eplb_config.expert_map_path: layer {number}, device {rank}, "
                f"slot {missing[0] - rank * per_rank} got no weights; leave expert_map_path out, or use another "
                "--load-format"
            )
    return placement


def _experts(layer: Any) -> Any:
    """The module that holds the expert weights of a layer."""
    return getattr(layer, "routed_experts", layer)
