# SPDX-License-Identifier: Apache-2.0
"""Requests to the planner's process, its answers, and the loop that answers them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..values.placement import Placement, peak_to_average
from ..values.plan import Plan
from ..values.rounds import rounds_to_array
from ..values.topology import Topology
from .options import PlanOptions
from .schedule import schedule_rounds


@dataclass(frozen=True)
class Rebalance:
    """A task: find a placement with better balance.

    Attributes:
        policy: "incremental", "default" or "random".
        options: of the policy "incremental".
        rank_speed: [R], relative speeds of the ranks; None where they are equal.
    """

    policy: str = "incremental"
    options: PlanOptions = field(default_factory=PlanOptions)
    rank_speed: Sequence[float] | None = None


@dataclass(frozen=True)
class Restore:
    """A task: move every expert to its slot in ``target`` (int32 [L, P]), whatever the load."""

    target: npt.NDArray[np.int32]


@dataclass(frozen=True)
class PlanRequest:
    """A request to the planner. Plain values and arrays only: it is pickled to the child.

    Attributes:
        number: number of the cycle; the answer has it, too.
        load: int64 [T, L, E], tokens per window, layer and logical expert.
        physical_to_logical: int32 [L, P], the placement in force.
        num_experts: logical experts per layer.
        node_of_rank: the node of each rank.
        num_groups: groups of experts that the model routes by; 1 without groups.
        buffer_experts: staging places of a rank per round.
        task: what the plan is for.
        dispatch_entries: entries K of a row of the dispatch tables; 0 where tokens are split evenly.
    """

    number: int
    load: npt.NDArray[np.int64]
    physical_to_logical: npt.NDArray[np.int32]
    num_experts: int
    node_of_rank: tuple[int, ...]
    num_groups: int = 1
    buffer_experts: int = 1
    task: Rebalance | Restore = Rebalance()
    dispatch_entries: int = 0

    @property
    def placement(self) -> Placement:
        return Placement(self.physical_to_logical, self.num_experts, len(self.node_of_rank))


@dataclass(frozen=True)
class Dispatch:
    """How the slots of a placement share their experts' tokens.

    Attributes:
        counts: uint8 [L, P], entries of its expert's table row that each slot gets.
        par: float64 [L], PAR of the planner's load with these shares.
    """

    counts: npt.NDArray[np.uint8]
    par: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlanAnswer:
    """The planner's answer: a plan cut into rounds, or an error.

    Attributes:
        number: number of the request.
        plan: None if there is an error.
        rounds: int32 [N, 7], the plan's moves as ``rounds.rounds_to_array`` packs them.
        dispatch_now, dispatch_after: the best shares for the placement in force, and for the one that the plan leads
            to; None where tokens are split evenly.
        error: what went wrong, in words.
        died: whether the process ended without an answer.
    """

    number: int
    plan: Plan | None = None
    rounds: npt.NDArray[np.int32] | None = None
    dispatch_now: Dispatch | None = None
    dispatch_after: Dispatch | None = None
    error: str = ""
    died: bool = False


def serve(requests: Any, answers: Any, policy: Callable[[PlanRequest], Plan]) -> None:
    """The child's loop: one answer for each request, for ever. An exception of the policy is an answer, too."""
    while True:
        request = requests.get()
        began = time.perf_counter()
        try:
            made = policy(request)
            start = request.placement
            rounds = schedule_rounds(start, made.moves, Topology(request.node_of_rank), request.buffer_experts)
            target = Placement(made.physical_to_logical, request.num_experts, len(request.node_of_rank))
            now, after = best_dispatch(request, start), best_dispatch(request, target)
            seconds = time.perf_counter() - began
            answer = PlanAnswer(request.number, replace(made, seconds=seconds), rounds_to_array(rounds), now, after)
        except Exception as error:
            answer = PlanAnswer(request.number, error=f"{type(error).__name__}: {error}")
        answers.put(answer)


def plan_request(request: PlanRequest) -> Plan:
    """Answers a request with this package's planner."""
    from . import plan

    task = request.task
    if isinstance(task, Restore):
        return Plan.between(request.placement, task.target, request.load.sum(axis=0), policy="restore")
    topology = Topology(request.node_of_rank)
    return plan(
        request.load,
        request.physical_to_logical,
        topology.num_ranks,
        num_nodes=topology.num_blocks,
        num_groups=request.num_groups,
        policy=task.policy,
        rank_speed=task.rank_speed,
        **asdict(task.options),
    )


def best_dispatch(request: PlanRequest, placement: Placement) -> Dispatch | None:
    """The shares that give the busiest rank of ``placement`` the least load, as entries of the request's tables."""
    if not request.dispatch_entries:
        return None
    from .shares import dispatch_shares, entry_counts, shared_rank_load

    load = request.load.sum(axis=0)
    shares = dispatch_shares(load, placement, placement.num_ranks)
    counts = entry_counts(placement, shares, request.dispatch_entries)
    rank_load = shared_rank_load(load, placement, counts / request.dispatch_entries, placement.num_ranks)
    return Dispatch(counts.astype(np.uint8), peak_to_average(rank_load))
