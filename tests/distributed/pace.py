# SPDX-License-Identifier: Apache-2.0
"""Steps without clocks: a rank goes on to the next step as soon as its background work has done what it can, so that
what a test sees depends on steps and on events, not on how fast the machine is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.planning import process as process_module
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.planning.request import PlanRequest

from .ranks import SIGNALS

MOST_SECONDS = 240.0
"""After which a test that waits for an event is broken."""


def wait_for(condition: Any, what: str) -> None:
    end = time.perf_counter() + MOST_SECONDS  # a test may turn the other clocks
    while not condition():
        assert time.perf_counter() < end, f"waited in vain for {what}"
        time.sleep(0.001)


def signal_path(name: str) -> Path:
    return Path(os.environ[SIGNALS], name)


def wait_for_signal(name: str) -> None:
    wait_for(signal_path(name).exists, name)


def give_signal(name: str) -> None:
    signal_path(name).touch()


class PatientPlanner(EplbProcess):
    """A planner's process whose answers a step can wait for."""

    asked = 0
    """Number of the request that it was given last."""

    def submit(self, request: PlanRequest) -> None:
        super().submit(request)
        self.asked = request.number


def settle(updator: EplbUpdator, planner: PatientPlanner | None) -> None:
    """Waits until the plan that was asked for is there, and all rounds that were issued have arrived."""
    state, loader = updator.state, updator.parts.loader
    if planner is not None and state.phase is Phase.PLAN and planner.asked == state.cycle:
        wait_for(lambda: planner.answer(state.cycle) is not None, f"the plan of cycle {state.cycle}")
    wait_for(lambda: not loader.in_flight or loader.poisoned, "the rounds that were issued")


class Clock:
    """Stands in for the module ``time`` where the planner's process is looked after; it can be put forward."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def put_forward(self, seconds: float) -> None:
        self._ahead += seconds

    @classmethod
    def of_the_planner(cls) -> Clock:
        """Puts the clock in the place of the module ``time`` in this process."""
        clock = cls()
        process_module.time = clock  # type: ignore[assignment]
        return clock
