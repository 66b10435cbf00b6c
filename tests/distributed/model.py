# SPDX-License-Identifier: Apache-2.0
"""Expert weights that identify their expert, and a small driver of whole cycles."""

from __future__ import annotations

import functools
import hashlib
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_ascend_eplb.agreement.channel import ControlChannel, Facts, FlightRecorder
from vllm_ascend_eplb.agreement.phases import CycleSettings, CycleState, Do, Failure, Phase
from vllm_ascend_eplb.agreement.transition import advance
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.transfer.transport import Transport
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import Plan
from vllm_ascend_eplb.values.rounds import check_rounds, rounds_from_array, rounds_to_array
from vllm_ascend_eplb.values.topology import Topology

from .faulty import FaultyTransport, interpose


def random_placement(rng: np.random.Generator, layers: int, experts: int, ranks: int, slots: int) -> Placement:
    """A random placement: every expert has a slot, the spare slots hold random experts, all slots are shuffled."""
    spare = ranks * slots - experts
    rows = [rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, spare)]) for _ in range(layers)]
    return Placement(np.array(rows), experts, ranks)


@functools.cache
def expert_tensors(layer: int, expert: int) -> list[torch.Tensor]:
    """The tensors of an expert: float weights, int8 weights, scales, in odd layers a bias. Shapes differ by layer."""
    rng = np.random.default_rng(1000 * layer + expert)
    tensors = [
        torch.from_numpy(rng.standard_normal((4 + layer % 3, 512)).astype(np.float32)),
        torch.from_numpy(rng.integers(-128, 128, (6, 5)).astype(np.int8)),
        torch.from_numpy(rng.standard_normal((3,)).astype(np.float32)).to(torch.bfloat16),
    ]
    if layer % 2:
        tensors.append(torch.from_numpy(rng.standard_normal((1,))))
    return tensors


class Slots:
    """This rank's slots: per layer and kind one tensor [S, ...], as in vLLM. ``first_layer`` gives different models
    different weights."""

    def __init__(self, placement: Placement, rank: int, device: str = "cpu", first_layer: int = 0) -> None:
        self.rank, self.size, self.first_layer = rank, placement.slots_per_rank, first_layer
        self.stacked: list[list[torch.Tensor]] = []
        for layer in range(placement.num_layers):
            mine = placement.physical_to_logical[layer, rank * self.size : (rank + 1) * self.size]
            experts = [expert_tensors(first_layer + layer, int(expert)) for expert in mine]
            self.stacked.append([torch.stack(kind).to(device) for kind in zip(*experts, strict=True)])

    def load(self, placement: Placement, first_layer: int) -> None:
        """Load other weights in place, in the slots of ``placement``."""
        self.first_layer = first_layer
        fresh = Slots(placement, self.rank, first_layer=first_layer)
        for mine, target in zip(self.stacked, fresh.stacked, strict=True):
            for kind, value in zip(mine, target, strict=True):
                kind.copy_(value)

    def views(self) -> list[list[list[torch.Tensor]]]:
        return [[[kind[slot] for kind in layer] for slot in range(self.size)] for layer in self.stacked]

    def digest(self) -> str:
        """A hash of all bytes."""
        tensors = (kind.cpu().contiguous().view(torch.uint8).numpy() for layer in self.stacked for kind in layer)
        return hashlib.sha256(b"".join(tensor.tobytes() for tensor in tensors)).hexdigest()

    def wrong(self, placement: Placement) -> str:
        """First slot that differs bit for bit from ``placement``; empty if all agree."""
        for layer, kinds in enumerate(self.stacked):
            for slot in range(self.size):
                expert = int(placement.physical_to_logical[layer, self.rank * self.size + slot])
                tensors = expert_tensors(self.first_layer + layer, expert)
                for number, (kind, tensor) in enumerate(zip(kinds, tensors, strict=True)):
                    if not torch.equal(kind[slot].cpu().view(torch.uint8), tensor.view(torch.uint8)):
                        return f"rank {self.rank}: layer {layer}, slot {slot}, tensor {number} is not expert {expert}'s"
        return ""


