# SPDX-License-Identifier: Apache-2.0
"""The entry point of ``vllm.general_plugins``: vLLM calls ``register`` in every process, perhaps twice.

``register`` wraps ``EngineArgs.create_engine_config``. The wrapper reads and checks the settings in the front-end
process, before any worker starts. If they turn the balancer on, the configuration for the workers names our worker
class (adaptors/vllm/worker.py), which does the rest. Otherwise vLLM's own configuration is returned unchanged.

With the first model runner of vllm-ascend, vllm-ascend's worker class is kept, and hooked when its module is imported
(adaptors/ascend/worker.py). Alternatively ``VLLM_PLUGINS`` names the platform ``ascend_eplb`` in place of ``ascend``:
then ``register_platform``, the entry point of ``vllm.platform_plugins``, returns a subclass of vllm-ascend's platform
with our worker class.
"""

from __future__ import annotations

import os
from types import ModuleType

from .adaptors.post_import import after_import


def register() -> None:
    """Hooks the configuration of the engine, its executor and the worker of vllm-ascend; idempotent."""
    after_import("vllm.engine.arg_utils", _hook)
    after_import("vllm.v1.executor.multiproc_executor", _hook_executor)
    after_import("vllm_ascend.worker.worker", _hook_ascend)


def register_platform() -> str | None:
    """The platform class if the user named it; vLLM allows only one platform plugin."""
    named = os.environ.get("VLLM_PLUGINS", "").split(",")
    return "vllm_ascend_eplb.adaptors.ascend.platform.EplbNPUPlatform" if "ascend_eplb" in named else None


def _hook(arg_utils: ModuleType) -> None:
    from .adaptors import front_end

    front_end.hook(arg_utils.EngineArgs)


def _hook_executor(executor: ModuleType) -> None:
    from .adaptors.answers import hook_executor

    hook_executor(executor)


def _hook_ascend(worker: ModuleType) -> None:
    from .adaptors.ascend.worker import hook_worker

    hook_worker(worker)
