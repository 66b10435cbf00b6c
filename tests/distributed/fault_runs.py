# SPDX-License-Identifier: Apache-2.0
"""Run ranks under one fault: they step as an engine does, and a fault object acts around their steps."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch.distributed as dist
from prometheus_client import CollectorRegistry, generate_latest

from vllm_ascend_eplb.agreement.channel import ControlError
from vllm_ascend_eplb.agreement.phases import AgreementError, Phase
from vllm_ascend_eplb.balancer.start import build_updator
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.observe.prometheus import EplbGauges
from vllm_ascend_eplb.planning import process as process_module
from vllm_ascend_eplb.planning.request import plan_request
from vllm_ascend_eplb.settings.config import EplbConfig

from .pace import PatientPlanner, settle
from .ranks import Ranks, run_ranks
from .routing_model import REDUNDANT, RoutingModel
from .routing_model import Seen as _Seen

BUSY = {
    "dynamic_eplb": True,
    "num_redundant_experts": REDUNDANT,
    "expert_heat_collection_interval": 4,
    "algorithm_execution_interval": 1,
    "min_gain": 0.0,
    "policy": "random",  # every cycle moves most experts
}


class Seen(_Seen):
    """``Seen`` with the log as (level, text), the final metrics and the steps at which slots were wrong."""

    log: list[tuple[str, str]]
    metrics: dict[str, float]
    starts: int = 0
    planner_left: bool = False
    steps_after_off: int = 0
    wrong_at: list[int]

    @property
    def results(self) -> list[str]:
        return [cycle.result for cycle in self.stats.cycles]

    def said(self, level: str, part: str = "") -> list[str]:
        return [text for logged, text in self.log if logged == level and part in text]


class Fault:
    """A planted fault. Every rank has one. ``before`` and ``after`` run around every step of the balancer, and ``over``
    ends the run at the same step on all ranks."""

    settings: ClassVar[dict[str, Any]] = {}
    policy = staticmethod(plan_request)
    planner_timeout = 120.0
    cycles = 4
    most_steps = 3000
    deadline = 300.0
    restart_seconds: tuple[float, ...] = process_module.RESTART_SECONDS
    """Pauses before the planner starts again."""
    damages = False
    """True if the fault changes weights itself."""
    settles = True
    """True if every step waits until the requested plan and the issued rounds have arrived."""

    def __init__(self, ranks: Ranks, updator: EplbUpdator, model: RoutingModel) -> None:
        self.ranks, self.updator, self.model = ranks, updator, model
        self.step = 0
        process_module.RESTART_SECONDS = self.restart_seconds

    @property
    def phase(self) -> Phase:
        return self.updator.state.phase

    @property
    def cycle(self) -> int:
        return self.updator.state.cycle

    @property
    def planner(self) -> PatientPlanner | None:
        return self.updator.parts.planner

    def forward(self) -> dict[str, Any]:
        return {}

    def before(self) -> None: ...

    def after(self) -> None: ...

    def forward_begins(self) -> None:
        """Called at the point of the forward where the ranks of an engine meet."""

    def over(self) -> bool:
        return self.cycle > self.cycles


def serve(ranks: Ranks, kind: type[Fault]) -> Seen:
    """Step as an engine does, with one forward per step, until the fault is over."""
    log: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append((record.levelname, record.getMessage()))

    logger = logging.getLogger("vllm.eplb")
    logger.addHandler(Keep())
    logger.setLevel(logging.INFO)
    model = RoutingModel(ranks)
    config = EplbConfig.from_additional_config({"eplb_config": {**BUSY, **kind.settings}})
    planner = PatientPlanner(kind.policy, timeout=kind.planner_timeout) if ranks.rank == 0 else None
    updator = build_updator(model, config, planner)
    updator.parts.loader.deadline = kind.deadline
    fault = kind(ranks, updator, model)
    seen = Seen()
    seen.wrong_at = []
    off_at = None
    try:
        for step in range(kind.most_steps):
            fault.step = step
            fault.before()
            updator.forward_before(**fault.forward())
            model.forward()
            updator.forward_end()
            fault.after()
            seen.history.append(updator.placement.digest)
            wrong = model.slots.wrong(updator.placement)
            if wrong:
                seen.wrong_at.append(step)
            if not kind.damages:
                seen.wrong = seen.wrong or wrong
            fault.forward_begins()
            dist.barrier()  # a forward's collectives keep the ranks together
            if fault.settles:
                settle(updator)
            if off_at is None and updator.state.phase is Phase.OFF:
                off_at = step
            if fault.over() or (off_at is not None and step > off_at + 50):
                break
    except (AgreementError, ControlError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.phase, seen.step = updator.state.phase.name, updator.state.step
    seen.steps_after_off = 0 if off_at is None else step - off_at
    if planner is not None:
        updator.stats.planner_starts = planner.starts
        seen.stats = updator.stats.stats()
        registry = CollectorRegistry()
        EplbGauges(registry).show(seen.stats)
        lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
        seen.metrics = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    updator.close()
    seen.planner_left = planner is not None and planner.pid is not None
    seen.log = log
    return seen


def run(fault: type[Fault], num_ranks: int = 2, timeout: float = 120) -> Seen:
    """Run the fault, check that all ranks agree and hold correct weights, and return the observations of EP rank 0."""
    return run_all(fault, num_ranks, timeout)[0]


def run_all(fault: type[Fault], num_ranks: int = 2, timeout: float = 120) -> list[Seen]:
    all_seen = run_ranks(num_ranks, serve, fault, timeout=timeout)
    first = all_seen[0]
    for seen in all_seen:
        assert seen.wrong == ""
        assert seen.error == ""
        assert seen.history == first.history
        assert seen.phase == first.phase
        assert not seen.planner_left
    return all_seen
