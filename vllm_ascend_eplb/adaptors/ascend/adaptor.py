# SPDX-License-Identifier: Apache-2.0
"""A model served by vllm-ascend's first model runner, as the balancer sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...agreement.exchange import exchange_bytes
from ...balancer.served_model import EplbAdaptor
from ...load.recorder import LoadRecorder
from ...routing.maps import DispatchMaps
from ...settings.config import EplbConfig
from ...values.placement import EMPTY, Placement
from ...values.topology import Topology, host_identity
from ..parts import pipeline_parts
from .routing import SlotTable, maps_itself, replicas_ahead, route_by


class AscendError(RuntimeError):
    """This model, or this vllm-ascend, cannot be balanced."""


def require_loaded_copies(differing: int, load_format: str) -> None:
    """A model that loads its experts by itself may leave redundant slots empty; tokens that are sent there would be
    answered wrongly.

    Args:
        differing: experts whose copies differ from each other once the model is loaded.
        load_format: with vLLM's "dummy" every slot gets weights of its own, which is no fault.

    Raises:
        AscendError: copies differ that should not.
    """
    if differing and load_format != "dummy":
        raise AscendError(
            f"copies of {differing} experts differ from each other once the weights are loaded, so tokens would be "
            "answered wrongly: this model's loader does not fill redundant slots; set num_redundant_experts to 0, or "
            "leave eplb_config out"
        )


class ReceivedTokens(LoadRecorder):
    """A recorder whose counters the layers add to after dispatch, recording or not: what they add meanwhile is dropped
    before the next recorded step."""

    def begin_step(
        self, placement: Placement, *, record: bool, phase: str = "all", tokens_per_rank: float = 1.0
    ) -> None:
        if not self._is_recording:
            self.counts.zero_()
        elif not record or (self.phases != ("all",) and phase not in self.phases):
            self.flush(placement)
        super().begin_step(placement, record=record, phase=phase, tokens_per_rank=tokens_per_rank)


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


class AscendAdaptor(EplbAdaptor):
    """The MoE layers of a vllm-ascend model on this rank, and behind them those of its drafter.

    Args:
        layers: vllm-ascend's adaptor, which knows the layers and, by quantisation, the tensors of an expert.
        config: the settings.

    Raises:
        AscendError: the layers are not alike.
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
        if any(each.shape != maps[0].shape or layer.local_num_experts != size for each, layer in zip(maps, moe_layers)):  # noqa: B905
            raise AscendError(
                f"the MoE layers of {self.name} differ in experts or slots: "
                f"{sorted({(*each.shape, layer.local_num_experts) for each, layer in zip(maps, moe_layers)})}; "  # noqa: B905
                "set dynamic_eplb to false for this model"
            )
        self.placement = placement_of(maps, size)
        num_ranks = self.placement.num_ranks
        if maps_itself(moe_layers[0]):
            experts = self.placement.num_experts
            if self.placement != Placement.initial(len(maps), experts, num_ranks, self.placement.num_slots - experts):
                raise AscendError(
                    f"the experts of {self.name} were loaded in vLLM's order, and the layers' maps say otherwise; "
                    "leave eplb_config.expert_map_path out"
                )
        hosts = exchange_bytes(self.control_group, num_ranks, host_identity().encode())
        self.topology = Topology(tuple(hosts.index(host) for host in hosts))
        self.num_groups = max(1, int(getattr(layers.config, "n_group", 1) or 1))
        self.device = moe_layers[0].moe_load.device
        stage = config.eplb_heat_collection_stage
        self.recorder = ReceivedTokens(
            self.placement.num_layers,
            self.placement.num_experts,
            self.placement.num_slots,
            self.device,
            phases=("all",) if stage == "all" else (stage,),
        )
        redundant = self.placement.num_slots - self.placement.num_experts
        self._maps = DispatchMaps(self.placement, self.device, width=redundant + 1)
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

    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        self._maps.prepare(placement, layers)

    def commit_maps(self) -> None:
        self._maps.commit()

    def forget_prepared_maps(self) -> None:
        self._maps.forget_prepared()
