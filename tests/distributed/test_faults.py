# SPDX-License-Identifier: Apache-2.0
"""Faults in a balancer of several processes: serving continues, and all ranks keep the same placement.

Every run has the real EplbUpdator, planner process, control channel and transfers over Gloo. Ranks step as an engine
does, and a fault object acts around the steps. After every step, every slot must hold bit for bit the expert that the
placement says, and all ranks must have the same placement.

One file, because faults stand in the order in which a cycle meets them: the plan, the gate, the transfer, the clock.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vllm_ascend_eplb import __version__
from vllm_ascend_eplb.agreement.exchange import StartError
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer import rollout as rollout_module
from vllm_ascend_eplb.balancer import start as start_module
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.planning import message as plan_message
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.transport import Transport
from vllm_ascend_eplb.values.placement import Placement

from . import policies
from .fault_runs import BUSY, Fault, run
from .faulty import FaultyTransport, interpose
from .pace import Clock, give_signal, signal_path, wait_for, wait_for_signal
from .ranks import Ranks, run_ranks
from .routing_model import EXPERTS, RoutingModel

pytestmark = pytest.mark.distributed


# --- the planner ------------------------------------------------------------------------------------------------------


class KillThePlannerInEachPhase(Fault):
    policy = staticmethod(policies.plan_at_a_signal)
    phases = (Phase.SNAPSHOT, Phase.REDUCE, Phase.PLAN, Phase.BROADCAST, Phase.MOVE, Phase.COLLECT)
    cycles = len(phases) + 1
    restart_seconds = (0.0,)

    def after(self) -> None:
        due = self.phases[self.cycle - 1] if 0 < self.cycle <= len(self.phases) else None
        if self.planner is not None and self.phase is due and getattr(self, "killed", 0) < self.cycle:
            if self.phase is Phase.PLAN:
                wait_for_signal("asked")
            pid = self.planner.pid
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                self.killed = self.cycle
                wait_for(lambda: self.planner.pid != pid, "the end of the planner")
            give_signal("go")


def test_planner_killed_in_any_phase_costs_no_cycle() -> None:
    seen = run(KillThePlannerInEachPhase)
    assert seen.results[:6] == ["done"] * 6, [cycle.reason for cycle in seen.stats.cycles]
    assert seen.metrics['vllm_eplb_cycles{result="failed"}'] == 0
    assert seen.metrics["vllm_eplb_planner_starts"] >= 6
    assert len(seen.said("WARNING", "planner process ended (exit code -9); it is started again")) >= 5
    assert seen.said("ERROR") == []


class KillThePlannerAgainAndAgain(Fault):
    """The planner is killed after every start. It may start three times without a pause, then the pause is endless."""

    settings: ClassVar[dict[str, Any]] = {"max_failures": 3, "expert_heat_collection_interval": 2}
    policy = staticmethod(policies.never_answer)
    cycles = 100
    settles = False
    restart_seconds = (0.0, 0.0, 0.0, 1e6)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.updator.parts.settings = replace(self.updator.parts.settings, least_plan_age=20)
        if self.planner is not None:
            threading.Thread(target=self.kill, daemon=True).start()

    def kill(self) -> None:
        assert self.planner is not None
        while True:
            pid = self.planner.pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)

    def after(self) -> None:
        if self.planner is not None and self.phase is Phase.OFF:
            wait_for(lambda: self.planner.starts == 3, "the last start")


def test_planner_killed_after_every_start_is_given_up() -> None:
    """Balancing then goes off with one error. The pauses between starts are kept."""
    seen = run(KillThePlannerAgainAndAgain)
    assert seen.phase == "OFF"
    assert seen.steps_after_off >= 50
    assert seen.results == ["failed"] * 3
    assert len(set(seen.history)) == 1
    errors = seen.said("ERROR")
    assert len(errors) == 1
    assert "EPLB is off" in errors[0]
    assert sum(count for name, count in seen.metrics.items() if "failures" in name) == 3
    assert seen.metrics['vllm_eplb_phase{phase="off"}'] == 1
    assert seen.stats.planner_starts == 3, "the planner was started without pauses"


class StopThePlanner(Fault):
    """SIGSTOP stops the planner for good while it plans (cycle 1) and while it is idle (cycle 2), and for a while in
    cycle 4. The clock of the planner's deadline is put forward, so that the test does not wait for the deadline."""

    planner_timeout = 120.0
    cycles = 5

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.clock = Clock.of_the_planner()
        self.stopped_in = self.steps_paused = 0

    def after(self) -> None:
        if self.planner is None:
            return
        if self.stopped_in < self.cycle and self.phase is {1: Phase.REDUCE, 2: Phase.MOVE, 4: Phase.REDUCE}.get(
            self.cycle
        ):
            wait_for(lambda: self.planner.pid is not None, "a planner")
            self.stopped, self.stopped_in = self.planner.pid, self.cycle
            os.kill(self.stopped, signal.SIGSTOP)
        if self.phase is Phase.PLAN and self.planner.asked == self.cycle:
            while self.cycle in (1, 3) and self.planner.pid == self.stopped:
                self.clock.put_forward(self.planner_timeout)
                time.sleep(0.001)
            self.steps_paused += self.cycle == 4
            if self.steps_paused == 5:
                os.kill(self.stopped, signal.SIGCONT)

    @property
    def settles(self) -> bool:
        return self.steps_paused == 0 or self.steps_paused >= 5