@dataclass
class Trouble:
    """Planted faults with their probabilities per occasion."""

    step_delay: float = 0.0  # seconds a step may take longer on one rank than on another
    message_delay: float = 0.0  # most seconds that a batch is delayed in the mover thread
    planner_steps: int = 3  # most steps until rank 0 has a plan
    prepare_fails: float = 0.0
    damage: float = 0.0  # staging is damaged after arrival
    leave_slots: bool = False  # switch maps without moving weights: the negative control


@dataclass
class Outcome:
    """Observations of one rank.

    Attributes:
        history: digest of the placement in force after every step.
        commits, cycles, drops: counts.
        wrong: the first slot that held wrong weights; empty if none did.
    """

    history: list[int] = field(default_factory=list)
    commits: int = 0
    cycles: int = 0
    drops: int = 0
    resends: int = 0
    phase: int = Phase.COLLECT
    failure: int = 0
    wrong: str = ""
    longest_read: float = 0.0


class LateAndDamaged(FaultyTransport):
    """Delays batches and damages arriving tensors, at random."""

    def __init__(self, real: Transport, luck: random.Random, trouble: Trouble) -> None:
        super().__init__(real)
        self.luck, self.trouble = luck, trouble

    def running(self) -> None:
        if self.trouble.message_delay:
            time.sleep(self.luck.random() * self.trouble.message_delay)

    def arrived(self, received: list[torch.Tensor]) -> None:
        if received and self.luck.random() < self.trouble.damage:
            received[0][:1] += 1


