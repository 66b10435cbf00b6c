# SPDX-License-Identifier: Apache-2.0
"""The maps and counters of one or several models, under vLLM's own names, with vLLM's shapes and dtypes.

``EplbState`` is for code that expects vLLM's entry points (``add_model``, ``from_mapping``, ``update_mapping``,
``model_states``, per-layer views) and moves weights by itself. The state of a served model (``VllmEplbState``) shares
``ModelStates`` with it; there the balancer alone changes the placement. Nothing here plans or moves weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...routing.maps import DispatchMaps
from ...values.placement import EMPTY, Placement

MAX_MAP_WIDTH = 1024
"""Most replicas that the routers' maps hold of one expert, as in vLLM."""


_AGREE_ON = (
    "num_routed_experts",
    "num_redundant_experts",
    "num_physical_experts",
    "num_logical_experts",
    "num_expert_groups",
)


class EpConfigurationError(RuntimeError):
    """Models that cannot share one expert-parallel group's balancing, or a mapping that does not fit a model."""


def build_initial_global_physical_to_logical_map(num_routed_experts: int, num_redundant_experts: int) -> Sequence[int]:
    """The placement that vLLM's weight loader fills: all experts in order, then copies of experts 0, 1, ...

    Returns:
        The logical expert of each of the ``num_routed_experts + num_redundant_experts`` slots.
    """
    return [slot % num_routed_experts for slot in range(num_routed_experts + num_redundant_experts)]