def test_stopped_planner_is_replaced_paused_one_awaited() -> None:
    seen = run(StopThePlanner)
    # the planner stopped while idle in cycle 2 is noticed when cycle 3 asks for a plan
    assert seen.results[:5] == ["failed", "done", "failed", "done", "done"]
    assert "within 120 s" in seen.stats.cycles[0].reason
    assert len(seen.said("WARNING", "did not answer within 120 s; it is replaced")) == 2
    assert seen.metrics['vllm_eplb_failures{kind="planner_failed"}'] == 2
    assert seen.said("ERROR") == []


class TalkNonsense(Fault):
    settings: ClassVar[dict[str, Any]] = {"max_failures": 100}
    policy = staticmethod(policies.talk_nonsense)
    cycles = 28
    most_steps = 6000
    restart_seconds = (0.0,)


def test_malformed_answer_of_a_planner_costs_one_cycle() -> None:
    seen = run(TalkNonsense, timeout=300)
    by_number = dict(enumerate(seen.stats.cycles, 1))
    bad = {number for number in range(1, 27, 2) if number != 5}
    results = {number: cycle.result for number, cycle in by_number.items() if number <= 28}
    wrong = [number for number in range(1, 29) if results.get(number) != ("failed" if number in bad else "done")]
    assert wrong == [], [(number, results.get(number), by_number[number].reason) for number in wrong]
    assert all(by_number[number].moved == 0 for number in bad)
    assert by_number[27].moved == 1
    assert seen.said("ERROR") == []
    assert len(seen.said("WARNING", "dropped on all ranks")) == len(bad)


class LateOnce(Fault):
    """The plan of cycle 1 comes after the ranks have given it up. Only this cycle has few steps for its plan: in the
    others these steps could pass before a busy machine has summed the load or prepared the rounds."""

    policy = staticmethod(policies.late_once)
    cycles = 3

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.usual = self.updator.parts.settings

    @property
    def settles(self) -> bool:
        return self.cycle > 1

    def before(self) -> None:
        due = self.cycle == 1 and self.phase is Phase.PLAN
        self.updator.parts.settings = replace(self.usual, least_plan_age=25) if due else self.usual

    def after(self) -> None:
        if self.planner is not None and self.planner.asked == 2:
            give_signal("given up")


def test_late_plan_is_never_taken() -> None:
    seen = run(LateOnce)
    assert seen.results[0] == "failed"
    assert "did not answer within the steps it had" in seen.stats.cycles[0].reason
    assert seen.metrics['vllm_eplb_failures{kind="planner_late"}'] == 1
    assert seen.results[-1] == "done", seen.stats.cycles


# --- before and after the issue gate ----------------------------------------------------------------------------------


def planted(*_: Any, **__: Any) -> Any:
    raise MemoryError("planted")


