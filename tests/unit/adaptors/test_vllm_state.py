# SPDX-License-Identifier: Apache-2.0
"""The state in a vLLM worker: the rows that a rank counts, loading, weight transfers and sleep; without vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.adaptors.engine_adaptor import require_loaded_copies
from vllm_ascend_eplb.adaptors.errors import UnsupportedError
from vllm_ascend_eplb.adaptors.vllm.adaptor import Slice
from vllm_ascend_eplb.adaptors.vllm.runner import require_known_slice
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState
from vllm_ascend_eplb.adaptors.vllm.worker import balanced
from vllm_ascend_eplb.values.placement import Placement


@given(st.integers(1, 9), st.integers(1, 300), st.data())
def test_slices_of_a_batch_have_every_token_once(parts: int, rows: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, rows))
    length = -(-rows // parts)
    padded = torch.arange(parts * length)
    for part in range(parts):
        mine = padded[part * length : (part + 1) * length]
        assert Slice(part, parts).real(tokens, rows) == int((mine < tokens).sum())


def state(data_parallel_size: int = 1, num_ubatches: int = 0) -> VllmEplbState:
    parallel = SimpleNamespace(data_parallel_size=data_parallel_size, num_ubatches=num_ubatches)
    return VllmEplbState(parallel, torch.device("cpu"))


def counted_by(state: VllmEplbState) -> list[torch.Tensor]:
    """What the routers read: the tokens that they count, by micro-batch."""
    return [tokens.tensor for tokens in state.tokens]


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 100), st.data())
def test_micro_batches_have_every_token_once(batches: int, parts: int, rows: int, data: st.DataObject) -> None:
    """Every micro-batch is split among the ranks that share it, and none counts padding."""
    tokens = data.draw(st.integers(0, rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=batches - 1, max_size=batches - 1)))
    ends = list(zip([0, *cuts], [*cuts, rows], strict=True))
    counted = torch.zeros(batches, dtype=torch.int64)
    for part in range(parts):
        mine = state(num_ubatches=batches)
        mine.slice = Slice(part, parts)
        mine.prepare_forward(None, tokens, [SimpleNamespace(token_slice=slice(*rows)) for rows in ends])
        counted += torch.stack(counted_by(mine))
        mine.count_nothing()
        assert not torch.stack(counted_by(mine)).any()
    assert counted.tolist() == [max(0, min(tokens, last) - first) for first, last in ends]


def test_batch_that_is_not_split_is_the_first_micro_batch() -> None:
    mine = state(num_ubatches=2)
    mine.prepare_forward(None, 17)
    assert torch.stack(counted_by(mine)).tolist() == [17, 0]


def loads_by(load: Callable[[str], object]) -> Any:
    """A model that loads weights by name with this function."""
    model: Any = torch.nn.Module()
    model.load_weights = load
    return model


def test_a_whole_batch_needs_no_number_of_rows() -> None:
    mine = state()
    mine.forward_before(serving=True, stage="decode", rows=0)
    mine.prepare_forward(None, 17)
    assert int(mine.tokens[0].tensor) == 17


def test_rank_counts_its_slice_of_a_batch() -> None:
    mine = state(2)
    mine.slice = Slice(1, 2)
    mine.forward_before(serving=True, stage="decode", rows=8)
    mine.prepare_forward(None, 5)
    assert int(mine.tokens[0].tensor) == 1
    mine.count_nothing()
    assert int(mine.tokens[0].tensor) == 0


def test_runner_without_rows_is_refused_for_sliced_batches() -> None:
    sliced = state(2)
    sliced.slice = Slice(0, 2)
    require_known_slice(SimpleNamespace(eplb_state=state(2)))
    require_known_slice(SimpleNamespace(eplb_state=sliced, _determine_batch_execution_and_padding=None))
    with pytest.raises(UnsupportedError, match="not supported with vLLM's V2 model runner"):
        require_known_slice(SimpleNamespace(eplb_state=sliced))


def test_redundant_slots_without_weights_end_the_start() -> None:
    require_loaded_copies(0, "auto")
    require_loaded_copies(8, "dummy")
    with pytest.raises(UnsupportedError, match=r"copies of 8 experts differ.*; set num_redundant_experts to 0"):
        require_loaded_copies(8, "auto")


class Balancer:
    """A stand-in for the balancer: records its calls, and if weights may be loaded."""

    def __init__(self) -> None:
        self.open, self.calls = False, []
        adaptor = SimpleNamespace(control_group=None, topology=SimpleNamespace(num_ranks=1))
        self.parts = SimpleNamespace(adaptor=adaptor)
        self.weights = SimpleNamespace(loading=self.loading, move_back=self.move_back, rest=self.rest)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        self.open = True
        self.calls.append("back to the start")
        try:
            yield
        finally:
            self.open = False
            self.calls.append("checksums")

    def move_back(self) -> None:
        self.calls.append("moves back")

    def rest(self, *, at_start: bool) -> None:
        self.calls.append("rests at the start" if at_start else "rests")

    def pause_recording(self) -> None:
        self.calls.append("counts nothing")

    def forward_before(self, **_: Any) -> None:
        self.calls.append("step")

    def forward_end(self) -> None:
        self.calls.append("end of step")


def test_weights_by_name_go_into_initial_slots() -> None:
    balancer, mine, loaded = Balancer(), state(), []

    def load(weights: str) -> str:
        loaded.append((weights, balancer.open))
        return weights

    model = loads_by(load)
    mine.guard(model)
    mine.updator = balancer
    assert model.load_weights("by name") == "by name"
    with mine.new_weights():
        model.load_weights("a reload")
    assert loaded == [("by name", True), ("a reload", True)]
    assert balancer.calls == ["moves back", "back to the start", "checksums", "back to the start", "checksums"]


def test_parts_of_a_model_are_loaded_into_initial_slots() -> None:
    """As trainers do that give ``model.model`` its weights. The loader of a model calls those of its parts, for which
    experts move back once. Negative control: a part without experts."""
    balancer, mine, loaded = Balancer(), state(), []

    def loads(name: str) -> Callable[[str], None]:
        return lambda _: loaded.append((name, balancer.open))

    model = loads_by(lambda weights: part.load_weights(weights))
    part, model.vision = loads_by(loads("part")), loads_by(loads("vision"))
    model.part = part
    part.w13_weight = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
    experts = [[[part.w13_weight.data[slot]] for slot in range(2)]]
    mine.loaded.add(Placement.initial(1, 2, 1, 0), None, by_map=False, experts=experts)
    mine.guard(model)
    mine.updator = balancer
    model.vision.load_weights("a picture's")
    assert balancer.calls == []
    part.load_weights("by name")
    model.load_weights("by name")
    assert loaded == [("vision", False), ("part", True), ("part", True)]
    assert balancer.calls == ["moves back", "back to the start", "checksums"] * 2


def test_weight_transfer_stops_the_balancer() -> None:
    """Between start and finish the balancer takes no step: a cycle would move experts whose weights are half new."""
    balancer, mine = Balancer(), state()
    mine.updator = balancer
    mine.begin()
    assert mine.begin_update()
    assert not mine.begin_update()
    mine.forward_before(serving=True, stage="decode", rows=4)
    mine.step()
    assert balancer.open
    mine.end_update()
    mine.end_update()
    assert balancer.calls == ["moves back", "back to the start", "counts nothing", "checksums"]
    mine.forward_before(serving=True, stage="decode", rows=4)
    mine.step()
    assert balancer.calls[4:] == ["step", "end of step"]


class VllmWorker:
    """A stand-in for vLLM's worker, whose calls around a weight transfer can fail."""

    def __init__(self, mine: VllmEplbState, failing: str = "") -> None:
        self.model_runner, self.failing = SimpleNamespace(eplb_state=mine), failing

    def start_weight_update(self) -> None:
        if self.failing == "start":
            raise RuntimeError("start failed")

    def finish_weight_update(self) -> None:
        if self.failing == "finish":
            raise RuntimeError("finish failed")


