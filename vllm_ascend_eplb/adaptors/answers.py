# SPDX-License-Identifier: Apache-2.0
"""Reads all workers' answers to a call before an error is raised, so that a refused call does not disturb the next.

vLLM's engine reads the workers' answers to a call from one queue per worker, in order, and raises at the first error.
The answers behind it stay in their queues, and the next call, or the next step, would read them as its own. The
balancer refuses some calls in every worker (weights read by slot, reloads that it cannot follow).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .handed_over import settings_of
from .patching import patch_once

LATE_SECONDS = 10.0
"""How long an answer may take after another worker's error. A worker that is later hangs, or is dead."""


class AnswerQueues(list[Any]):
    """Queues of answers, one per worker. A loop that is left early still takes one answer from each of the rest."""

    def __iter__(self) -> Iterator[Any]:
        queues = super().__iter__()
        try:
            yield from queues
        except GeneratorExit:  # the loop has raised
            for queue in queues:
                if not _took_answer(queue):
                    break
            raise


def _took_answer(queue: Any) -> bool:
    try:
        queue.dequeue(timeout=LATE_SECONDS)
    except Exception:  # the error that ended the loop is the one to raise
        return False
    return True


def hook_executor(module: ModuleType) -> None:
    """Lets vLLM's executor of several processes read all answers where the server is balanced; idempotent.

    Args:
        module: ``vllm.v1.executor.multiproc_executor``.
    """
    patch_once(module.MultiprocExecutor, "__init__", _reading_all_answers)


def _reading_all_answers(original: Any) -> Any:
    @functools.wraps(original)
    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if settings_of(vllm_config.additional_config).active:
            self.response_mqs = AnswerQueues(self.response_mqs)

    return initialise