class NoMemory(Fault):
    """In every odd cycle one rank runs out of memory, each time at a different point before the issue gate."""

    settings: ClassVar[dict[str, Any]] = {"max_failures": 100, "transfer_buffer_experts": 2}
    points = ("snapshot", "take", "submit", "unpack", "check", "first round", "a later round", "maps")
    cycles = 2 * len(points) + 1
    most_steps = 6000

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        updator, model = self.updator, self.model
        self.prepared = 0
        for point, where, name in (
            ("snapshot", model.recorder, "snapshot"),
            ("take", model.recorder, "take"),
            ("submit", updator.parts.planner, "submit"),
            ("unpack", plan_message, "rounds_from_array"),
            ("check", rollout_module, "check_rounds"),
            ("first round", updator.parts.loader, "prepare"),
            ("a later round", updator.parts.loader, "prepare"),
            ("maps", model.maps, "prepare"),
        ):
            if where is not None:
                self.wrap(point, where, name)

    def wrap(self, point: str, where: Any, name: str) -> None:
        original = getattr(where, name)

        def perhaps(*args: Any, **kwargs: Any) -> Any:
            number = (self.cycle - 1) // 2
            mine = point == "submit" or number % self.ranks.num_ranks == self.ranks.rank
            late = point == "a later round" and self.updator.state.committed < 1
            if self.cycle % 2 and self.points[number : number + 1] == (point,) and mine and not late:
                raise MemoryError(f"planted at {point}")
            return original(*args, **kwargs)

        setattr(where, name, perhaps)


def test_rank_without_memory_drops_the_cycle_on_all() -> None:
    seen = run(NoMemory)
    assert seen.results[:16] == ["failed", "done"] * 8, [cycle.reason for cycle in seen.stats.cycles]
    for number, kind in enumerate(("snapshot", "snapshot", "planner_failed", "plan_invalid", "plan_invalid")):
        assert seen.stats.failures[kind] >= 1, (number, kind)
    assert seen.stats.failures["prepare"] == 3
    later = seen.stats.cycles[12]
    assert later.moved > 0, "the later round must fail after other rounds were committed"
    assert len(seen.said("WARNING", "dropped on all ranks")) == 8
    assert seen.said("ERROR") == []


class FailToIssue(Fault):
    """Rank 1 throws while it issues a round of cycle 2; rank 0 has issued the round and waits for bytes."""

    cycles = 1000

    @property
    def settles(self) -> bool:
        return self.cycle < 2

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        interpose(self.updator.parts.loader, ThrowsAtIssue, self)


class OfFault(FaultyTransport):
    """Fails on rank 1 in cycle 2 of ``fault``."""

    def __init__(self, real: Transport, fault: Fault) -> None:
        super().__init__(real)
        self.fault = fault

    @property
    def now(self) -> bool:
        return self.fault.cycle == 2 and self.fault.ranks.rank == 1


class ThrowsAtIssue(OfFault):
    def issuing(self, serial: int) -> int:
        if self.now:
            raise RuntimeError("planted while issuing")
        return serial


class SleepsAtArrival(OfFault):
    def arrived(self, received: list[torch.Tensor]) -> None:
        if self.now:
            time.sleep(3600)


class NeverArrive(Fault):
    """The experts that rank 1 receives in cycle 2 never arrive."""

    cycles = 1000

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        interpose(self.updator.parts.loader, SleepsAtArrival, self)

    @property
    def settles(self) -> bool:
        return self.cycle < 2 or self.ranks.rank == 1  # rank 1 waits until the deadline is over

    def before(self) -> None:
        if self.cycle == 2 and self.ranks.rank == 1:
            self.updator.parts.loader.deadline = 0.5


@pytest.mark.parametrize("fault", [FailToIssue, NeverArrive])
def test_failed_transfer_ends_balancing_but_not_serving(fault: type[Fault]) -> None:
    seen = run(fault)
    assert seen.phase == "OFF"
    assert seen.steps_after_off >= 50
    assert seen.results[-1] == "failed"
    assert len(seen.said("ERROR")) == 1
    assert "a transfer failed or did not end" in seen.said("ERROR")[0]
    assert seen.metrics['vllm_eplb_failures{kind="transfer"}'] == 1


# --- ranks apart in time ----------------------------------------------------------------------------------------------


