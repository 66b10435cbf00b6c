# SPDX-License-Identifier: Apache-2.0
"""TODO"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ..handed_over import settings_of
from .hand_over import second_runner, switch_on
from .runner import RUNNER, RunnerUpdator, take_over

# --- taking over, in the worker ---------------------------------------------------------------------------------------


def hook_worker(module: ModuleType) -> None:
    """Puts a balanced worker in place of vllm-ascend's, in its module; idempotent."""
    if not getattr(module.NPUWorker, "_eplb", False):
        module.NPUWorker = balanced(module.NPUWorker)  # type: ignore[attr-defined]


def balanced(base: type) -> type:
    """A subclass of vllm-ascend's worker that takes the names over where the settings ask for it, counts steps once
    warm-up is over, and ends the balancer with itself."""

    class EplbNPUWorker(base):  # type: ignore[misc]
        _eplb = True

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            prepare(vllm_config)
            super().__init__(vllm_config, *args, **kwargs)

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            updator = _updator_of(self)
            if updator is not None:
                updator.begin()
            return result

        def shutdown(self) -> None:
            updator = _updator_of(self)
            if updator is not None:
                updator.shutdown()
            super().shutdown()

    return EplbNPUWorker


def _updator_of(worker: Any) -> RunnerUpdator | None:
    updator = getattr(getattr(worker, "model_runner", None), "eplb_updator", None)
    return updator if isinstance(updator, RunnerUpdator) else None


def prepare(vllm_config: Any) -> None:
    """In a worker's process, before its runner is built: takes the names over if the settings turn the balancer on."""
    config = settings_of(vllm_config.additional_config)
    if not config.active or second_runner():
        return
    switch_on()  # a worker on another machine has not inherited it
    RunnerUpdator.settings, RunnerUpdator.load_format = config, str(vllm_config.load_config.load_format)
    take_over(importlib.import_module(RUNNER))