@pytest.mark.parametrize("failing", ["", "start", "finish"])
def test_weight_transfer_ends_even_if_vllm_fails(failing: str) -> None:
    balancer, mine = Balancer(), state()
    mine.updator = balancer
    worker = balanced(VllmWorker, lambda: None)(mine, failing)
    with pytest.raises(RuntimeError, match=f"{failing} failed") if failing == "start" else contextlib.nullcontext():
        worker.start_weight_update()
    assert balancer.open == (failing != "start")
    if failing != "start":
        with pytest.raises(RuntimeError, match="finish") if failing else contextlib.nullcontext():
            worker.finish_weight_update()
    assert not balancer.open
    assert balancer.calls == ["moves back", "back to the start", "counts nothing", "checksums"]


def test_second_start_leaves_a_weight_transfer_open() -> None:
    balancer, mine = Balancer(), state()
    mine.updator = balancer
    worker = balanced(VllmWorker, lambda: None)(mine)
    worker.start_weight_update()
    worker.failing = "start"  # vLLM refuses a second start
    with pytest.raises(RuntimeError, match="start failed"):
        worker.start_weight_update()
    assert balancer.open
    worker.finish_weight_update()
    assert not balancer.open


class Allocator:
    """A stand-in for vLLM's worker and its allocator, which needs a GPU. Level 2 loses the device memory."""

    def __init__(self, mine: VllmEplbState, device: list[torch.Tensor]) -> None:
        self.model_runner, self.device = SimpleNamespace(eplb_state=mine), device

    def sleep(self, level: int = 1) -> None:
        if level == 2:
            for tensor in self.device:
                tensor.fill_(77)

    def wake_up(self, tags: list[str] | None = None) -> None:
        pass