class Skewed(Fault):
    """Ranks are late at random, rank 1 is stopped once, some forwards are dummy forwards, and ranks are in different
    stages (prefill, decode).

    The stopped rank continues when all other ranks have reached the forward of that step: their balancer did not wait.
    """

    settings: ClassVar[dict[str, Any]] = {"eplb_heat_collection_stage": "prefill", "max_failures": 100}
    cycles = 12
    stopped_for = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.luck = random.Random(self.ranks.rank)
        self.stopped = False

    def forward(self) -> dict[str, Any]:
        rank = self.ranks.rank
        return {
            "serving": (self.step // 7 + rank) % 3 > 0,
            "stage": "prefill" if (self.step + rank) % 2 else "decode",
        }

    def before(self) -> None:
        if self.luck.random() < 0.05:
            time.sleep(self.luck.random() / 20)
        if self.ranks.rank == 1 and self.cycle == 5 and self.phase is Phase.MOVE and not self.stopped:
            self.stopped = True
            signals = [
                signal_path(f"{rank} in forward {self.step}") for rank in range(self.ranks.num_ranks) if rank != 1
            ]
            watch = "".join(f'until [ -e "{path}" ]; do sleep 0.01; done; ' for path in signals)
            go_on = f"{watch} touch '{signal_path('waited')}'; sleep {self.stopped_for}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", go_on])
            os.kill(os.getpid(), signal.SIGSTOP)
            assert signal_path("waited").exists()

    def forward_begins(self) -> None:
        if self.ranks.rank != 1 and self.cycle == 5:
            give_signal(f"{self.ranks.rank} in forward {self.step}")


class SkewedLong(Skewed):
    stopped_for = 30


@pytest.mark.parametrize("fault", [Skewed, pytest.param(SkewedLong, marks=pytest.mark.soak)])
def test_ranks_apart_in_time_stay_together(fault: type[Skewed]) -> None:
    """The short stop, which ends when only the forward waits, is the fast proof of the long one."""
    seen = run(fault, num_ranks=3)
    assert seen.stats.cycles_failed == 0
    assert seen.stats.cycles_done >= 10
    assert seen.metrics["vllm_eplb_control_wait_longest_seconds"] > 0


class ClockJumps(Fault):
    """The monotonic clock jumps hours ahead between two cycles; the wall clock goes back years within a cycle."""

    cycles = 6

    def after(self) -> None:
        clock, wall = time.monotonic, time.time
        if self.cycle in (2, 4) and self.phase is Phase.COLLECT and getattr(self, "jumped", 0) < self.cycle:
            self.jumped = self.cycle
            time.monotonic = lambda: clock() + 7 * 3600  # type: ignore[assignment]
        if self.cycle == 3 and self.phase is Phase.MOVE and getattr(self, "back", 0) == 0:
            self.back = 1
            time.time = lambda: wall() - 3 * 365 * 86400  # type: ignore[assignment]


def test_jumps_of_clocks_change_nothing() -> None:
    seen = run(ClockJumps)
    assert seen.stats.cycles_failed == 0
    assert seen.stats.cycles_done >= 6


# --- ranks that were started differently ------------------------------------------------------------------------------


def start_differently(
    ranks: Ranks, values: dict[str, Any], placement: bool, version: str | None
) -> tuple[str, list[str]]:
    model = RoutingModel(ranks)
    if version is not None and ranks.rank == ranks.num_ranks - 1:
        start_module.__version__ = version  # as if this host had another package installed
    settings: ClassVar[dict[str, Any]] = {**BUSY, **(values if ranks.rank == ranks.num_ranks - 1 else {})}
    if placement and ranks.rank == ranks.num_ranks - 1:
        turned = np.roll(model.placement.physical_to_logical, 1, axis=1)
        model.placement = Placement(turned, EXPERTS, ranks.num_ranks)
    try:
        start_balancer(model, EplbConfig.from_additional_config({"eplb_config": settings}))
    except StartError as error:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("eplb")]
        return str(error), children + threads
    return "", []


@pytest.mark.parametrize(
    ("values", "placement", "version", "named"),
    [
        ({"control_lag": 2}, False, None, "eplb_config.control_lag: 2 against 1"),
        ({"expert_map_path": "/other.json"}, False, None, "eplb_config.expert_map_path: /other.json against None"),
        ({}, True, None, "start placement"),
        ({}, False, "0.0.1", f"package version: 0.0.1 against {__version__}"),
    ],
)
def test_ranks_started_differently_do_not_start(
    values: dict[str, Any], placement: bool, version: str | None, named: str
) -> None:
    for error, left in run_ranks(3, start_differently, values, placement, version):
        assert "expert-parallel rank 2 differs from rank 0 in" in error
        assert named in error
        assert "\n" not in error
        assert left == []
