# SPDX-License-Identifier: Apache-2.0
"""A thousand cycles over Gloo with all faults that may happen before issue: no deadlock and no wrong weight."""

from __future__ import annotations

import os

import pytest

from .model import Trouble
from .ranks import run_ranks
from .test_transfer import check, drive

pytestmark = [pytest.mark.distributed, pytest.mark.soak]

CYCLES = int(os.environ.get("EPLB_SOAK_CYCLES", "1000"))


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [(2, {"seed": 11}), (2, {"seed": 12, "buffers": 1, "lag": 2}), (4, {"seed": 13, "budget_bytes": 4096})],
)
def test_long_runs_keep_the_right_weights(num_ranks: int, options: dict[str, object]) -> None:
    trouble = Trouble(message_delay=0.001, planner_steps=6, prepare_fails=0.005, damage=0.005)
    outcomes = run_ranks(num_ranks, drive, CYCLES, (3, 3 * num_ranks, 4), trouble, options, timeout=3600)
    check(outcomes)
    assert outcomes[0].cycles == CYCLES
    assert outcomes[0].drops + outcomes[0].resends > 0
