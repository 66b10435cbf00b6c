# SPDX-License-Identifier: Apache-2.0
"""An engine loads other weights while experts move: they go back to the start placement, and balancing continues with
the new weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.distributed as dist

from vllm_ascend_eplb.agreement.exchange import StartError
from vllm_ascend_eplb.agreement.meeting import MeetingPoint
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer import start
from vllm_ascend_eplb.balancer.orders import Order, OrderBox, write_order
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.settings.config import EplbConfig

from .pace import PatientPlanner, make_planners_patient, settle
from .ranks import Ranks, run_ranks
from .routing_model import REDUNDANT, RoutingModel

pytestmark = pytest.mark.distributed

CONFIG = EplbConfig.from_additional_config(
    {
        "eplb_config": {
            "dynamic_eplb": True,
            "num_redundant_experts": REDUNDANT,
            "expert_heat_collection_interval": 5,
            "algorithm_execution_interval": 1,
            "policy": "random",
            "min_gain": 0.0,
            "transfer_buffer_experts": 2,
        }
    }
)
NEW = 12
"""``first_layer`` of the new weights; a multiple of six, so that shapes are equal."""


@dataclass
class Seen:
    """Observations of one rank. ``loaded_in``: the phases in which weights were loaded. ``changed``: at each load, True
    if the placement was not the initial one."""

    history: list[int] = field(default_factory=list)
    loaded_in: list[int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    wrong: str = ""
    done_after: int = 0
    error: str = ""
    stats: object = None


def step(model: RoutingModel, updator: EplbUpdator) -> None:
    settle(updator)  # before a step and not after it, so that weights are also loaded while the planner is at work
    updator.forward_before()
    model.forward()
    updator.forward_end()
    dist.barrier()  # a forward's collectives keep the ranks together


PHASES = (Phase.SNAPSHOT, Phase.REDUCE, Phase.PLAN, Phase.BROADCAST, Phase.MOVE, Phase.COLLECT)


def in_each_phase(ranks: Ranks, load: Callable[[RoutingModel, EplbUpdator, Seen], None]) -> Seen:
    """Call ``load`` once in each phase, when experts are not in their start slots; then run three more cycles."""
    make_planners_patient()
    model, seen = RoutingModel(ranks), Seen()
    updator = start_balancer(model, CONFIG)
    wanted = list(PHASES)
    for _ in range(1500):
        step(model, updator)
        seen.history.append(updator.placement.digest)
        seen.wrong = seen.wrong or model.slots.wrong(updator.placement)
        if not wanted:
            seen.done_after = seen.done_after or updator.state.cycle
            if updator.state.cycle >= seen.done_after + 3:
                break
        elif updator.state.phase is wanted[0] and updator.placement != model.placement:
            seen.loaded_in.append(int(wanted.pop(0)))
            load(model, updator, seen)
    seen.stats = updator.stats.stats() if ranks.rank == 0 else None
    updator.close()
    return seen


def load_others(model: RoutingModel) -> None:
    """Load weights that differ from the present ones, in the start slots."""
    model.slots.load(model.placement, NEW if model.slots.first_layer == 0 else 0)


def give_memory_away(model: RoutingModel, level: int) -> None:
    """Overwrite device memory as sleep mode does. Level 1 keeps the contents; level 2 loses the weights."""
    mine = [model.maps.logical_to_physical, model.maps.replica_count, *model.recorder.device_tensors()]
    weights = [kind for layer in model.slots.stacked for kind in layer]
    lasting = mine if level == 2 else [*mine, *weights]
    kept = [tensor.clone() for tensor in lasting]
    for tensor in [*mine, *weights]:
        tensor.fill_(1)
    for tensor, before in zip(lasting, kept, strict=True):
        tensor.copy_(before)


def serve_and_load(ranks: Ranks, back_to_start: bool) -> Seen:
    """Load other weights once in each phase."""

    def load(model: RoutingModel, updator: EplbUpdator, seen: Seen) -> None:
        with updator.weights.loading() if back_to_start else contextlib.nullcontext():
            load_others(model)
        seen.wrong = seen.wrong or model.slots.wrong(updator.placement)

    return in_each_phase(ranks, load)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_other_weights_may_be_loaded_in_any_phase(num_ranks: int) -> None:
    first, *rest = run_ranks(num_ranks, serve_and_load, True)
    for seen in (first, *rest):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.loaded_in == first.loaded_in
    assert len(first.loaded_in) == 6
    assert first.stats.cycles_failed == 0
    # cycles moved experts after the last load, so the checksums are those of the new weights
    assert len(set(first.history[-40:])) > 3


def test_weights_loaded_past_the_balancer_are_in_wrong_slots() -> None:
    """Negative control of the test above."""
    assert any(seen.wrong for seen in run_ranks(2, serve_and_load, False))


def serve_and_sleep(ranks: Ranks, level: int, at_start: bool) -> Seen:
    """Sleep once in each phase. Level 2 loses the weights, so other weights are loaded afterwards."""

    def sleep(model: RoutingModel, updator: EplbUpdator, seen: Seen) -> None:
        updator.weights.rest(at_start=at_start)
        updator.pause_recording()
        seen.changed.append(updator.placement != model.placement)
        give_memory_away(model, level)
        if level == 2:
            load_others(model)
            if at_start:
                with updator.weights.loading():
                    pass

    return in_each_phase(ranks, sleep)


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_may_sleep_in_any_phase(level: int) -> None:
    """If the contents are kept, the placement stays. If they are lost, it is the initial one, which a load expects."""
    first, second = run_ranks(2, serve_and_sleep, level, level == 2)
    for seen in (first, second):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.changed == [level == 1] * 6
    assert first.stats.cycles_failed == 0
    assert len(set(first.history[-40:])) > 3


def test_sleep_without_contents_needs_the_initial_maps() -> None:
    """Negative control of the test above."""
    assert any(seen.wrong for seen in run_ranks(2, serve_and_sleep, 2, False))


def serve_and_load_a_part(ranks: Ranks, move_back: bool) -> Seen:
    """Load some of the weights once in each phase. Here none are loaded, so all experts must be in the slots they are
    loaded into."""

    def load(model: RoutingModel, updator: EplbUpdator, seen: Seen) -> None:
        if move_back:
            updator.weights.move_back()
            seen.changed.append(updator.placement != model.placement)
        with updator.weights.loading():
            pass
        seen.wrong = seen.wrong or model.slots.wrong(updator.placement)

    return in_each_phase(ranks, load)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_part_of_the_weights_may_be_loaded_in_any_phase(num_ranks: int) -> None:
    first, *rest = run_ranks(num_ranks, serve_and_load_a_part, True)
    for seen in (first, *rest):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.changed == [False] * 6
    assert first.stats.cycles_failed == 0
    assert len(set(first.history[-40:])) > 3


def test_a_part_of_the_weights_needs_experts_moved_back() -> None:
    """Negative control: only the maps go back, as before a reload of all weights, but the experts do not."""
    with pytest.raises(Exception, match=r"copies of \d+ experts differ from each other after weights were loaded"):
        run_ranks(2, serve_and_load_a_part, False)


def serve_and_order(ranks: Ranks, folder: str, command: str) -> tuple[bool, list[int], str]:
    """Move experts back while an order waits. Returns True if they were back, the number of the last obeyed order then
    and later, and wrong slots."""
    start.LISTEN_STEPS = 4
    model, first = RoutingModel(ranks), ranks.rank == 0
    box = OrderBox(Path(folder, "order")) if first else None
    updator = start.build_updator(model, CONFIG, PatientPlanner() if first else None, orders=box)
    for _ in range(600):
        step(model, updator)
        due = updator.state.step >= updator.state.listen_at
        if due and updator.state.phase is Phase.MOVE and updator.placement != model.placement:
            break
    if box is not None:
        write_order(box.path, Order(command=command))
        box.look()
    updator.weights.move_back()
    back, orders = updator.placement == model.placement, [updator.state.order]
    for _ in range(40):
        step(model, updator)
    orders.append(updator.state.order)
    wrong = model.slots.wrong(updator.placement)
    updator.close()
    return back, orders, wrong


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_an_order_waits_until_experts_are_back(command: str, tmp_path: Path) -> None:
    assert run_ranks(2, serve_and_order, str(tmp_path), command) == [(True, [0, 1], "")] * 2


def serve_and_reapply(ranks: Ranks, folder: str, whole: bool, command: str) -> tuple[bool, str]:
    """Load other weights, or a part of them, while experts are moved, and give an order. Returns True if the placement
    of before is in force again at some later step, and wrong slots."""
    start.LISTEN_STEPS = 4
    model, first = RoutingModel(ranks), ranks.rank == 0
    box = OrderBox(Path(folder, "order")) if first else None
    updator = start.build_updator(model, CONFIG, PatientPlanner() if first else None, orders=box)
    while updator.placement == model.placement or updator.state.phase is not Phase.COLLECT:
        step(model, updator)
    before = updator.placement
    if not whole:
        updator.weights.move_back()
    with updator.weights.loading():
        if whole:
            load_others(model)
    with updator.weights.loading():  # as a reload after sleep: the initial placement is in force already
        pass
    if box is not None:
        write_order(box.path, Order(command=command))
        box.look()
    returned, wrong = False, ""
    for _ in range(120):
        step(model, updator)
        returned = returned or updator.placement == before
        wrong = wrong or model.slots.wrong(updator.placement)
    updator.close()
    return returned, wrong


@pytest.mark.parametrize("whole", [True, False])
def test_placement_of_before_returns_on_request(whole: bool, tmp_path: Path) -> None:
    """Negative control: cycles move experts elsewhere."""
    assert run_ranks(2, serve_and_reapply, str(tmp_path), whole, "reapply") == [(True, "")] * 2
    assert run_ranks(2, serve_and_reapply, str(tmp_path), whole, "cycle") == [(False, "")] * 2


def sleep_and_update(ranks: Ranks, turns: int) -> Seen:
    """In every turn: step until the turn's phase, sleep without contents, load other weights."""
    make_planners_patient()
    model, seen = RoutingModel(ranks), Seen()
    updator = start_balancer(model, CONFIG)
    for turn in range(turns):
        for number in range(1500):
            step(model, updator)
            if number >= 19 + turn % 17 and updator.state.phase is PHASES[turn % len(PHASES)]:
                break
        seen.history.append(updator.placement.digest)
        seen.loaded_in.append(int(updator.state.phase))
        seen.changed.append(updator.placement != model.placement)
        updator.weights.rest(at_start=True)
        give_memory_away(model, 2)
        load_others(model)
        with updator.weights.loading():
            pass
        seen.wrong = seen.wrong or model.slots.wrong(updator.placement)
    seen.stats = updator.stats.stats() if ranks.rank == 0 else None
    updator.close()
    return seen


