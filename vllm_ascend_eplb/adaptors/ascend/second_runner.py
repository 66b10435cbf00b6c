# SPDX-License-Identifier: Apache-2.0
"""The balancer under the second model runner of vllm-ascend: vLLM's V2 runner with an EPLB derived from vLLM's.

The worker, the calls and the state are those of the adaptor for vLLM (adaptors/vllm). Three things differ.

**Routing.** A layer takes expert e of token n to ``expert_replica_routing_table[n % rows, e]``. The table of
vllm-ascend depends on the rank. Ranks that route the same gathered tokens (AllGather) then send a token to different
copies of an expert, so that a pair is computed twice or not at all. Here the tables of such ranks are equal.

**Load** is what the slots of a rank received, from any rank. Every rank counts its own slots, also in dummy batches, in
which the slots of an idle data-parallel engine receive tokens of the other engines.

**Loading.** vllm-ascend spreads the copies of experts over the ranks. Here they are loaded in vLLM's order, which the
rest of this package knows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...balancer.updator import Stage
from ...routing.maps import RoutingTables
from ...routing.weighted import RoutingDispatchTables
from ...settings.config import EplbConfig
from ..errors import PatchPointError
from ..handed_over import settings_of
from ..patching import patch_once
from ..vllm.adaptor import VllmAdaptor
from ..vllm.eplb_state import build_initial_global_physical_to_logical_map
from ..vllm.patch_points import PatchPoint, not_found
from ..vllm.state import VllmEplbState
from .routing import (
    forward_of_all,
    knows_own_batch_only,
    ranks_own_their_tokens,
    replicas_ahead,
    stage_of_all,
)

CONTROLLER = "vllm_ascend.worker.v2.eplb"


EPLB_STATE = "vllm.distributed.eplb.eplb_state"


RUNNER = "vllm.v1.worker.gpu.model_runner"


EXPERTS = "vllm_ascend.ops.fused_moe.routed_experts"


EAGLE = "vllm_ascend.worker.v2.spec_decode.eagle.speculator"


PATCH_POINTS = tuple(
    PatchPoint(module, name, use, ("npu",), "V2")
    for module, name, use in (
        (CONTROLLER, "AscendEplbState", "replaces it by the state of the balancer"),
        (CONTROLLER, "AscendEPLBController.prepare_forward", "calls forward_before when it returns"),
        (
            "vllm_ascend.distributed.eplb.eplb_state",
            "AscendEplbLayerState",
            "holds the routing table of a layer, made by this package",
        ),
        (EXPERTS, "_record_v2_eplb_load", "counts the tokens that slots received, in the counters of the balancer"),
        (EPLB_STATE, "EplbState.build_initial_global_physical_to_logical_map", "restores the loading order of vLLM"),
        (RUNNER, "dispatch_cg_and_sync_dp", "notes the tokens of each data-parallel engine"),
        (EAGLE, "replace", "leaves redundant experts out of the configuration of a draft model without experts"),
    )
)
"""Patch points in vllm-ascend and in vLLM, besides those of the adaptor for vLLM."""


class SecondRunnerAdaptor(VllmAdaptor):
    """A model under the second runner of vllm-ascend."""

    counts_received = True

    def _let_route(self, model: Any, config: EplbConfig, sequence_parallel: bool) -> None:
        model.set_eplb_state(self.recorder.counts, self._maps.logical_to_physical, self._maps.replica_count)
        if config.weighted_dispatch:
            turn = {"rank": self.rank, "num_ranks": self.placement.num_ranks} if ranks_own_their_tokens() else {}
            self.dispatch = RoutingDispatchTables(self.placement, self.device, config.dispatch_table_entries, **turn)
            table = self.dispatch.table
        else:
            tables = RoutingTables(self.placement, self.device, replicas_ahead(self.rank))
            self.switched.append(tables)
            table = tables.table
        for number, layer in enumerate(model.moe_layers):
            layer.eplb_state.expert_replica_routing_table = table[number]


class SecondRunnerEplbState(VllmEplbState):
    """Takes the place of ``AscendEplbState`` of vllm-ascend, whose policy is not used."""

    adaptor_class = SecondRunnerAdaptor
    uses_custom_load_stats = False

    def __init__(self, parallel_config: Any, device: torch.device, policy: Any = None) -> None:
        super().__init__(parallel_config, device)
        self.most_in_decode = 0
        self._agrees_on_stage = False
        self._dispatch = note_tokens_across()

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        speculative = vllm_config.speculative_config
        draft_tokens = 0 if speculative is None else speculative.num_speculative_tokens
        self.most_in_decode = vllm_config.scheduler_config.max_num_seqs * (1 + draft_tokens)
        stage = settings_of(vllm_config.additional_config).eplb_heat_collection_stage
        self._agrees_on_stage = stage != "all" and knows_own_batch_only(vllm_config)
        super().add_model(model, model_config, model_name)

    def forward_before(self, *, serving: bool, stage: Stage, rows: int, tokens: int = 0) -> None:
        if self._dispatch.across is not None:
            serving, stage = forward_of_all(self._dispatch.across, self.most_in_decode)
            tokens = int(self._dispatch.across.sum()) // len(self._dispatch.across)
        if self._agrees_on_stage and self._began and self.updator is not None:
            stage = stage_of_all(stage, self.updator.parts.adaptor.control_group)
        super().forward_before(serving=serving, stage=stage, rows=rows, tokens=tokens)

    @contextmanager
    def new_weights(self, what: str = "reload_weights", *, whole: bool = True) -> Iterator[None]:
        """Refused: vllm-ascend copies loaded weights into tensors of another layout.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{what} is not supported on Ascend together with balancing; restart the server")
        yield


