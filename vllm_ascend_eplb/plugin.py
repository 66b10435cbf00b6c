# SPDX-License-Identifier: Apache-2.0
"""The entry point of ``vllm.general_plugins``: vLLM calls ``register`` in every process, perhaps twice.

It hooks one function, ``EngineArgs.create_engine_config``, and nothing else: there the settings are read and checked,
in the front-end process, before any worker starts. If they turn the balancer on, the configuration that goes to the
workers names a worker class of ours (adaptors/vllm_worker.py), and that class does the rest. If not, vLLM's own
configuration passes through untouched.
"""

from __future__ import annotations

from types import ModuleType

from .post_import import after_import


def register() -> None:
    """Hooks the engine's configuration; idempotent."""
    after_import("vllm.engine.arg_utils", _hook)


def _hook(arg_utils: ModuleType) -> None:
    from .adaptors import vllm_config

    vllm_config.hook(arg_utils.EngineArgs)
