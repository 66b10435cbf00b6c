# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM's sleep mode on a CPU: the real one needs a GPU allocator, and vLLM's CPU worker ignores the
call. Memory of a sleeping engine is filled with ones until it is restored or loaded again. The worker's calls are real.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


def _given_away(worker: Any) -> list[Any]:
    """The weights, and the balancer's tensors on the device."""
    state = getattr(worker.model_runner, "eplb_state", None)
    mine = (
        []
        if state is None
        else [*(tokens.tensor for tokens in state.tokens), *state.updator.parts.adaptor.device_tensors()]
    )
    return [*(parameter.data for parameter in worker.model_runner.model.parameters()), *mine]


def sleep(worker: Any, level: int = 1) -> None:
    runner = worker.model_runner
    runner.eplb_kept = [tensor.clone() for tensor in runner.eplb_allocated] if level == 1 else []
    for tensor in runner.eplb_allocated:
        tensor.fill_(1)


def wake_up(worker: Any, tags: list[str] | None = None) -> None:
    for tensor, kept in zip(worker.model_runner.eplb_allocated, worker.model_runner.eplb_kept, strict=False):
        tensor.copy_(kept)


def remember(worker: Any) -> None:
    """Keep the tensors when the model is loaded: later, while experts are moved, reading parameters is refused."""
    worker.model_runner.eplb_allocated = _given_away(worker)


CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up
