# SPDX-License-Identifier: Apache-2.0
"""Refuses models that vLLM cannot balance, from the class of the model, before any worker starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ...settings.messages import EplbConfigError
from .sources import SourceError, inherits, installed_root

PROTOCOL = "MixtureOfExperts"

_SECONDS = 300.0

ASK = """
import importlib, sys
from vllm.model_executor.models.interfaces import supports_multimodal
cls = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
print("ANSWER", hasattr(cls, "set_eplb_state") or supports_multimodal(cls))
"""


def refuse_model(vllm_config: Any) -> None:
    """Refuses a model whose class does not implement the MixtureOfExperts protocol of vLLM.

    The class is that of vLLM's own registry. Its sources are read first, which takes milliseconds. If they do not show
    the protocol, a separate process imports the class and decides, because an import in the front end could claim a
    GPU. A multimodal model may hold a language model that has the protocol, so the workers decide; they also do for a
    class that cannot be found.

    Raises:
        EplbConfigError: the class lacks the protocol.
    """
    model = vllm_config.model_config
    found = registered_class(model)
    if found is not None and not implements(*found):
        raise EplbConfigError(
            f"eplb_config is given for {model.architecture}, whose class {found[1]} in this vLLM does not implement "
            f"the {PROTOCOL} protocol (allowed: models that do, such as Qwen3MoeForCausalLM or DeepseekV3ForCausalLM); "
            "leave eplb_config out, or serve another model"
        )


def registered_class(model_config: Any) -> tuple[str, str] | None:
    """Module and name of a model's class in vLLM's registry; None if it is not registered by name."""
    registry = model_config.registry
    architecture = registry._normalize_arch(model_config.architecture, model_config)
    entry = registry.models.get(architecture)
    module, name = getattr(entry, "module_name", None), getattr(entry, "class_name", None)
    if module is None:  # a class that a plugin registered
        cls = getattr(entry, "model_cls", None)
        module, name = getattr(cls, "__module__", None), getattr(cls, "__qualname__", None)
    return None if module is None or name is None else (module, name)


def implements(module: str, name: str, ask: Callable[[str, str], bool] | None = None) -> bool:
    """Whether a class implements the protocol, or may hold a model that does.

    Args:
        module, name: module and name of the class.
        ask: decides if the sources do not show the protocol.
    """
    root = installed_root()
    try:
        if root is not None and inherits(root, module, name, PROTOCOL):
            return True
    except SourceError:
        pass
    return (ask or ask_a_process)(module, name)


def ask_a_process(module: str, name: str) -> bool:
    """Asks a separate process. Returns True also if the process fails: then the workers decide."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, module, name], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return True
    return "ANSWER False" not in done.stdout
