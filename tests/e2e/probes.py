# SPDX-License-Identifier: Apache-2.0
"""Functions that run inside vLLM's workers and look at what the routers and kernels really do.

They are sent there by name, so every worker has this folder on its path (conftest.py sees to it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Probe:
    """What one worker saw. ``windows``: the routers' own choices, counted apart from the package, per window.
    ``loads``: what the planner was given for the same windows. ``masks``: which (token, k) pairs each call computed."""

    def __init__(self) -> None:
        self.windows: list[np.ndarray] = []
        self.loads: list[np.ndarray] = []
        self.counts: np.ndarray | None = None
        self.masks: list[torch.Tensor] = []
        self.wrong_experts = 0
        self.padded_rows = 0


def _state(worker: Any) -> Any:
    return worker.model_runner.eplb_state


def install(worker: Any) -> None:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    from vllm_ascend_eplb.adaptors import vllm_cpu

    state, probe = _state(worker), Probe()
    worker.eplb_probe = probe
    updator = state.updator
    shape = (updator.placement.num_layers, updator.placement.num_experts)
    probe.counts = np.zeros(shape, dtype=np.int64)

    routers = [module.router for module in worker.model_runner.model.modules() if _has_router(module, BaseRouter)]
    routers = list({id(router): router for router in routers}.values())
    assert len(routers) == shape[0], f"{len(routers)} routers for {shape[0]} layers"
    chosen: dict[int, torch.Tensor] = {}

    def captured(layer: int, ids: torch.Tensor) -> None:
        real = int(state.num_unpadded_tokens[0])
        probe.padded_rows += len(ids) - real
        chosen[layer] = ids.clone()
        np.add.at(probe.counts[layer], ids[:real].reshape(-1).long().numpy(), 1)

    for layer, router in enumerate(routers):
        router.set_capture_fn(lambda ids, layer=layer: captured(layer, ids))

    snapshot, compute = updator._recorder.snapshot, vllm_cpu.cpu_local_experts
    calls = [0]

    def counted_snapshot(placement: Any) -> None:
        probe.windows.append(probe.counts.copy())
        probe.counts[:] = 0
        snapshot(placement)

    def watched_compute(output: Any, hidden: Any, w1: Any, w2: Any, b1: Any, b2: Any, weights: Any, ids: Any,
                        expert_map: Any, *rest: Any) -> None:  # fmt: skip
        layer = calls[0] % shape[0]
        calls[0] += 1
        probe.masks.append(expert_map[ids.long()] >= 0)
        held = torch.from_numpy(updator.placement.physical_to_logical[layer].astype(np.int64))[ids.long()]
        probe.wrong_experts += int((held != chosen[layer].long()).sum())
        compute(output, hidden, w1, w2, b1, b2, weights, ids, expert_map, *rest)

    updator._recorder.snapshot = counted_snapshot
    vllm_cpu.cpu_local_experts = watched_compute
    if updator._planner is not None:
        submit = updator._planner.submit

        def watched_submit(request: Any) -> None:
            probe.loads.append(request.load.sum(axis=0))
            submit(request)

        updator._planner.submit = watched_submit


def _has_router(module: Any, kind: type) -> bool:
    return isinstance(getattr(module, "router", None), kind)


def switch_maps_without_weights(worker: Any) -> None:
    """The negative control: the routing of a placement whose weights were never moved."""
    updator = _state(worker).updator
    start = updator.placement
    turned = type(start)(np.roll(start.physical_to_logical, 1, axis=1), start.num_experts, start.num_ranks)
    updator._adaptor.prepare_maps(turned, list(range(start.num_layers)))
    updator._adaptor.commit_maps()


def cycles_done(worker: Any) -> int:
    """Cycles that moved experts so far; 0 on all ranks but the first, and without balancing."""
    state = _state(worker)
    return state.updator.stats.stats().cycles_done if state is not None else 0


def report(worker: Any) -> dict[str, Any]:
    """What a worker knows at the end; plain values only."""
    updator = _state(worker).updator
    result = {
        "digest": updator.placement.digest,
        "step": updator.state.step,
        "cycle": updator.state.cycle,
        "failures": updator.state.failures,
        "phase": updator.state.phase.name,
        "stats": updator.stats.stats().to_json(),
    }
    probe = getattr(worker, "eplb_probe", None)
    if probe is not None:
        result["windows"] = [window.tolist() for window in probe.windows]
        result["loads"] = [load.tolist() for load in probe.loads]
        result["masks"] = [mask.int().tolist() for mask in probe.masks]
        result["wrong_experts"] = probe.wrong_experts
    return result
