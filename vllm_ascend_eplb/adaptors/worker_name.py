# SPDX-License-Identifier: Apache-2.0
"""Names of worker classes: vLLM finds its worker by a qualified name (``parallel_config.worker_cls``).

The front end sets a name that means a worker class of vLLM, or of any package, with the balancer in it. The name is
resolved only in the process of the worker, by the ``__getattr__`` of the module in the name.
"""

from __future__ import annotations

VLLM = "vllm_ascend_eplb.adaptors.vllm.worker"
SECOND_RUNNER = "vllm_ascend_eplb.adaptors.ascend.second_worker"

_PREFIX = "Eplb:"


def worker_class_name(module: str, base: str) -> str:
    """The name of the class ``base`` (a qualified name) with the balancer in it, as ``module`` builds it."""
    return base if is_worker_of(module, base) else f"{module}.{_PREFIX}{base.replace('.', '/')}"


def is_worker_of(module: str, name: object) -> bool:
    """Whether a qualified name is that of a worker class with the balancer in it, as ``module`` builds it."""
    return isinstance(name, str) and name.startswith(f"{module}.")


def base_of(module: str, attribute: str) -> str:
    """The qualified name of the class that an attribute of ``module`` stands for.

    Raises:
        AttributeError: it is no such name.
    """
    if not attribute.startswith(_PREFIX):
        raise AttributeError(f"module {module!r} has no attribute {attribute!r}")
    return attribute.removeprefix(_PREFIX).replace("/", ".")
