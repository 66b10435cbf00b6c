# SPDX-License-Identifier: Apache-2.0
"""A model served by vLLM, as the balancer sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...balancer.calibration import LayerRuns
from ...load.recorder import LoadRecorder
from ...routing.maps import DispatchMaps
from ...routing.weighted import DispatchTables
from ...settings.config import EplbConfig
from ...values.placement import Placement
from ..engine_adaptor import EngineAdaptor, recorder_for, topology_of
from ..errors import UnsupportedError
from ..parts import DRAFT, pipeline_parts
from .eplb_state import MAX_MAP_WIDTH, EplbModelState
from .layers import layer_runs
from .loading import placement_loaded

TIMED_ON = ("cpu", "cuda")
"""Types of devices on which vLLM's MoE layers can be run by themselves."""


@dataclass(frozen=True)
class Slice:
    """The part of a batch that this rank routes: number ``part`` of ``parts`` of equal length, the last one padded."""

    part: int = 0
    parts: int = 1

    def real(self, tokens: int, rows: int) -> int:
        """How many tokens of a batch lie in this part.

        Args:
            tokens: tokens of the batch; they are in its first rows.
            rows: rows of the batch, padding included.
        """
        if self.parts == 1:
            return tokens
        length = -(-rows // self.parts)
        return min(max(tokens - self.part * length, 0), length)


class RealTokens:
    """Tokens of the next forward without padding, as routers read them: int32 []. Written only where they change,
    because every write costs a step some of its time.

    Attributes:
        tensor: its address is fixed.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros((), dtype=torch.int32, device=device)
        self._value = 0

    def set(self, value: int) -> None:
        if value != self._value:
            self.tensor.fill_(value)
            self._value = value


class VllmAdaptor(EngineAdaptor):
    """A vLLM model with the MixtureOfExperts protocol.

    Each pipeline stage has a balancer of its own: the expert-parallel groups of vLLM, and the layers that a model
    reports, are those of one stage.

    Maps are the same on all ranks. Which ranks count depends on which rank routes which tokens. Data-parallel ranks
    route their own tokens (the *owned* regime): each rank counts, and dispatch tables may begin at another entry on
    each. In a tensor-parallel group all ranks route the same tokens (the *replicated* regime): the first rank counts,
    and tables are the same. Where the MoE layers are sequence-parallel, each rank routes and counts a slice of the
    batch.

    Attributes:
        slice: the part of a batch that this rank routes.
        sharers: ranks that have the same rows of a batch: those of the tensor-parallel group.
        parts_of_batch: ranks over which a batch is spread: those of the tensor-parallel group, for each rank of the
            prefill-context-parallel group.
        counts_received: whether layers count the tokens that the slots of a rank received, after dispatch, instead of
            the tokens that it routes.
    """

    counts_received = False

    def __init__(
        self, model: Any, name: str, device: torch.device, config: EplbConfig, *, is_draft: bool = False
    ) -> None:
        from vllm.config import get_current_vllm_config
        from vllm.distributed.parallel_state import (
            get_ep_group,
            get_eplb_group,
            get_pp_group,
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        group = get_eplb_group()
        self.name = name
        stages = pipeline_parts(get_pp_group().world_size)
        self.part = stages[get_pp_group().rank_in_group] if stages else DRAFT if is_draft else ""
        self.channel = int(is_draft)  # model and draft model share the process groups
        self.rank = get_ep_group().rank_in_group
        self.device = device
        self.control_group = group.cpu_group
        on_host = device.type == "cpu"
        self.transfer_group = group.device_group if on_host else get_ep_group().cpu_group
        self.device_group = None if on_host else group.device_group
        num_ranks = get_ep_group().world_size
        self.topology = topology_of(self.control_group, num_ranks)
        self.num_groups = max(1, model.num_expert_groups or 1)
        if not self.counts_received:
            require_routing_of_own_tokens(model)
        # Where slots are counted it does not matter which rank routes which tokens.
        sequence_parallel = not self.counts_received and _is_sequence_parallel(model)
        tp_rank = get_tensor_model_parallel_rank()
        self.sharers = get_tensor_model_parallel_world_size()
        self.slice = Slice(tp_rank, self.sharers) if sequence_parallel else Slice()
        loaded = placement_loaded(model, self.rank)
        if loaded is None and config.expert_map_path is not None:
            raise UnsupportedError(
                "the weights were not loaded by eplb_config.expert_map_path: this --load-format builds models in a way "
                "of its own; use another, or leave expert_map_path out"
            )
        self.placement = loaded or Placement.initial(
            model.num_moe_layers, model.num_logical_experts, num_ranks, model.num_redundant_experts
        )
        self.recorder = recorder_for(
            LoadRecorder,
            self.placement,
            device,
            config,
            contributes=self.counts_received or sequence_parallel or tp_rank == 0,
            dtype=torch.int64 if device.type == "cpu" else torch.int32,  # vLLM's own kernel counts in int32
        )
        self._maps = DispatchMaps(self.placement, device, width=min(MAX_MAP_WIDTH, model.num_redundant_experts + 1))
        self.switched = [self._maps]
        self._let_route(model, config, sequence_parallel)
        self._weights = model.expert_weights
        self._layers = list(model.moe_layers)
        self._vllm_config = get_current_vllm_config()
        self.parts_of_batch = self.sharers * self._vllm_config.parallel_config.prefill_context_parallel_size

    def _let_route(self, model: Any, config: EplbConfig, sequence_parallel: bool) -> None:
        """Gives the layers the counters, and maps or dispatch tables."""
        maps = self._maps.logical_to_physical, self._maps.replica_count
        if config.weighted_dispatch:
            alike = 1 if sequence_parallel else self.sharers  # neighbours that route the same tokens
            turn = {"rank": self.rank // alike, "num_ranks": self.placement.num_ranks // alike}
            self.dispatch = DispatchTables(self.placement, self.device, config.dispatch_table_entries, **turn)
            maps = self.dispatch.table, self.dispatch.count
        model.set_eplb_state(self.recorder.counts, *maps)

    def model_state(self, model: Any, in_force: Callable[[], Placement]) -> EplbModelState:
        """The maps and counters of the model as vLLM's own EPLB shows them.

        Args:
            in_force: gives the placement in force.
        """

        def slots() -> torch.Tensor:
            return torch.from_numpy(in_force().physical_to_logical.astype(np.int64)).to(self.device)

        return EplbModelState(model, self.name, self._maps, self.recorder.counts, slots)

    def layer_runs(self) -> LayerRuns | None:
        if self.device.type not in TIMED_ON or self.counts_received:
            return None
        return layer_runs(
            self._layers,
            self._vllm_config,
            num_ranks=self.placement.num_ranks,
            slots_per_rank=self.placement.slots_per_rank,
            sharers=self.sharers,
            own_slice=self.slice.parts > 1,
        )

    def device_tensors(self) -> list[torch.Tensor]:
        """What the balancer keeps on the device from one step to the next, besides weights."""
        tables = [] if self.dispatch is None else [self.dispatch.table, self.dispatch.count]
        kept = [self._maps.logical_to_physical, self._maps.replica_count, *tables]
        return [*kept, *self.recorder.device_tensors()]

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return tensors_by_slot(self._weights, self.placement.slots_per_rank)


def tensors_by_slot(weights: Any, num_slots: int) -> list[list[list[torch.Tensor]]]:
    """The tensors of the expert in each slot, by layer.

    Args:
        weights: by layer, the expert weights that a model reports: tensors [S, ...], or lists of S tensors, as those of
            quantised experts under vllm-ascend.
        num_slots: slots of this rank, S.
    """
    return [[[entry[slot].data for entry in layer] for slot in range(num_slots)] for layer in weights]


def require_routing_of_own_tokens(model: Any) -> None:
    """Refuses layers whose routing a rank cannot count or change.

    Where tokens are gathered from other ranks before they are routed, every rank would count the tokens of all ranks,
    padding included. Where a kernel routes by itself, no token is counted and no map is read.

    Raises:
        UnsupportedError: there is such a layer.
    """
    for module in model.modules():
        if getattr(module, "do_naive_dispatch_combine", False):
            raise UnsupportedError(
                f"{type(module).__name__} gathers the tokens of all ranks before it routes them, as vLLM does for this "
                "quantisation; balancing that is not supported in this version: leave eplb_config out, or use "
                "--tensor-parallel-size alone"
            )
        if getattr(module, "is_monolithic", False):
            raise UnsupportedError(
                f"{type(module).__name__} routes inside of its kernel, where no expert can be counted or moved; choose "
                "another --moe-backend, or leave eplb_config out"
            )


def _is_sequence_parallel(model: Any) -> bool:
    """Whether each tensor-parallel rank routes a slice of the batch; all MoE layers of a model do, or none."""
    configs = [module.moe_config for module in model.modules() if hasattr(module, "moe_config")]
    return any(config.is_sequence_parallel for config in configs)
