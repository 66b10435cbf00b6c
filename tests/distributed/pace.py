# SPDX-License-Identifier: Apache-2.0
"""Steps without clocks: a rank takes the next step when its background work is done. A test's result then depends on
steps and events, not on the speed of the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer import start
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.planning import process as process_module
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.planning.request import PlanRequest, plan_request
from vllm_ascend_eplb.values.plan import Plan

from .ranks import SIGNALS

MOST_SECONDS = 240.0
"""Longest wait for an event; a test that waits longer fails."""


def wait_for(condition: Any, what: str) -> None:
    end = time.perf_counter() + MOST_SECONDS  # a test may replace time.monotonic
    while not condition():
        assert time.perf_counter() < end, f"{what} did not happen within {MOST_SECONDS:.0f} s"
        time.sleep(0.001)


def signal_path(name: str) -> Path:
    return Path(os.environ[SIGNALS], name)


def wait_for_signal(name: str) -> None:
    wait_for(signal_path(name).exists, name)


def give_signal(name: str) -> None:
    signal_path(name).touch()


class PatientPlanner(EplbProcess):
    """A planner process that tells which request it was given, so that a step can wait for the answer."""

    asked = 0
    """Number of the last request."""

    def submit(self, request: PlanRequest) -> None:
        super().submit(request)
        self.asked = request.number


def make_planners_patient(policy: Callable[[PlanRequest], Plan] = plan_request) -> None:
    """Replace the planner that ``start_balancer`` makes in this process, so that steps can wait for its plans."""
    start.EplbProcess = partial(PatientPlanner, policy)  # type: ignore[assignment,misc]


def settle(updator: EplbUpdator) -> None:
    """Wait until the requested plan and all issued rounds have arrived. EP rank 0 must have a ``PatientPlanner``."""
    state, loader, planner = updator.state, updator.parts.loader, updator.parts.planner
    assert planner is None or isinstance(planner, PatientPlanner)
    if planner is not None and state.phase is Phase.PLAN and planner.asked == state.cycle:
        wait_for(lambda: planner.answer(state.cycle) is not None, f"the plan of cycle {state.cycle}")
    wait_for(lambda: not loader.in_flight or loader.poisoned, "the rounds that were issued")


class Clock:
    """Replaces the module ``time`` in the planner's supervision; it can be put forward."""

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
        """Replace ``time`` in the module that supervises the planner, in this process."""
        clock = cls()
        process_module.time = clock  # type: ignore[assignment]
        return clock
