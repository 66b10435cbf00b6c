# SPDX-License-Identifier: Apache-2.0
"""The worker of vllm-ascend's second model runner with the balancer in it."""

from __future__ import annotations

from typing import Any

from ..vllm import worker
from ..worker_name import base_of
from . import second_runner


def __getattr__(name: str) -> Any:
    base = base_of(__name__, name)  # before vLLM's import, which takes seconds: Python asks for __path__, too
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return worker.balanced(resolve_obj_by_qualname(base), take_over)


def take_over() -> None:
    """Puts our states in place of those of vLLM and vllm-ascend, in the process of this worker; idempotent.

    Raises:
        PatchPointError: vLLM or vllm-ascend is missing a patch point; names all that are missing.
    """
    worker.take_over()
    second_runner.take_over()
