# SPDX-License-Identifier: Apache-2.0
"""The balancer under vllm-ascend's second model runner, which is vLLM's V2 runner with an EPLB made of vLLM's.

The worker, the calls and the state are those of the adaptor for vLLM (vllm.py). Different are:

**Routing.** A layer takes token n's expert e to ``expert_replica_routing_table[n % rows, e]``. vllm-ascend builds that
table with the rank in it, so ranks that route the same gathered tokens (AllGather) send a token to different copies of
an expert, and one of them computes it twice, or nobody. Here tables are the same on all ranks there.

**Load** is what a rank's slots received, from whatever rank: every rank counts its own, also in dummy batches, in which
the slots of an idle data-parallel engine receive the other engines' tokens.

**Loading.** vllm-ascend has the copies of experts spread over the ranks. Here they are loaded in vLLM's order, which is
the one that is known to the rest of this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...balancer.updator import Stage
from ...routing.maps import RoutingTables
from ...routing.weighted import RoutingDispatchTables
from ...settings.config import EplbConfig
from ..vllm.adaptor import VllmAdaptor
from ..vllm.seams import Seam, SeamError, not_found
from ..vllm.state import VllmEplbState
from .routing import forward_of_all, ranks_own_their_tokens, replicas_ahead

CONTROLLER = "vllm_ascend.worker.v2.eplb"


EPLB_STATE = "vllm.distributed.eplb.eplb_state"


RUNNER = "vllm.v1.worker.gpu.model_runner"


EXPERTS = "vllm_ascend.ops.fused_moe.routed_experts"


SEAMS = tuple(
    Seam(module, name, use, ("npu",), "V2")
    for module, name, use in (
        (CONTROLLER, "AscendEplbState", "replaced by this package's state"),
        (CONTROLLER, "AscendEPLBController.prepare_forward", "calls forward_before"),
        (
            "vllm_ascend.distributed.eplb.eplb_state",
            "AscendEplbLayerState",
            "holds a layer's routing table; replaced",
        ),
        (EXPERTS, "_record_v2_eplb_load", "counts what slots received, in this package's counters"),
        (EPLB_STATE, "EplbState.build_initial_global_physical_to_logical_map", "restored to vLLM's order of loading"),
        (RUNNER, "dispatch_cg_and_sync_dp", "tokens of each data-parallel engine are noted"),
    )
)
"""Places in vllm-ascend, and in vLLM, besides those of the adaptor for vLLM."""


class AscendV2Adaptor(VllmAdaptor):
    """A model under vllm-ascend's second runner."""

    counts_received = True

    def _let_route(self, model: Any, config: EplbConfig, sequence_parallel: bool) -> None:
        model.set_eplb_state(self.recorder.counts, self._maps.logical_to_physical, self._maps.replica_count)
        if config.weighted_dispatch:
            turn = {"rank": self.rank, "num_ranks": self.placement.num_ranks} if ranks_own_their_tokens() else {}
            self.dispatch = RoutingDispatchTables(self.placement, self.device, config.dispatch_table_entries, **turn)
            table = self.dispatch.table
        else:
            tables = RoutingTables(self.placement, self.device, replicas_ahead(self.rank))
            self._switched.append(tables)
            table = tables.table
        for number, layer in enumerate(model.moe_layers):
            layer.eplb_state.expert_replica_routing_table = table[number]


class AscendV2EplbState(VllmEplbState):
    """Stands for vllm-ascend's ``AscendEplbState``; a policy of its own is not asked for its plans."""

    adaptor_class = AscendV2Adaptor
    uses_custom_load_stats = False
    across: torch.Tensor | None = None
    """int [D]: tokens of each data-parallel engine in the forward that has begun; None where there is one."""

    def __init__(self, parallel_config: Any, device: torch.device, policy: Any = None) -> None:
        super().__init__(parallel_config, device)
        self._most_in_decode = 0
        note_tokens_across()

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        speculative = vllm_config.speculative_config
        guesses = 0 if speculative is None else speculative.num_speculative_tokens
        self._most_in_decode = vllm_config.scheduler_config.max_num_seqs * (1 + guesses)
        super().add_model(model, model_config, model_name)

    def forward_before(self, *, serving: bool, stage: Stage, rows: int, tokens: int = 0) -> None:
        if self.across is not None:
            serving, stage = forward_of_all(self.across, self._most_in_decode)
            tokens = int(self.across.sum()) // len(self.across)
        super().forward_before(serving=serving, stage=stage, rows=rows, tokens=tokens)

    @contextmanager
    def new_weights(self) -> Iterator[None]:
        """Refused: vllm-ascend lays weights out anew once they are loaded, in tensors of its own.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("reload_weights is not supported on Ascend together with balancing; restart the server")
        yield


def take_over() -> None:
    """Puts our state in place of vllm-ascend's, in this worker's process; idempotent.

    Raises:
        SeamError: vllm-ascend lacks a place for it; names all that are missing.
    """
    missing = not_found(SEAMS)
    if missing:
        raise SeamError(f"this vllm-ascend lacks what the balancer needs: {'; '.join(missing)}; leave eplb_config out")
    importlib.import_module(CONTROLLER).AscendEplbState = AscendV2EplbState  # type: ignore[attr-defined]
    state: Any = importlib.import_module(EPLB_STATE).EplbState
    state.build_initial_global_physical_to_logical_map = staticmethod(vllm_order)


def vllm_order(num_routed_experts: int, num_redundant_experts: int) -> list[int]:
    """The expert in each slot as vLLM loads them: all, then copies of the first."""
    return [slot % num_routed_experts for slot in range(num_routed_experts + num_redundant_experts)]


def note_tokens_across() -> None:
    """Lets the state know how many tokens each data-parallel engine brings to a forward. Not before the runner is
    there: vllm-ascend puts a function of its own in that place while a worker is made."""
    runner: Any = importlib.import_module(RUNNER)
    dispatch: Callable[..., Any] = runner.dispatch_cg_and_sync_dp
    if getattr(dispatch, "_eplb", False):
        return

    def dispatch_and_note(*args: Any, **kwargs: Any) -> Any:
        result = dispatch(*args, **kwargs)
        AscendV2EplbState.across = None if result[1] is None else result[1].num_tokens_across_dp
        return result

    dispatch_and_note._eplb = True  # type: ignore[attr-defined]
    runner.dispatch_cg_and_sync_dp = dispatch_and_note
