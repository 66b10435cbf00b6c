# SPDX-License-Identifier: Apache-2.0
"""StepClock: what balancing saved of steps, compared by medians of steps with about as many tokens."""

from __future__ import annotations

import pytest

from vllm_ascend_eplb.balancer.step_clock import KEPT_STEPS, LEAST_STEPS, StepClock


class Run:
    """Steps one after the other on a clock of its own."""

    def __init__(self) -> None:
        self.clock, self.now = StepClock(), 100.0

    def steps(self, count: int, tokens: float, seconds: float, *, counts: bool = True) -> None:
        for _ in range(count):
            self.clock.step(self.now, tokens, counts=counts)
            self.now += seconds


def test_saved_time_is_that_of_steps_alike() -> None:
    run = Run()
    run.steps(20, 64, 0.010)
    run.steps(20, 4096, 0.200)
    first = run.clock.window_ended(at_start=True)
    assert first is not None
    assert first.saved_seconds == pytest.approx(0.0)
    run.steps(10, 64, 0.009)
    run.steps(31, 4096, 0.150)
    timed = run.clock.window_ended(at_start=False)
    assert timed is not None
    assert timed.steps == 41  # the step that was open when the first window ended is in the second
    saved = timed.saved_seconds
    assert saved == pytest.approx(10 * 0.001 + 30 * 0.05, abs=0.06)


def test_pauses_between_requests_do_not_count() -> None:
    run = Run()
    run.steps(30, 8, 0.010)
    run.clock.window_ended(at_start=True)
    for _ in range(3):
        run.steps(9, 8, 0.010)
        run.now += 60.0
    timed = run.clock.window_ended(at_start=False)
    assert timed is not None
    assert timed.ms == pytest.approx(10.0)


def test_steps_beside_a_cycle_do_not_count() -> None:
    run = Run()
    run.steps(30, 8, 0.010)
    run.clock.window_ended(at_start=True)
    run.steps(1, 8, 0.010)
    run.steps(100, 8, 5.0, counts=False)  # experts travel, or the batch is a dummy
    run.steps(20, 8, 0.020)
    timed = run.clock.window_ended(at_start=False)
    assert timed is not None
    assert timed.steps < 25
    assert timed.ms == pytest.approx(20.0)
    assert timed.saved_seconds < 0  # what took longer is said, too


def test_what_was_never_met_before_is_not_compared() -> None:
    run = Run()
    run.steps(30, 8, 0.010)
    assert run.clock.window_ended(at_start=False) is None  # nothing to compare with
    run.steps(LEAST_STEPS - 1, 8, 0.010)
    run.clock.window_ended(at_start=True)
    run.steps(30, 8, 0.010)
    run.clock.window_ended(at_start=True)
    run.steps(1, 8, 0.010)
    run.steps(30, 4096, 0.5)
    assert run.clock.window_ended(at_start=False) is None


def test_a_long_window_keeps_its_newest_steps() -> None:
    run = Run()
    run.steps(20, 8, 0.010)
    run.clock.window_ended(at_start=True)
    run.steps(KEPT_STEPS, 8, 0.030)
    run.steps(KEPT_STEPS + 1, 8, 0.005)
    timed = run.clock.window_ended(at_start=False)
    assert timed is not None
    assert timed.ms == pytest.approx(5.0)
    assert timed.steps > 2 * KEPT_STEPS - 2