class Driver:
    """Runs cycles as EplbUpdator does: facts, agreement, transition, actions. Plans are random placements."""

    def __init__(
        self,
        ranks: Any,
        shape: tuple[int, int, int],
        trouble: Trouble,
        seed: int,
        lag: int,
        buffers: int,
        device: str = "cpu",
        **loader: Any,
    ) -> None:
        layers, experts, slots = shape
        self.ranks, self.trouble, self.lag = ranks, trouble, lag
        self.random = random.Random(f"{seed}-{ranks.rank}")  # different on every rank
        self.rng = np.random.default_rng(seed)  # the planner's
        self.shape = shape
        self.topology = Topology(tuple(rank // 2 for rank in range(ranks.num_ranks)))
        self.placement = random_placement(np.random.default_rng(seed + 1), layers, experts, ranks.num_ranks, slots)
        self.slots = Slots(self.placement, ranks.rank, device)
        self.loader = D2DExpertWeightLoader(
            self.slots.views(), ranks.transfer, ranks.rank, 2, buffers=buffers, topology=self.topology, **loader
        )
        assert self.loader.learn_checksums(self.placement) == 0
        self.loader.warm_up()
        interpose(self.loader, LateAndDamaged, self.random, trouble)
        self.channel = ControlChannel(ranks.control, ranks.rank, ranks.num_ranks, lag)
        self.settings = CycleSettings(
            collect_steps=12 + 8 * lag,
            execution_steps=2,
            first_collect_steps=2,
            max_failures=1000,
            buffers=buffers,
            max_resends=50,
        )
        self.state = CycleState.start(self.settings)
        self.flight = FlightRecorder()
        self.outcome = Outcome()
        self._clear()

    def _clear(self) -> None:
        self.failure = Failure.NONE
        self.rounds: list[Any] = []
        self.prepared = 0
        self.bulk: Any = None
        self.message = b""
        self.plan_due = 0

    def run(self, cycles: int, most_steps: int = 10_000_000) -> Outcome:
        """Step until ``cycles`` cycles are complete; all ranks take the same number of steps."""
        while self.outcome.cycles < cycles and self.state.step < most_steps and self.state.phase is not Phase.OFF:
            if self.trouble.step_delay:
                time.sleep(self.random.random() * self.trouble.step_delay)
            self.step()
        self.outcome.phase, self.outcome.failure = int(self.state.phase), int(self.state.failure)
        self.outcome.longest_read = self.channel.waiting.longest
        return self.outcome

    def step(self) -> None:
        self.loader.tick()
        facts = agreed = None
        if self.state.active:
            facts = self.facts()
            self.channel.post(facts)
            agreed = self.channel.read()
        resends = self.state.resends
        self.state, actions = advance(self.state, agreed, self.settings)
        self.outcome.resends += self.state.resends > resends
        self.flight.record(self.state.phase, facts, agreed)
        for action in actions:
            self.perform(action)
        self.outcome.history.append(self.placement.digest)

    def facts(self) -> Facts:
        phase, ready = self.state.phase, True
        if phase is Phase.SNAPSHOT:
            ready = not self.channel.bulk_busy  # as in the balancer: a dropped cycle's broadcast may still be under way
        elif phase in (Phase.REDUCE, Phase.BROADCAST):
            ready = self.bulk is not None and self.bulk.done()
            if ready and phase is Phase.BROADCAST and not self.rounds:
                array = np.frombuffer(self.bulk.result(), dtype=np.int32).reshape(-1, 7)
                self.rounds = rounds_from_array(array, self.placement.slots_per_rank)
                check_rounds(self.placement, self.rounds, self.loader.buffer_experts)
                for number in range(min(self.settings.buffers, len(self.rounds))):
                    self.prepare(number)
            if phase is Phase.BROADCAST and self.rounds:
                ready = self.prepared > 0 and self.loader.ready(0)
        has_plan = self.ranks.rank == 0 and phase is Phase.PLAN and self.state.step >= self.plan_due
        ready_rounds = self.prepared
        while ready_rounds and not self.loader.ready(ready_rounds - 1):
            ready_rounds -= 1
        return Facts(
            step=self.state.step,
            epoch=self.state.epoch,
            placement=self.placement.digest,
            ready=int(ready),
            failure=self.failure,
            poisoned=int(self.loader.poisoned),
            plan_number=self.state.cycle if has_plan else 0,
            plan_length=len(self.message) if has_plan else 0,
            plan_digest=1 if has_plan else 0,
            rounds=len(self.rounds),
            rounds_ready=max(ready_rounds, self.state.committed),
            rounds_done=self.loader.rounds_done,
            rounds_intact=self.loader.rounds_intact,
        )

    def perform(self, action: Any) -> None:
        if action.do is Do.SNAPSHOT:
            self._clear()
        elif action.do is Do.REDUCE:
            self.bulk = self.channel.reduce_load(np.full((2, 3), self.ranks.rank + 1, dtype=np.int64))
        elif action.do is Do.REQUEST_PLAN:
            total = self.bulk.result()
            if self.ranks.rank == 0:
                assert (total == self.ranks.num_ranks * (self.ranks.num_ranks + 1) // 2).all()
                self.make_plan()
        elif action.do is Do.BROADCAST:
            self.bulk = self.channel.broadcast(self.message or None, self.state.plan_length)
        elif action.do is Do.PREPARE:
            self.prepare(action.round)
        elif action.do is Do.ISSUE:
            self.loader.issue(action.round)
        elif action.do is Do.COMMIT:
            self.commit(action.round)
        elif action.do in (Do.FINISH, Do.DROP):
            self.outcome.cycles += action.do is Do.FINISH
            self.outcome.drops += action.do is Do.DROP
            self.loader.forget()
            self._clear()
        elif action.do is Do.SWITCH_OFF:
            self.loader.forget()

    def prepare(self, number: int) -> None:
        if self.random.random() < self.trouble.prepare_fails:
            self.failure = Failure.PREPARE
            return
        self.loader.prepare(self.rounds[number])
        self.prepared = number + 1

    def make_plan(self) -> None:
        layers, experts, slots = self.shape
        target = random_placement(self.rng, layers, experts, self.ranks.num_ranks, slots).physical_to_logical.copy()
        stay = self.rng.random(layers) < 0.3
        target[stay] = self.placement.physical_to_logical[stay]
        plan = Plan.between(self.placement, target, np.ones((layers, experts)))
        rounds = schedule_rounds(self.placement, plan.moves, self.topology, self.loader.buffer_experts)
        self.message = rounds_to_array(rounds).tobytes()
        self.plan_due = self.state.step + self.random.randint(0, self.trouble.planner_steps)

    def commit(self, number: int) -> None:
        before = [[kind.clone() for kind in layer] for layer in self.slots.stacked] if self.trouble.leave_slots else []
        self.loader.commit(number)
        for layer, old in zip(self.slots.stacked, before, strict=False):
            for kind, tensor in zip(layer, old, strict=True):
                kind.copy_(tensor)
        self.placement = self.placement.with_moves(self.rounds[number].moves)
        self.outcome.commits += 1
        self.outcome.wrong = self.outcome.wrong or self.slots.wrong(self.placement)