def take_over() -> None:
    """Puts our state in place of vllm-ascend's, in the process of this worker; idempotent.

    Raises:
        PatchPointError: vllm-ascend is missing a patch point; names all that are missing.
    """
    missing = not_found(PATCH_POINTS)
    if missing:
        raise PatchPointError(
            f"this vllm-ascend is missing patch points that the balancer needs: {'; '.join(missing)}; "
            "leave eplb_config out"
        )
    importlib.import_module(CONTROLLER).AscendEplbState = SecondRunnerEplbState  # type: ignore[attr-defined]
    state: Any = importlib.import_module(EPLB_STATE).EplbState
    vllm_order = staticmethod(build_initial_global_physical_to_logical_map)
    state.build_initial_global_physical_to_logical_map = vllm_order
    patch_once(importlib.import_module(EAGLE), "replace", without_redundancy)


def without_redundancy(replace: Any) -> Any:
    """vLLM's ``replace`` for configurations, for the speculator of vllm-ascend that turns EPLB off for draft models
    without experts: vLLM refuses redundant experts without EPLB, so their number becomes 0, too."""

    @functools.wraps(replace)
    def replaced(instance: Any, /, **changes: Any) -> Any:
        if changes.get("enable_eplb") is False:
            changes["eplb_config"] = replace(instance.eplb_config, num_redundant_experts=0)
        return replace(instance, **changes)

    return replaced


class DispatchNoting:
    """The function ``dispatch_cg_and_sync_dp`` of the runner, which notes what the data-parallel engines agreed on.

    Attributes:
        across: int [D], tokens of each data-parallel engine in the forward that has begun; None with one engine.
    """

    def __init__(self, dispatch: Any) -> None:
        self._dispatch = dispatch
        self.across: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._dispatch(*args, **kwargs)
        self.across = None if result[1] is None else result[1].num_tokens_across_dp
        return result


def note_tokens_across() -> DispatchNoting:
    """Wraps the runner's ``dispatch_cg_and_sync_dp``; idempotent. Not before the runner is built: vllm-ascend replaces
    that function while a worker is made."""
    noting: DispatchNoting = patch_once(importlib.import_module(RUNNER), "dispatch_cg_and_sync_dp", DispatchNoting)
    return noting