def compute_logical_maps(
    physical_to_logical_map: torch.Tensor, num_logical_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of a placement.

    Args:
        physical_to_logical_map: integers [L, P] or, for one layer, [P], on the CPU; -1 for an empty slot.
        num_logical_experts: E.

    Returns:
        logical_to_physical_map: [L, E, X] (or [E, X]), the slots of each expert in rising order, padded with -1; X is
            the largest count.
        logical_replica_count: [L, E] (or [E]), copies of each expert; may be 0. Both have the dtype of the argument.

    Raises:
        EpConfigurationError: the map is not of that shape, or names an expert that does not exist.
    """
    if physical_to_logical_map.dim() not in (1, 2) or physical_to_logical_map.device.type != "cpu":
        raise EpConfigurationError(
            f"a map of shape {tuple(physical_to_logical_map.shape)} on {physical_to_logical_map.device}; "
            "give [layers, slots], or [slots] for one layer, on the CPU"
        )
    per_layer = physical_to_logical_map.dim() == 1
    slots = np.atleast_2d(physical_to_logical_map.numpy()).astype(np.int64)
    if slots.size and (slots.min() < EMPTY or slots.max() >= num_logical_experts):
        raise EpConfigurationError(
            f"the map names experts {slots.min()}..{slots.max()}; allowed are 0..{num_logical_experts - 1}, or -1 for "
            "an empty slot"
        )
    num_layers = len(slots)
    count = np.zeros((num_layers, num_logical_experts), dtype=np.int64)
    layers, places = np.nonzero(slots != EMPTY)
    experts = slots[layers, places]
    np.add.at(count, (layers, experts), 1)
    by_expert = np.full((num_layers, num_logical_experts, int(count.max(initial=0))), -1, dtype=np.int64)
    order = np.lexsort((places, experts, layers))
    layers, places, experts = layers[order], places[order], experts[order]
    first = np.cumsum(count) - count.ravel()  # of each (layer, expert) in that order
    by_expert[layers, experts, np.arange(len(order)) - first[layers * num_logical_experts + experts]] = places
    maps = (torch.from_numpy(made).to(physical_to_logical_map.dtype) for made in (by_expert, count))
    inverse, counts = (made.squeeze(0) if per_layer else made for made in maps)
    return inverse, counts


@dataclass
class EplbLayerState:
    """The tensors that the router of one layer reads: views of the model's tensors, whose addresses never change.

    Attributes:
        expert_load_view: int32 or int64 [P], tokens per slot, counted by the router.
        logical_to_physical_map: int64 [E, W], the slots of each expert, padded with -1.
        logical_replica_count: int64 [E].
    """

    expert_load_view: torch.Tensor | None = None
    logical_to_physical_map: torch.Tensor | None = None
    logical_replica_count: torch.Tensor | None = None

    def set_layer_state(
        self,
        moe_layer_idx: int,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
    ) -> None:
        """Takes this layer's part of the model's tensors [L, ...]."""
        self.expert_load_view = expert_load_view[moe_layer_idx]
        self.logical_to_physical_map = logical_to_physical_map[moe_layer_idx]
        self.logical_replica_count = logical_replica_count[moe_layer_idx]


@dataclass
class EplbModelState:
    """One model's maps and counters.

    Attributes:
        model, model_name: as given to ``add_model``.
        maps: the maps that the routers read.
        expert_load_pass: int32 or int64 [L, P], tokens per slot since the counts were last zeroed.
        placement_in_force: returns the placement; called at each access, because a balancer changes it.
    """

    model: Any
    model_name: str
    maps: DispatchMaps
    expert_load_pass: torch.Tensor
    placement_in_force: Callable[[], torch.Tensor]

    @property
    def physical_to_logical_map(self) -> torch.Tensor:
        """int64 [L, P]: the logical expert of each slot, -1 if empty."""
        return self.placement_in_force()

    @property
    def logical_to_physical_map(self) -> torch.Tensor:
        """int64 [L, E, W]: the slots of each expert, padded with -1."""
        return self.maps.logical_to_physical

    @property
    def logical_replica_count(self) -> torch.Tensor:
        """int64 [L, E]."""
        return self.maps.replica_count

    def layer(self, index: int) -> EplbLayerState:
        """The views of one MoE layer."""
        state = EplbLayerState()
        state.set_layer_state(index, self.expert_load_pass, self.logical_to_physical_map, self.logical_replica_count)
        return state


class ModelStates:
    """The states of all models that one expert-parallel group serves (a model and its draft model).

    Args:
        parallel_config: vLLM's; kept for code that reads it from here.
        device: where the routers run.

    Attributes:
        model_states: by ``model_config.compute_hash()``.
    """

    build_initial_global_physical_to_logical_map = staticmethod(build_initial_global_physical_to_logical_map)

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        self.parallel_config = parallel_config
        self.device = torch.device(device)
        self.model_states: dict[str, EplbModelState] = {}

    def validate_ep_configuration(self, new_model: Any) -> None:
        """Checks that a model may be added beside the models that were added before.

        Raises:
            EpConfigurationError: the model differs in a number of experts; the message names which.
        """
        for state in self.model_states.values():
            self.assert_confs_equal(state.model, new_model)
            return

    @staticmethod
    def assert_confs_equal(model: Any, new_model: Any) -> None:
        """Compares two models.

        Raises:
            EpConfigurationError: the models differ in a number of experts; the message names which.
        """
        for name in _AGREE_ON:
            has, new = getattr(model, name), getattr(new_model, name)
            if has != new:
                raise EpConfigurationError(
                    f"mismatch of two models: {type(new_model).__name__} has {name} {new}, {type(model).__name__} has "
                    f"{has}; models that share an expert-parallel group must agree on it: leave the second model (a "
                    "draft model) out"
                )


class EplbState(ModelStates):
    """Maps that are set from outside: vLLM's entry points, for code that moves the weights by itself."""

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Gives a model its maps and counters, for the placement that its weight loader filled.

        Raises:
            EpConfigurationError: it does not agree with the models that were added before.
        """
        self.validate_ep_configuration(model)
        row = self.build_initial_global_physical_to_logical_map(model.num_routed_experts, model.num_redundant_experts)
        # The number of ranks does not change the maps.
        placement = Placement(np.tile(row, (model.num_moe_layers, 1)), model.num_logical_experts, 1)
        maps = DispatchMaps(placement, self.device, width=min(MAX_MAP_WIDTH, model.num_redundant_experts + 1))
        counts = torch.zeros((placement.num_layers, placement.num_slots), dtype=torch.int32, device=self.device)
        in_force = torch.from_numpy(placement.physical_to_logical.astype(np.int64)).to(self.device)
        name = model_name or model_config.model
        self.model_states[model_config.compute_hash()] = EplbModelState(model, name, maps, counts, lambda: in_force)
        model.set_eplb_state(counts, maps.logical_to_physical, maps.replica_count)

    def update_mapping(self, model_config: Any, expanded_physical_to_logical: torch.Tensor) -> None:
        """Puts another placement in force, in place. The caller moves the weights, before or after.

        Args:
            expanded_physical_to_logical: integers [L, P]; -1 for an empty slot.

        Raises:
            EpConfigurationError: the mapping has another shape, or an expert with no copy or more copies than the maps
                hold. Nothing was changed.
        """
        state = self.model_states[model_config.compute_hash()]
        in_force, maps = state.physical_to_logical_map, state.maps
        if expanded_physical_to_logical.shape != in_force.shape:
            raise EpConfigurationError(
                f"a mapping of shape {tuple(expanded_physical_to_logical.shape)}; the model has [layers, slots] "
                f"{tuple(in_force.shape)}"
            )
        slots, count = compute_logical_maps(expanded_physical_to_logical.cpu().long(), maps.replica_count.shape[1])
        if int(count.min()) < 1 or slots.shape[-1] > maps.width:
            raise EpConfigurationError(
                f"the mapping gives experts {int(count.min())}..{slots.shape[-1]} copies; allowed are 1..{maps.width}"
            )
        in_force.copy_(expanded_physical_to_logical)
        maps.logical_to_physical.copy_(torch.nn.functional.pad(slots, (0, maps.width - slots.shape[-1]), value=-1))
        maps.replica_count.copy_(count)
        state.expert_load_pass.zero_()

    @classmethod
    def from_mapping(
        cls,
        model: Any,
        model_config: Any,
        device: torch.device,
        parallel_config: Any,
        expanded_physical_to_logical: torch.Tensor,
    ) -> EplbState:
        """A state with one model and a given placement; see ``update_mapping``."""
        state = cls(parallel_config, device)
        state.add_model(model, model_config)
        state.update_mapping(model_config, expanded_physical_to_logical)
        return state
