# SPDX-License-Identifier: Apache-2.0
"""The answers of all workers to a call are read, even if one of them is an error."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.adaptors import answers
from vllm_ascend_eplb.adaptors.answers import AnswerQueues, hook_executor


class Worker(queue.SimpleQueue[Any]):
    """A stand-in for vLLM's queue of a worker's answers."""

    def dequeue(self, timeout: float | None = None) -> Any:
        return self.get(timeout=timeout)


def read(queues: list[Worker]) -> list[Any]:
    """Read the answers to one call as vLLM does."""
    found = []
    for worker in queues:
        answer = worker.dequeue(1)
        if isinstance(answer, Exception):
            raise answer
        found.append(answer)
    return found


def calls(queues: list[Worker], refused: list[list[bool]]) -> list[list[int] | str]:
    """The results of calls 0, 1, ...; the error's text if a worker refused."""
    found: list[list[int] | str] = []
    for number, refusals in enumerate(refused):
        for worker, refuses in zip(queues, refusals, strict=True):
            worker.put(RuntimeError(str(number)) if refuses else number)
        try:
            found.append([int(answer) for answer in read(queues)])
        except RuntimeError as error:
            found.append(str(error))
    return found


refusals = st.integers(1, 5).flatmap(lambda ranks: st.lists(st.lists(st.booleans(), min_size=ranks, max_size=ranks)))


@given(refusals)
def test_every_call_gets_its_own_answers(refused: list[list[bool]]) -> None:
    ranks = len(refused[0]) if refused else 1
    queues = AnswerQueues(Worker() for _ in range(ranks))
    wanted = [str(number) if any(refusals) else [number] * ranks for number, refusals in enumerate(refused)]
    assert calls(queues, refused) == wanted
    assert all(worker.empty() for worker in queues)


def test_vllms_own_queues_give_an_old_answer() -> None:
    """Negative control: with vLLM's own list of queues, the next call gets an answer to the refused call."""
    queues = [Worker(), Worker()]
    assert calls(queues, [[True, True], [False, False], [False, False]]) == ["0", "0", [2, 1]]


def test_single_queue_can_be_read_alone() -> None:
    """vLLM does so for steps, which one rank answers."""
    queues = AnswerQueues([Worker(), Worker()])
    queues[1].put(7)
    assert read([queues[1]]) == [7]
    assert len(queues) == 2


def test_worker_that_never_answers_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LATE_SECONDS", 0.01)
    queues = AnswerQueues([Worker(), Worker(), Worker()])
    queues[0].put(RuntimeError("refused"))
    with pytest.raises(RuntimeError, match="refused"):
        read(queues)


@pytest.mark.parametrize(("eplb", "hooked"), [({"dynamic_eplb": True}, True), ({}, False), (None, False)])
def test_only_a_balanced_server_is_hooked(eplb: dict[str, Any] | None, hooked: bool) -> None:
    class MultiprocExecutor:
        """A stand-in for vLLM's."""

        def __init__(self, vllm_config: Any, monitor_workers: bool = True) -> None:
            self.response_mqs = [Worker(), Worker()]

    class Derived(MultiprocExecutor):
        """A stand-in for vllm-ascend's, which is derived from vLLM's."""

    module: Any = SimpleNamespace(MultiprocExecutor=MultiprocExecutor)
    hook_executor(module)
    hook_executor(module)
    config = SimpleNamespace(additional_config={} if eplb is None else {"eplb_config": eplb})
    for kind in (MultiprocExecutor, Derived):
        made = kind(config, monitor_workers=False)
        assert isinstance(made.response_mqs, AnswerQueues) is hooked
        assert len(made.response_mqs) == 2
