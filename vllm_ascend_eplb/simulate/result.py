# SPDX-License-Identifier: Apache-2.0
"""The result of a simulation: settings, conditions, outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..values.defaults import QUICK_EFFORT, TARGET_PAR
from .cost import CostModel

PolicyChoice: TypeAlias = Literal["none", "incremental", "default", "random"]


POLICY_CHOICES: tuple[PolicyChoice, ...] = ("none", "incremental", "default", "random")


MAX_SIMULATION_BYTES = 64 << 20


MAX_WINDOWS = 100_000


NO_BETTER = 0.01
"""Settings whose gains differ by less than this part count as equal; the best of them moves the fewest bytes."""


_Finite: TypeAlias = Annotated[float, Field(ge=-1e15, le=1e15)]


_Series: TypeAlias = Annotated[tuple[_Finite, ...], Field(max_length=MAX_WINDOWS)]


_Counts: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=0, le=2**50)], ...], Field(max_length=MAX_WINDOWS)]


_Table: TypeAlias = Annotated[tuple[_Series, ...], Field(max_length=4096)]


class SimulationError(ValueError):
    """Settings that cannot be simulated, or a file that is not a simulation."""


@dataclass(frozen=True)
class Setting:
    """One way to balance.

    Attributes:
        policy: "none" keeps the placement that the server starts with.
        interval: windows of the trace between two plans.
        redundant: redundant experts per layer.
        max_moves: most moves in one cycle; None for no limit.
        shares: splits an expert's tokens over its replicas by planned shares instead of evenly.
    """

    policy: PolicyChoice = "incremental"
    interval: int = 1
    redundant: int = 0
    max_moves: int | None = None
    shares: bool = False

    def describe(self) -> str:
        """The setting in a few words; +n means n redundant experts."""
        parts = [self.policy, f"+{self.redundant}"]
        if self.policy != "none" or self.shares:
            parts.insert(1, "every window" if self.interval == 1 else f"every {self.interval} windows")
        if self.max_moves is not None:
            parts.append(f"at most {self.max_moves} moves")
        if self.shares:
            parts.append("shares")
        return ", ".join(parts)


@dataclass(frozen=True)
class Conditions:
    """Conditions that all settings of a simulation share.

    Attributes:
        cost: the cost model.
        window_steps: forward steps in one window of the trace.
        delay_steps: steps from a window's end until its plan is in force.
        target_par, min_gain, effort: as in the server's settings of these names.
        num_groups: groups of consecutive experts that the policy "default" keeps on a node.
        threads: threads of the planner.
    """

    cost: CostModel
    window_steps: int = 600
    delay_steps: int = 50
    target_par: float = TARGET_PAR
    min_gain: float = 0.01
    effort: str = QUICK_EFFORT
    num_groups: int = 1
    threads: int = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Outcome(_Frozen):
    """The result of one setting. Times are in seconds; times of steps cover the MoE layers only.

    Attributes:
        policy, interval, redundant, max_moves, shares: the setting.
        par_mean, par_worst: PAR over layers by window: mean, worst layer.
        moves: experts moved after each window.
        cycles: plans carried out; skipped: plans that promised too little.
        bytes_moved: weights received over all ranks.
        bytes_between_nodes: the part of it that crosses nodes.
        step_seconds: time of an average step. saved_seconds: time saved over all steps of the trace, against the start
            placement without redundancy.
        receive_seconds: time in which the busiest ranks received experts; it overlaps with steps.
        commit_seconds: time in which experts were copied into their slots; steps wait for it.
        net_seconds: saved - commit - exposed part of receive.
        planner_seconds: time of planning on this machine; a server plans beside the steps.
    """

    policy: PolicyChoice
    interval: Annotated[int, Field(ge=1, le=MAX_WINDOWS)]
    redundant: Annotated[int, Field(ge=0, le=2**31)]
    max_moves: Annotated[int, Field(ge=0, le=2**50)] | None
    shares: bool
    par_mean: _Series
    par_worst: _Series
    moves: _Counts
    cycles: Annotated[int, Field(ge=0, le=MAX_WINDOWS)]
    skipped: Annotated[int, Field(ge=0, le=MAX_WINDOWS)]
    bytes_moved: _Finite
    bytes_between_nodes: _Finite
    step_seconds: _Finite
    saved_seconds: _Finite
    receive_seconds: _Finite
    commit_seconds: _Finite
    net_seconds: _Finite
    planner_seconds: _Finite

    @property
    def setting(self) -> Setting:
        return Setting(self.policy, self.interval, self.redundant, self.max_moves, self.shares)

    @property
    def mean_par(self) -> float:
        return float(np.mean(self.par_mean)) if self.par_mean else 1.0

    @property
    def total_moves(self) -> int:
        return sum(self.moves)


class Simulation(_Frozen):
    """Outcomes of one trace, and the tables that the report shows of the best one.

    Attributes:
        kind: constant that marks the file; version: version of the package that wrote it.
        trace: name of the trace; num_windows, num_layers, num_experts: T, L, E.
        num_ranks, num_nodes: R and N. machine, machine_source, model: of the cost model.
        expert_bytes: bytes of one expert in one layer. batch: tokens that each rank brings into a step.
        window_steps, exposed: steps of a window; part of the transfer time that steps are assumed to wait for.
        interrupted: whether some settings were not tried.
        baseline_step_seconds: time of an average step with the start placement and no redundancy.
        baseline_par_mean, baseline_par_worst: PAR over layers by window with that placement.
        outcomes: best first, by net_seconds.
        expert_load: [L][E] load of each expert over the layer's mean, over the whole trace.
        rank_load_before, rank_load_after: [L][R] load of ranks over the mean in the last window, with the start
            placement and with the best setting's.
        replicas: [L][E] copies of each expert at the end of the best setting.
    """

    kind: Literal["vllm-ascend-eplb simulation"] = "vllm-ascend-eplb simulation"
    version: Annotated[str, Field(max_length=100)] = ""
    trace: Annotated[str, Field(max_length=500)] = ""
    num_windows: Annotated[int, Field(ge=1, le=MAX_WINDOWS)]
    num_layers: Annotated[int, Field(ge=1, le=4096)]
    num_experts: Annotated[int, Field(ge=1, le=65536)]
    num_ranks: Annotated[int, Field(ge=1, le=65536)]
    num_nodes: Annotated[int, Field(ge=1, le=65536)]
    machine: Annotated[str, Field(max_length=300)] = ""
    machine_source: Annotated[str, Field(max_length=1000)] = ""
    model: Annotated[str, Field(max_length=300)] = ""
    expert_bytes: _Finite = 0.0
    batch: _Finite = 0.0
    window_steps: Annotated[int, Field(ge=1, le=2**40)] = 1
    exposed: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    interrupted: bool = False
    seconds: _Finite = 0.0
    baseline_step_seconds: _Finite = 0.0
    baseline_par_mean: _Series = ()
    baseline_par_worst: _Series = ()
    outcomes: Annotated[tuple[Outcome, ...], Field(max_length=10_000)] = ()
    expert_load: _Table = ()
    rank_load_before: _Table = ()
    rank_load_after: _Table = ()
    replicas: Annotated[tuple[_Counts, ...], Field(max_length=4096)] = ()

    @property
    def best(self) -> Outcome | None:
        """The outcome that moves the fewest bytes among those that save most, within ``NO_BETTER``."""
        return best_outcome(self.outcomes)

    def eplb_config(self) -> dict[str, object] | None:
        """The ``eplb_config`` of the best setting for a server; None if the best is not to balance."""
        best = self.best
        if best is None or best.policy == "none":
            return None
        config: dict[str, object] = {
            "dynamic_eplb": True,
            "policy": best.policy,
            "expert_heat_collection_interval": best.interval * self.window_steps,
            "num_redundant_experts": best.redundant,
        }
        if best.max_moves is not None:
            config["max_moves_per_cycle"] = best.max_moves
        if best.shares:
            config["weighted_dispatch"] = True
        return config

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Simulation:
        """Reads what :meth:`to_json` wrote.

        Raises:
            SimulationError: the text is not a simulation.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the text"
            raise SimulationError(f"not a simulation: {where}: {first['msg']}") from None


def best_outcome(outcomes: Sequence[Outcome]) -> Outcome | None:
    if not outcomes:
        return None
    most = max(outcome.net_seconds for outcome in outcomes)
    return min(
        (outcome for outcome in outcomes if outcome.net_seconds >= most - NO_BETTER * abs(most)),
        key=lambda outcome: (outcome.bytes_moved, -outcome.net_seconds),
    )
