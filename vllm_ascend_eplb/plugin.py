# SPDX-License-Identifier: Apache-2.0
"""The entry point of ``vllm.general_plugins``: vLLM calls ``register`` in every process, perhaps twice.

It hooks one function, ``EngineArgs.create_engine_config``: there the settings are read and checked, in the front-end
process, before any worker starts. If they turn the balancer on, the configuration that goes to the workers names a
worker class of ours (adaptors/vllm/worker.py), and that class does the rest. If not, vLLM's own configuration passes
through untouched.

With vllm-ascend its own worker stays, and is hooked as soon as its module is loaded (adaptors/ascend/worker.py).
``VLLM_PLUGINS`` may name the platform ``ascend_eplb`` in place of ``ascend`` instead: then ``register_platform``, the
entry point of ``vllm.platform_plugins``, gives a subclass of vllm-ascend's platform, with a worker class of ours.
"""

from __future__ import annotations

import os
from types import ModuleType

from .adaptors.post_import import after_import


def register() -> None:
    """Hooks the engine's configuration and vllm-ascend's worker; idempotent."""
    after_import("vllm.engine.arg_utils", _hook)
    after_import("vllm_ascend.worker.worker", _hook_ascend)


def register_platform() -> str | None:
    """The platform class, if the user has named it: vLLM allows one platform from outside only."""
    named = os.environ.get("VLLM_PLUGINS", "").split(",")
    return "vllm_ascend_eplb.adaptors.ascend.platform.EplbNPUPlatform" if "ascend_eplb" in named else None


def _hook(arg_utils: ModuleType) -> None:
    from .adaptors import front_end

    front_end.hook(arg_utils.EngineArgs)


def _hook_ascend(worker: ModuleType) -> None:
    from .adaptors.ascend.worker import hook_worker

    hook_worker(worker)
