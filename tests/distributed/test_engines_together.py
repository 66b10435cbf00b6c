# SPDX-License-Identifier: Apache-2.0
"""Data-parallel engines get calls for new weights and for sleep at their own times. Here each rank is an engine: vLLM's
worker calls the same state, and a forward is a barrier."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from vllm_ascend_eplb.adaptors.vllm import state as state_module
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState
from vllm_ascend_eplb.adaptors.vllm.worker import balanced
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.start import start_balancer

from .ranks import Ranks, run_ranks
from .routing_model import RoutingModel
from .test_new_weights import CONFIG, give_memory_away, load_others

pytestmark = pytest.mark.distributed


@dataclass
class Seen:
    """Observations of one rank: the placement after every step, the first wrong slot, errors of calls, and whatever a
    test notes."""

    history: list[int] = field(default_factory=list)
    wrong: str = ""
    errors: list[str] = field(default_factory=list)
    noted: list[object] = field(default_factory=list)


class Engine:
    """An engine of one rank; ``worker`` is the balancing subclass of a worker that does nothing by itself.

    Attributes:
        failing: whether vLLM's part of ``start_weight_update`` fails.
    """

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self.seen, self.rank, self.failing = Seen(), ranks.rank, False
        self.model = RoutingModel(ranks)
        self.state = VllmEplbState(
            SimpleNamespace(data_parallel_size=ranks.num_ranks, num_ubatches=0), torch.device("cpu")
        )
        self.state.updator = self.updator = start_balancer(self.model, CONFIG)
        maps = self.model.maps
        mine = [maps.logical_to_physical, maps.replica_count, *self.model.recorder.device_tensors()]
        self.state.adaptor = SimpleNamespace(device_tensors=lambda: mine)  # type: ignore[assignment]
        self.state.begin()
        self.wait_for(seconds)
        engine = self

        class Worker:
            model_runner = SimpleNamespace(eplb_state=self.state)

            def start_weight_update(self) -> None:
                if engine.failing:
                    raise RuntimeError("vLLM failed")

            def finish_weight_update(self) -> None: ...

            def sleep(self, level: int = 1) -> None:
                give_memory_away(engine.model, level)

            def wake_up(self, tags: list[str] | None = None) -> None: ...

        self.worker = balanced(Worker, lambda: None)()

    def wait_for(self, seconds: float) -> None:
        """How long a call waits for the other engines."""
        state_module.MEETING_SECONDS = seconds

    def step(self, serving: bool = True) -> None:
        self.state.forward_before(serving=serving, stage="decode", rows=4)
        self.model.forward()
        self.state.step()
        dist.barrier()  # a forward's collectives keep the engines together
        time.sleep(0.03 if self.updator.state.phase is Phase.PLAN else 0.002)
        self.seen.history.append(self.updator.placement.digest)
        self.seen.wrong = self.seen.wrong or self.model.slots.wrong(self.updator.placement)

    def steps_until_moved(self) -> None:
        """Until experts have moved, and no cycle is under way."""
        before = self.updator.placement
        while self.updator.placement == before or self.updator.state.active:
            self.step()

    def call(self, name: str, *args: object) -> None:
        try:
            getattr(self.worker, name)(*args)
        except RuntimeError as error:
            self.seen.errors.append(str(error))


def one_is_called(ranks: Ranks, finish: bool) -> Seen:
    """Rank 0 is called to begin, or to end, a weight transfer while rank 1 is in a forward."""
    engine = Engine(ranks, seconds=0.4)
    engine.steps_until_moved()
    if finish:
        engine.call("start_weight_update")
    if ranks.rank == 0:
        engine.call("finish_weight_update" if finish else "start_weight_update")
    before = len(engine.seen.history)
    for _ in range(40):
        engine.step()
    engine.seen.noted.append(len(set(engine.seen.history[before:])) > 1)
    engine.wait_for(60.0)
    if not finish:
        engine.call("start_weight_update")
    engine.call("finish_weight_update")
    engine.steps_until_moved()
    engine.updator.close()
    return engine.seen


@pytest.mark.parametrize("finish", [False, True])
def test_call_to_one_engine_changes_nothing(finish: bool) -> None:
    """Both engines serve on: with cycles if no transfer began, without cycles if one did not end."""
    first, second = run_ranks(2, one_is_called, finish)
    for seen in (first, second):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.noted == [not finish]
    name = "finish_weight_update" if finish else "start_weight_update"
    assert len(first.errors) == 1
    assert first.errors[0].startswith(f"{name} changed nothing, because not all engines were called")
    assert second.errors == []


def one_fails(ranks: Ranks, failing: list[int]) -> Seen:
    """vLLM fails to start a weight transfer on some ranks."""
    engine = Engine(ranks, seconds=0.4)
    engine.steps_until_moved()
    engine.failing = ranks.rank in failing
    engine.call("start_weight_update")
    before = len(engine.seen.history)
    dist.barrier()
    for _ in range(40):
        engine.step()
    engine.seen.noted.append(len(set(engine.seen.history[before:])) > 1)
    engine.failing = False
    engine.wait_for(60.0)
    engine.call("finish_weight_update")
    engine.steps_until_moved()
    engine.updator.close()
    return engine.seen


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_transfer_that_starts_on_some_ranks_rests_on_all(failing: list[int]) -> None:
    """If it starts on no rank, cycles go on."""
    first, second = run_ranks(2, one_fails, failing)
    for rank, seen in enumerate((first, second)):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.noted == [failing == [0, 1]]
        assert seen.errors == ["vLLM failed"] * (rank in failing)


def serve_after_sleep(ranks: Ranks, serving: list[int]) -> Seen:
    """Sleep without contents; weights come past the balancer; dummy steps, then some ranks have requests."""
    engine = Engine(ranks, seconds=60.0)
    engine.steps_until_moved()
    engine.call("sleep", 2)
    engine.call("wake_up")
    step = engine.updator.state.step
    engine.step(serving=False)
    engine.step(serving=False)
    engine.seen.wrong = ""  # there were no weights yet
    engine.seen.noted.append(engine.updator.state.step - step)
    load_others(engine.model)
    for _ in range(3):
        engine.step(serving=ranks.rank in serving)
    engine.seen.noted.append(engine.updator.state.step - step)
    engine.steps_until_moved()
    engine.updator.close()
    return engine.seen


@pytest.mark.parametrize("serving", [[0, 1], [0], [1]])
def test_ranks_agree_on_the_first_step_after_sleep(serving: list[int]) -> None:
    """Dummy batches of engines that have no weights yet are no steps; those beside requests are."""
    first, second = run_ranks(2, serve_after_sleep, serving)
    for seen in (first, second):
        assert (seen.wrong, seen.errors) == ("", [])
        assert seen.history == first.history
        assert seen.noted == [0, 3]
