# SPDX-License-Identifier: Apache-2.0
"""The plans of benchmarks/stall.py: to a second placement and back, in cycles of the same size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_ascend_eplb import Placement, Plan
from vllm_ascend_eplb.planning.request import PlanAnswer, PlanRequest
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.values.rounds import Round, rounds_to_array
from vllm_ascend_eplb.values.topology import Topology


@dataclass(frozen=True)
class Exchange:
    """A change of placement and the way back, both as swaps of two slots on different ranks, each a group of its own.

    Attributes:
        start, target: the two placements.
        there, back: int32 [M, 4], moves as in a plan.
    """

    start: Placement
    target: Placement
    there: npt.NDArray[np.int32]
    back: npt.NDArray[np.int32]

    @classmethod
    def of(cls, start: Placement, share: float, layers: int, seed: int) -> Exchange:
        """Moves about ``share`` of all slots of the first ``layers`` layers."""
        rng, size, ranks = np.random.default_rng(seed), start.slots_per_rank, start.num_ranks
        there, back = [], []
        for layer in range(layers):
            free = [list(rng.permutation(size) + rank * size) for rank in range(ranks)]
            for _ in range(max(1, round(share * start.num_slots / 2))):
                first, second = rng.permutation([rank for rank in range(ranks) if free[rank]])[:2]
                a, b = int(free[first].pop()), int(free[second].pop())
                held_a, held_b = (int(start.physical_to_logical[layer, slot]) for slot in (a, b))
                group = len(there) // 2
                there += [(layer, a, held_b, group), (layer, b, held_a, group)]
                back += [(layer, a, held_a, group), (layer, b, held_b, group)]
        moves = np.array(there, dtype=np.int32)
        return cls(start, start.with_moves(moves), moves, np.array(back, dtype=np.int32))

    def rounds(self, begin: Placement, topology: Topology, buffer: int) -> list[Round]:
        moves = self.there if begin == self.start else self.back
        return schedule_rounds(begin, moves, topology, buffer)

    def plan(self, begin: Placement) -> Plan:
        """A plan with a large predicted gain, so that it is carried out."""
        after, moves = (self.target, self.there) if begin == self.start else (self.start, self.back)
        layers = begin.num_layers
        return Plan(after.physical_to_logical, moves, np.full(layers, 2.0), np.full(layers, 1.0), "fixed")


class FixedPlanner:
    """Answers at once with fixed plans: to the second placement and back, ``allowed`` times; then nothing moves."""

    def __init__(self, exchange: Exchange, topology: Topology, buffer: int) -> None:
        self._answers = {
            begin.digest: (exchange.plan(begin), rounds_to_array(exchange.rounds(begin, topology, buffer)))
            for begin in (exchange.start, exchange.target)
        }
        layers = exchange.start.num_layers
        even = np.ones(layers)
        nothing = Plan(exchange.start.physical_to_logical, np.zeros((0, 4), dtype=np.int32), even, even, "fixed")
        self._nothing = nothing, np.zeros((0, 7), dtype=np.int32)
        self._request: PlanRequest | None = None
        self.allowed = 0
        self.starts = 1

    def submit(self, request: PlanRequest) -> None:
        self._request = request

    def answer(self, number: int) -> PlanAnswer | None:
        request = self._request
        if request is None or request.number != number:
            return None
        self._request = None
        if not self.allowed:
            return PlanAnswer(number, *self._nothing)
        self.allowed -= 1
        return PlanAnswer(number, *self._answers[request.placement.digest])

    def close(self, wait: float | None = None) -> None:
        pass


def rounds_of(exchange: Exchange, loader: D2DExpertWeightLoader) -> tuple[int, int]:
    """Rounds there and back."""
    there, back = (
        len(exchange.rounds(begin, loader.topology, loader.buffer_experts))
        for begin in (exchange.start, exchange.target)
    )
    return there, back


def bound_of(exchange: Exchange, loader: D2DExpertWeightLoader) -> int:
    """Rounds that the busiest rank's receives need at least."""
    receives = np.bincount(exchange.there[:, 1] // loader.slots_per_rank)
    return -(-int(receives.max()) // loader.buffer_experts)
