# SPDX-License-Identifier: Apache-2.0
"""Runs a vLLM model's MoE layers with given expert ids, to time them.

The layer's router answers with the given ids. Everything behind it is as in serving: dispatch, the experts' kernel,
combine, and the reduction over the ranks that share a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...balancer.calibration import LayerRuns

MOST_LAYERS = 4
"""Most layers of a run: enough that no layer finds its weights in a cache."""


def layer_runs(
    layers: Sequence[Any], vllm_config: Any, *, num_ranks: int, slots_per_rank: int, sharers: int, own_slice: bool
) -> LayerRuns:
    """The runs of a model's layers.

    Args:
        layers: the model's MoE layers, in order.
        vllm_config: of the engine.
        num_ranks, slots_per_rank: R and S.
        sharers: ranks of a tensor-parallel group. own_slice: whether each of them routes a slice of the batch.
    """
    chosen = list(layers[:MOST_LAYERS])
    config = chosen[0].moe_config
    device = next(chosen[0].parameters()).device
    most = int(vllm_config.scheduler_config.max_num_batched_tokens)
    experts, top_k, hidden = int(config.num_logical_experts), int(config.experts_per_token), int(config.hidden_dim)

    def prepare(ids: torch.Tensor) -> Callable[[], None]:
        rows = len(ids)
        with torch.inference_mode():
            fresh = torch.randn(rows, hidden, dtype=config.in_dtype, device=device)
            states = torch.empty_like(fresh)
            logits = torch.zeros(rows, experts, dtype=config.in_dtype, device=device)
            weights = torch.full((rows, top_k), 1.0 / top_k, dtype=torch.float32, device=device)
            chosen_ids = ids.to(device)

        def run() -> None:
            from vllm.forward_context import set_forward_context

            with (
                torch.inference_mode(),
                _routed_by(chosen, weights, chosen_ids),
                set_forward_context(None, vllm_config, num_tokens=rows),
            ):
                for layer in chosen:
                    states.copy_(fresh)  # layers may compute in place
                    layer(states, logits)

        return run

    dtype = str(config.in_dtype).removeprefix("torch.")
    return LayerRuns(
        subject=(
            f"{len(layers)} layers of {experts} experts, {top_k} per token, hidden {hidden}, "
            f"intermediate {int(config.intermediate_size)}, {dtype}; {num_ranks} ranks of {slots_per_rank} slots, "
            f"{sharers} share a batch; {_device_name(device)}; torch {torch.__version__}"
        ),
        top_k=top_k,
        sharers=1 if own_slice else sharers,
        most_rows=-(-most // sharers) if own_slice else most,
        num_layers=len(chosen),
        prepare=prepare,
    )


@contextlib.contextmanager
def _routed_by(layers: Sequence[Any], weights: torch.Tensor, ids: torch.Tensor) -> Iterator[None]:
    """Context in which the layers' routers answer with ``weights`` and ``ids``, without mapping or counting."""
    converted: dict[torch.dtype | None, torch.Tensor] = {}

    def select_experts(
        *_: Any, topk_indices_dtype: torch.dtype | None = None, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if topk_indices_dtype not in converted:
            converted[topk_indices_dtype] = ids if topk_indices_dtype is None else ids.to(topk_indices_dtype)
        return weights, converted[topk_indices_dtype]

    for layer in layers:
        layer.router.select_experts = select_experts
    try:
        yield
    finally:
        for layer in layers:
            del layer.router.select_experts


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        import os
        import platform

        return f"{os.cpu_count()} cores of {platform.machine()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))
