# SPDX-License-Identifier: Apache-2.0
"""Maps logical experts to slots in layers and dispatchers of vllm-ascend."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from ...balancer.updator import Stage
from ...load.ops import entries_of
from ...routing.maps import DispatchMaps
from ..patching import patch_once

DISPATCHER = "vllm_ascend.ops.fused_moe.token_dispatcher"


def look_up_slots(dispatcher: ModuleType) -> None:
    """Lets the AllGather dispatcher look slots up in a map of slots; idempotent."""

    def by_slots(original: Any) -> Any:
        @functools.wraps(original)
        def token_dispatch(self: Any, token_dispatch_input: Any) -> Any:
            routing = token_dispatch_input.routing
            if isinstance(routing.log2phy, SlotTable):
                routing = replace(routing, expert_map=routing.log2phy.local_slots, global_redundant_expert_num=0)
                token_dispatch_input = replace(token_dispatch_input, routing=routing)
            return original(self, token_dispatch_input)

        return token_dispatch

    patch_once(dispatcher.TokenDispatcherWithAllGather, "token_dispatch", by_slots)


class SlotTable:
    """Replaces the ``log2phy`` of a layer: indexed by logical experts, it returns slots.

    Args:
        maps: the maps of all layers; changed in place by commits.
        layer: number of the layer.
        local_slots: int32 [P], the local number of each slot of this rank, -1 for slots of other ranks.
        offset: replicas by which a token's choice is shifted. It differs by rank if each rank routes its own tokens, so
            that few tokens per rank spread, too; it is 0 if several ranks may map the same token.
    """

    def __init__(self, maps: DispatchMaps, layer: int, local_slots: torch.Tensor, offset: int) -> None:
        self._table = maps.logical_to_physical[layer].view(-1)
        self._count = maps.replica_count[layer]
        self._width = maps.width
        self._offset = offset
        self.local_slots = local_slots

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots [N, K] for logical experts [N, K], in their dtype. Device work only, so that graphs can capture it."""
        experts = ids.to(torch.int64)
        rows = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int64).unsqueeze(1)
        count = self._count[experts]
        entries = (entries_of(rows, experts, count) + self._offset) % count
        return self._table[experts * self._width + entries].to(ids.dtype)


def maps_itself(layer: Any) -> bool:
    """Whether a layer maps experts to slots before it calls a dispatcher, as layers do since vllm-ascend 0.30. Such
    layers are loaded in vLLM's own order, whatever their maps contain."""
    return hasattr(layer, "ascend_expert_map")


def route_by(layer: Any, table: SlotTable) -> None:
    """Replaces a layer's own table."""
    del layer.log2phy  # a buffer since 0.30, which accepts tensors only
    layer.log2phy = table
    if maps_itself(layer):
        # The dispatchers get these two only: a map to look slots up in, and the number of slots beyond its length.
        layer.ascend_expert_map, layer.global_redundant_expert_num = table.local_slots, 0


def forward_of_all(tokens_of_engines: torch.Tensor, most_in_decode: int) -> tuple[bool, Stage]:
    """Whether a forward of several data-parallel engines serves requests, and its stage.

    A slot receives tokens of all engines, also while its own engine has no request. So all engines count, by the same
    stage. They run dummy batches only while an engine serves; the token of such a batch is counted, too.

    Args:
        tokens_of_engines: int [D], the same on all ranks.
        most_in_decode: most tokens of a batch that only decodes; vllm-ascend's own bound between its stages.
    """
    return True, "prefill" if int(tokens_of_engines.max()) > most_in_decode else "decode"


def knows_own_batch_only(vllm_config: Any) -> bool:
    """Whether a data-parallel engine may know no batch size but its own: vllm-ascend leaves the exchange of batch sizes
    out in KV consumers that send all their batches by MC2."""
    transfer = vllm_config.kv_transfer_config
    return bool(transfer is not None and transfer.is_kv_consumer and vllm_config.parallel_config.data_parallel_size > 1)


def stage_of_all(stage: Stage, group: Any) -> Stage:
    """``"prefill"`` if a rank prefills, so that the slots of all ranks count the same forwards.

    Args:
        stage: of this rank's batch.
        group: the CPU process group of the ranks, which all call this before the same forward. Blocks until they have.
    """
    prefills = torch.tensor(int(stage == "prefill"))
    torch.distributed.all_reduce(prefills, torch.distributed.ReduceOp.MAX, group=group)
    return "prefill" if prefills else "decode"


def ranks_own_their_tokens() -> bool:
    """Whether each token is routed by a single rank, for batches of any size (MC2, All2All)."""
    from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

    return bool(get_ascend_device_type() == AscendDeviceType.A3)


def replicas_ahead(rank: int) -> int:
    """Replicas by which the tables of a rank are shifted. If each rank routes its own tokens, this differs by rank, so
    that ranks with few tokens use different copies of an expert; otherwise tables must agree."""
    return rank if ranks_own_their_tokens() else 0
