# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own modules with our balancer in place of theirs, and beside theirs.

The modules are the release's, imported from its source distribution and unchanged. The MoE layers are small ones with
vllm-ascend's maps and weight names, computed exactly, so that "wrong" means a wrong bit.
"""

from typing import Any

import pytest

from . import npus
from .test_core import START_UP

STACK = npus.ROOT / "build" / "stack"
STANDINS = npus.ROOT / "tests" / "npu" / "standins"
pytestmark = pytest.mark.skipif(
    not (STACK / ".stamp").exists(), reason="no vllm-ascend: run scripts/setup_npu_stack.sh (unpacks it in build/stack)"
)


def run(function: str, ranks: int, args: list[Any], timeout: float = 400, check: bool = True) -> npus.Outcome:
    return npus.run(
        "ascend",
        function,
        ranks=ranks,
        args=args,
        timeout=timeout,
        check=check,
        allow=START_UP,
        EMULATED_NPU_RACE="report",
        PYTHONPATH=f"{npus.ROOT}:{STACK / 'site'}:{STANDINS}",
    )


def test_the_four_names_are_taken_over() -> None:
    (result,) = run("surface", 1, []).results
    assert result["modules"] == ["vllm_ascend_eplb.adaptors.ascend"] * 4
    assert result["settings"] == ""


def test_a_runner_that_calls_more_keeps_its_own_classes() -> None:
    (result,) = run("strange_runner", 1, []).results
    assert result["differences"] == ["it calls eplb_updator.something_new"]
    assert result["left_alone"]


@pytest.mark.parametrize(
    ("ranks", "owned", "redundant"),
    [
        (2, True, 0),  # MC2, All2All
        (2, True, 2),
        (2, False, 2),  # AllGather: all ranks route the same tokens
        (4, False, 4),
    ],
)
def test_moves_change_no_output(ranks: int, owned: bool, redundant: int) -> None:
    for result in run("balance", ranks, [True, owned, redundant, 100, ""]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 3
        assert result["phase"] != "OFF"


def test_where_both_are_right_both_move() -> None:
    for result in run("balance", 2, [False, True, 0, 60, ""]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 2


def test_its_own_tables_count_replicas_twice_where_tokens_are_gathered() -> None:
    """Not ours: with redundant experts its tables name another replica on each rank, so where all ranks route
    the same tokens each of them computes it, or none."""
    for result in run("balance", 2, [False, False, 2, 10, ""]).results:
        assert result["wrong"] == 10


def test_a_planner_that_dies_stops_nothing() -> None:
    for result in run("balance", 2, [True, True, 2, 100, "kill"]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 2
        assert result["slowest"] < 30


def test_its_own_planner_that_dies_freezes_all_ranks() -> None:
    """Not ours: the step thread waits for ever for the dead planner's answer."""
    outcome = run("balance", 2, [False, True, 0, 40, "kill"], timeout=150, check=False)
    assert outcome.results == [None, None]
    assert set(outcome.codes) == {-9}
