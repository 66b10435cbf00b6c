# SPDX-License-Identifier: Apache-2.0
"""A model and its draft model: two balancers with separate states share the steps and the process groups."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from vllm_ascend_eplb.agreement.exchange import StartError
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.transport import TransferError, Transport

from .faulty import FaultyTransport, interpose
from .pace import make_planners_patient, settle
from .ranks import Ranks, run_ranks
from .routing_model import RoutingModel

pytestmark = pytest.mark.distributed

SHAPES = ((3, 12), (2, 6))
"""(layers, experts) of the model and of the draft model."""

CONFIG = EplbConfig.from_additional_config(
    {
        "eplb_config": {
            "dynamic_eplb": True,
            "num_redundant_experts": 6,
            "expert_heat_collection_interval": 6,
            "algorithm_execution_interval": 1,
            "policy": "random",
            "min_gain": 0.0,
            "transfer_buffer_experts": 2,  # many rounds, so that both models have rounds under way at the same time
        }
    }
)


@dataclass
class Seen:
    """Observations of one rank. ``history``: (step, phase, placement) of each model, per step."""

    history: list[tuple[tuple[int, int, int], ...]] = field(default_factory=list)
    wrong: str = ""
    done: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    damaged: bool = False
    tokens: tuple[int, ...] = ()


def models(ranks: Ranks) -> list[RoutingModel]:
    return [
        RoutingModel(ranks, layers=layers, experts=experts, part=part, channel=channel)
        for channel, ((layers, experts), part) in enumerate(zip(SHAPES, ("", "drafter"), strict=True))
    ]


class HeldBack(FaultyTransport):
    """Starts every transfer 50 ms late if ``late``. Without ``own_tags`` all messages have the same tag, whatever their
    model and round."""

    def __init__(self, real: Transport, late: bool, own_tags: bool) -> None:
        super().__init__(real)
        self.late, self.own_tags = late, own_tags

    def issuing(self, serial: int) -> int:
        return serial if self.own_tags else 0

    def running(self) -> None:
        time.sleep(0.05 if self.late else 0.0)


def serve_two(ranks: Ranks, cycles: int, own_tags: bool = True) -> Seen:
    make_planners_patient()
    both = models(ranks)
    updators = [start_balancer(model, CONFIG) for model in both]
    for number, updator in enumerate(updators):
        # ranks begin with different models, so that messages of both cross
        interpose(updator.parts.loader, HeldBack, (ranks.rank + number) % 2 == 1, own_tags)
    seen = Seen()
    while min(updator.state.cycle for updator in updators) <= cycles and len(seen.history) < 2000:
        for updator in updators:
            updator.forward_before()
        for model, updator in zip(both, updators, strict=True):
            model.forward()
            updator.forward_end()
        seen.history.append(
            tuple((updator.state.step, int(updator.state.phase), updator.placement.digest) for updator in updators)
        )
        seen.damaged = seen.damaged or any(updator.state.resends for updator in updators)
        for model, updator in zip(both, updators, strict=True):
            seen.wrong = seen.wrong or model.slots.wrong(updator.placement)
        dist.barrier()  # a forward's collectives keep the ranks together
        for updator in updators:
            settle(updator)
    stats = [updator.stats.stats() for updator in updators]
    seen.done = tuple(model.cycles_done for model in stats)
    seen.failed = tuple(model.cycles_failed for model in stats)
    seen.damaged = seen.damaged or any(updator.parts.loader.poisoned for updator in updators)
    seen.tokens = tuple(model.window.tokens if model.window else 0 for model in stats)
    for updator in updators:
        updator.close()
    return seen


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_two_models_balance_separately_on_shared_groups(num_ranks: int) -> None:
    first, *rest = run_ranks(num_ranks, serve_two, 6)
    for seen in (first, *rest):
        assert seen.wrong == ""
        assert seen.history == first.history
    assert min(first.done) >= 5
    assert first.failed == (0, 0)
    for (step, _, placement), (draft_step, _, draft_placement) in first.history:
        assert step == draft_step  # one step counter
        assert placement != draft_placement  # two states
    phases = {(a[1], b[1]) for a, b in first.history}
    assert (Phase.MOVE, Phase.MOVE) in phases  # rounds of both were under way at the same time
    assert len({a for a, _ in phases} | {b for _, b in phases}) >= 5
    assert first.tokens[0] % (64 * SHAPES[0][0]) == 0
    assert first.tokens[1] % (64 * SHAPES[1][0]) == 0


def test_messages_of_two_models_with_the_same_tags_mix_up() -> None:
    """Negative control of the test above: without tags of their own the models receive each other's experts."""

    def check() -> None:
        all_seen = run_ranks(2, serve_two, 6, False)
        if any(seen.damaged or sum(seen.failed) for seen in all_seen):
            raise RuntimeError("a round arrived damaged")

    # Gloo aborts a process that gets a longer message than expected; a shorter message has the wrong checksum
    with pytest.raises(RuntimeError, match=r"died|damaged"):
        check()


def start_in_another_order(ranks: Ranks) -> str:
    both = models(ranks)
    for model in both if ranks.rank == 0 else reversed(both):
        try:
            start_balancer(model, CONFIG).close()
        except StartError as error:
            return str(error)
    return ""


def test_models_in_different_order_by_rank_do_not_start() -> None:
    for error in run_ranks(2, start_in_another_order):
        assert (
            "expert-parallel rank 1 differs from rank 0 in layers, experts, slots: (2, 6, 12) against (3, 12, 18)"
            in error
        )


def start_on_channel(ranks: Ranks, channel: int) -> str:
    try:
        start_balancer(RoutingModel(ranks, channel=channel), CONFIG).close()
    except TransferError as error:
        return str(error)
    return ""


def test_channel_out_of_range_is_refused() -> None:
    assert run_ranks(2, start_on_channel, 4) == ["channel 4; allowed are 0..3"] * 2
