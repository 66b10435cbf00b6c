# SPDX-License-Identifier: Apache-2.0
"""A model served by vllm-ascend's first model runner, as the balancer sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...load.recorder import LoadRecorder
from ...routing.maps import DispatchMaps
from ...settings.config import EplbConfig
from ...values.placement import EMPTY, Placement
from ..engine_adaptor import EngineAdaptor, recorder_for, topology_of
from ..errors import UnsupportedError
from ..parts import pipeline_parts
from ..vllm.loading import slots_of_layer
from .routing import SlotTable, maps_itself, replicas_ahead, route_by


class ReceivedTokens(LoadRecorder):
    """A recorder whose counters the layers always add to, after dispatch. Counts of steps that are not recorded are
    never flushed, and dropped before the next step."""

    def begin_step(
        self, placement: Placement, *, record: bool, phase: str = "all", tokens_per_rank: float = 1.0
    ) -> None:
        if not self._is_recording:
            self.counts.zero_()
        elif not record or (self.phases != ("all",) and phase not in self.phases):
            self.flush(placement)
        super().begin_step(placement, record=record, phase=phase, tokens_per_rank=tokens_per_rank)
        self._dirty = self._is_recording  # a window may end, or a placement change, before the counts are dropped


def placement_of(global_expert_maps: list[np.ndarray], slots_per_rank: int) -> Placement:
    """The placement that vllm-ascend's expert maps describe.

    Args:
        global_expert_maps: per layer int [R, E]: the local slot of each expert on each rank, -1 where it has none.
        slots_per_rank: S.

    Raises:
        PlacementError: an expert has no copy.
    """
    ranks, experts = global_expert_maps[0].shape
    slots = np.full((len(global_expert_maps), ranks * slots_per_rank), EMPTY, dtype=np.int32)
    for layer, expert_map in enumerate(global_expert_maps):
        rank, expert = np.nonzero(expert_map >= 0)
        slots[layer, rank * slots_per_rank + expert_map[rank, expert]] = expert
    return Placement(slots, experts, ranks)


def placement_loaded(moe_layers: list[Any], placement: Placement, name: str, rank: int, *, by_map: bool) -> Placement:
    """The placement by which layers that map experts themselves were loaded: by a map or in vLLM's order, with the
    loader of this package, or in vLLM's order by vLLM.

    Args:
        moe_layers: of the model, then of its draft model.
        placement: what vllm-ascend's maps say.
        name: of the model, for error messages.
        rank: this rank.
        by_map: whether the model is to be loaded by a map.

    Raises:
        UnsupportedError: a map was not followed, or a layer was loaded by vLLM and its maps are not vLLM's order.
        LoadingError: a map was followed, and left a slot of this rank empty.
    """
    layers, experts, slots = placement.num_layers, placement.num_experts, placement.num_slots
    usual = Placement.initial(layers, experts, placement.num_ranks, slots - experts).physical_to_logical
    rows = usual.copy()
    for number, layer in enumerate(moe_layers):
        loaded = slots_of_layer(layer)
        if loaded is not None:
            loaded.require_filled(name, number, rank, placement.slots_per_rank)
            rows[number] = loaded.expert_of_slot()
        elif number == 0 and by_map:
            raise UnsupportedError(
                f"the weights of {name} were not loaded by eplb_config.expert_map_path: this model, or this "
                "--load-format, is built in a way of its own; leave expert_map_path out"
            )
        elif (placement.physical_to_logical[number] != usual[number]).any():
            raise UnsupportedError(
                f"the experts of {name} were loaded in vLLM's order, and the layers' maps say otherwise; "
                "set dynamic_eplb to false for this model"
            )
    return Placement(rows, experts, placement.num_ranks)


class AscendAdaptor(EngineAdaptor):
    """The MoE layers of a vllm-ascend model on this rank, and after them those of its draft model.

    Args:
        layers: the adaptor of vllm-ascend, which knows the layers and, by quantisation, the tensors of an expert.
        config: the settings.

    Raises:
        UnsupportedError: the layers are not alike.
    """

    def __init__(self, layers: Any, config: EplbConfig) -> None:
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group
        from vllm_ascend.distributed.parallel_state import get_dynamic_eplb_group

        group, expert_parallel = get_dynamic_eplb_group(), get_ep_group()
        self.name = type(layers.model).__name__
        stages = pipeline_parts(get_pp_group().world_size)
        self.part = stages[get_pp_group().rank_in_group] if stages else ""
        self.rank = int(group.rank_in_group)
        self.control_group, self.device_group = group.cpu_group, group.device_group
        self.transfer_group = expert_parallel.cpu_group
        moe_layers = list(layers.moe_layers)
        size = int(layers.num_local_experts)
        maps = [layer.global_expert_map.cpu().numpy() for layer in moe_layers]
        shapes = {(*held.shape, layer.local_num_experts) for held, layer in zip(maps, moe_layers, strict=True)}
        if shapes != {(*maps[0].shape, size)}:
            raise UnsupportedError(
                f"the MoE layers of {self.name} differ in experts or slots: {sorted(shapes)}; "
                "set dynamic_eplb to false for this model"
            )
        self.placement = placement_of(maps, size)
        num_ranks = self.placement.num_ranks
        if maps_itself(moe_layers[0]):
            by_map = config.expert_map_path is not None
            self.placement = placement_loaded(moe_layers, self.placement, self.name, self.rank, by_map=by_map)
        self.topology = topology_of(self.control_group, num_ranks)
        self.num_groups = max(1, int(getattr(layers.config, "n_group", 1) or 1))
        self.device = moe_layers[0].moe_load.device
        self.recorder = recorder_for(ReceivedTokens, self.placement, self.device, config)
        redundant = self.placement.num_slots - self.placement.num_experts
        self._maps = DispatchMaps(self.placement, self.device, width=redundant + 1)
        self.switched = [self._maps]
        self._weights = layers.expert_param_per_layer
        first = self.rank * size
        local = torch.full((self.placement.num_slots,), -1, dtype=torch.int32)
        local[first : first + size] = torch.arange(size, dtype=torch.int32)
        local = local.to(self.device)
        offset = replicas_ahead(self.rank)
        for number, layer in enumerate(moe_layers):
            layer.moe_load = self.recorder.counts[number, first : first + size]
            route_by(layer, SlotTable(self._maps, number, local, offset))

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [
            [[tensor.data for tensor in expert] for expert in self._weights[layer]] for layer in sorted(self._weights)
        ]
