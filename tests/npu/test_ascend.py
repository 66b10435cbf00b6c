# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own modules with our balancer in place of theirs, and beside theirs.

The modules are the release's, imported from its source distribution and unchanged. The MoE layers are small ones with
vllm-ascend's maps and weight names, computed exactly, so that "wrong" means a wrong bit.
"""

from typing import Any

import pytest

from . import npus
from .programs import slow
from .serving import MISSING, STACK, STANDINS

pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="vllm-ascend's modules are unpacked for the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def run(function: str, ranks: int, args: list[Any], timeout: float = 400, check: bool = True) -> npus.Outcome:
    return npus.run(
        "ascend",
        function,
        ranks=ranks,
        args=args,
        timeout=timeout,
        check=check,
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


def test_a_slow_planner_stops_nothing() -> None:
    for result in run("balance", 2, [True, True, 2, 700, "slow", [400, 3]]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 2
        assert result["slowest"] < slow.SECONDS / 2


def test_its_own_slow_planner_stops_every_rank_for_as_long() -> None:
    """Not ours: the step thread waits for the planner's answer."""
    for result in run("balance", 2, [False, True, 0, 20, "slow"]).results:
        assert result["slowest"] > slow.SECONDS - 1


def test_the_shortest_intervals_work() -> None:
    for result in run("balance", 2, [True, True, 2, 100, "", [1, 1]]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 2


def test_ranks_may_be_in_different_stages() -> None:
    for result in run("balance", 2, [True, True, 2, 150, "skew"]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 2


@pytest.mark.parametrize(
    ("fault", "intervals"),
    [
        ("kill", [10, 3]),  # the step thread waits for ever for the dead planner's answer
        ("skew", [10, 3]),  # ranks count different steps, so that one gathers while another serves
        ("", [0, 0]),  # passes its validation; no step is the one before the first
    ],
)
def test_its_own_eplb_freezes_or_never_balances(fault: str, intervals: list[int]) -> None:
    """Not ours."""
    outcome = run("balance", 2, [False, True, 0, 60, fault, intervals], timeout=75, check=False)
    assert all(result is None or result["placements"] == 1 for result in outcome.results), outcome.results