def sleeper() -> tuple[Any, VllmEplbState, Balancer, list[torch.Tensor]]:
    """A worker with its state, its balancer and its tensors on the device."""
    balancer, mine = Balancer(), state()
    maps, counts = torch.arange(6), torch.ones(4)
    mine.updator = balancer
    mine.adaptor = SimpleNamespace(device_tensors=lambda: [maps, counts], rank=0)
    device = [maps, counts, *counted_by(mine)]
    mine.begin()
    return balanced(Allocator, lambda: None)(mine, device), mine, balancer, device


def test_balancing_continues_after_sleep_with_contents() -> None:
    worker, mine, balancer, _ = sleeper()
    worker.sleep()
    assert balancer.calls == ["rests", "counts nothing"]
    worker.wake_up()
    mine.forward_before(serving=True, stage="decode", rows=4)
    assert balancer.calls[2:] == ["step"]


def test_maps_are_restored_after_sleep_without_contents() -> None:
    """Negative control: before the memory for weights is back, the maps are lost."""
    worker, mine, balancer, device = sleeper()
    worker.sleep(2)
    assert balancer.calls == ["rests at the start", "counts nothing"]
    worker.wake_up(["kv_cache"])
    assert device[0].tolist() == [77] * 6
    worker.wake_up(["weights"])
    assert device[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert device[1].tolist() == [1.0] * 4
    assert int(mine.tokens[0].tensor) == 0


def test_weights_may_be_loaded_in_parts_after_sleep() -> None:
    """Their checksums are learned once, at the first real step. Nothing is balanced before."""
    worker, mine, balancer, _ = sleeper()
    loaded: list[str] = []
    model = loads_by(loaded.append)
    mine.guard(model)
    worker.sleep(2)
    worker.wake_up()
    before = list(balancer.calls)
    for part in ("one", "two"):
        model.load_weights(part)
    mine.forward_before(serving=False, stage="decode", rows=4)
    mine.step()
    assert loaded == ["one", "two"]
    assert balancer.calls == before
    mine.forward_before(serving=True, stage="decode", rows=4)
    mine.step()
    assert balancer.calls[len(before) :] == ["moves back", "back to the start", "checksums", "step", "end of step"]
    mine.forward_before(serving=True, stage="decode", rows=4)
    assert balancer.calls[-1] == "step"


def test_weight_transfer_after_sleep_resumes_balancing() -> None:
    worker, mine, balancer, _ = sleeper()
    worker.sleep(2)
    worker.wake_up()
    assert mine.begin_update()
    mine.end_update()
    mine.forward_before(serving=True, stage="decode", rows=4)
    assert balancer.calls[-3:] == ["counts nothing", "checksums", "step"]


def test_unsupported_sleep_is_refused() -> None:
    worker, _, balancer, device = sleeper()
    with pytest.raises(RuntimeError, match=r"level 3 is not supported"):
        worker.sleep(3)
    assert balancer.calls == []
    assert device[0].tolist() == [0, 1, 2, 3, 4, 5]