@pytest.mark.parametrize("turns", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_sleep_and_new_weights_alternate(turns: int) -> None:
    first, second = run_ranks(2, sleep_and_update, turns, timeout=120 + 2 * turns)
    for seen in (first, second):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert len(seen.changed) == turns
    assert sum(first.changed) > turns / 20
    assert set(first.loaded_in) == {int(phase) for phase in PHASES}
    assert first.stats.cycles_failed == 0


def called_alone(ranks: Ranks, called: list[int]) -> Seen:
    """While all ranks step, some are called to load weights, as engines are under requests; the others wait for them in
    a forward. Later, all are called."""
    make_planners_patient()
    model, seen = RoutingModel(ranks), Seen()
    meeting = MeetingPoint(dist.group.WORLD.get_group_store(), ranks.rank, ranks.num_ranks)
    updator = start_balancer(model, CONFIG)
    for number in range(180):
        step(model, updator)
        seen.history.append(updator.placement.digest)
        seen.wrong = seen.wrong or model.slots.wrong(updator.placement)
        if number in (30, 60, 100):
            if number < 100 and ranks.rank not in called:
                continue
            seen.changed.append(meeting.meet(60.0 if number == 100 else 0.3))
            if seen.changed[-1]:
                with updator.weights.loading():
                    load_others(model)
    seen.stats = updator.stats.stats() if ranks.rank == 0 else None
    updator.close()
    return seen


@pytest.mark.parametrize("called", [[0], [1, 2]])
def test_engine_that_is_never_called_serves_on(called: list[int]) -> None:
    """The called ranks stop waiting, nothing is changed, and cycles go on. Weights are loaded when all are called."""
    first, *rest = run_ranks(3, called_alone, called)
    for rank, seen in enumerate((first, *rest)):
        assert seen.wrong == ""
        assert seen.history == first.history
        assert seen.changed == ([False, False, True] if rank in called else [True])
    assert first.stats.cycles_failed == 0
    assert len(set(first.history[30:100])) > 3
    assert len(set(first.history[101:])) > 3


def load_out_of_step(ranks: Ranks) -> Seen:
    model, seen = RoutingModel(ranks), Seen()
    updator = start_balancer(model, CONFIG)
    if ranks.rank == 1:
        updator.forward_before()
    try:
        with updator.weights.loading():
            seen.wrong = "weights were loaded"
    except StartError as error:
        seen.error = str(error)
    updator.close()
    return seen


def test_ranks_at_different_steps_do_not_load() -> None:
    for seen in run_ranks(2, load_out_of_step):
        assert seen.wrong == ""
        assert "expert-parallel rank 1 differs from rank 0 in the" in seen.error


def load_copies_that_differ(ranks: Ranks) -> str:
    model = RoutingModel(ranks)
    updator = start_balancer(model, CONFIG)
    try:
        with updator.weights.loading():
            if ranks.rank == 1:
                model.slots.stacked[0][0][-1] += 1.0  # the last slot is a second copy
    except RuntimeError as error:
        return str(error)
    finally:
        updator.close()
    return ""


def test_different_copies_after_loading_are_an_error_on_all() -> None:
    for error in run_ranks(2, load_copies_that_differ):
        assert error.startswith("copies of 1 experts differ from each other after weights were loaded")
