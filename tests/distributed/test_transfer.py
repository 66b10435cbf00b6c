# SPDX-License-Identifier: Apache-2.0
"""Whole cycles over Gloo: after every commit every slot holds the expert in its map, on all ranks at the same step."""

from __future__ import annotations

from typing import Any

import pytest

from .model import Driver, Outcome, Trouble
from .ranks import Ranks, run_ranks

pytestmark = pytest.mark.distributed


def drive(ranks: Ranks, cycles: int, shape: tuple[int, int, int], trouble: Trouble, options: dict[str, Any]) -> Outcome:
    driver = Driver(ranks, shape, trouble, **{"seed": 0, "lag": 1, "buffers": 2, **options})
    return driver.run(cycles)


def check(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.wrong == ""
        assert outcome.history == outcomes[0].history


@pytest.mark.parametrize(
    ("num_ranks", "shape", "options"),
    [
        (2, (3, 6, 4), {}),
        (2, (3, 6, 4), {"buffers": 1, "lag": 2}),
        (4, (4, 10, 3), {"budget_bytes": 4096}),
        (8, (3, 16, 3), {"lag": 3}),
    ],
)
def test_commits_bring_the_right_weights_at_the_same_step(
    num_ranks: int, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    trouble = Trouble(step_delay=0.004, message_delay=0.01, planner_steps=4)
    outcomes = run_ranks(num_ranks, drive, 3, shape, trouble, options)
    check(outcomes)
    assert outcomes[0].cycles == 3
    assert outcomes[0].commits >= 6


def test_faults_before_issue_only_delay_the_cycle() -> None:
    trouble = Trouble(message_delay=0.003, prepare_fails=0.02, damage=0.1)
    outcomes = run_ranks(3, drive, 6, (3, 9, 4), trouble, {"seed": 5})
    check(outcomes)
    assert outcomes[0].cycles == 6
    assert outcomes[0].drops + outcomes[0].resends >= 1


def test_weights_that_did_not_move_are_found() -> None:
    """Negative control of the tests above: the maps switch and the weights stay."""
    outcomes = run_ranks(2, drive, 1, (2, 5, 3), Trouble(leave_slots=True), {})
    assert outcomes[0].commits >= 1
    assert any(outcome.wrong for outcome in outcomes)
