# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own modules with our balancer in place of theirs, and beside theirs.

The modules are the release's, imported from its source distribution and unchanged. The MoE layers are small ones with
vllm-ascend's maps and weight names, computed exactly, so that "wrong" means a wrong bit.
"""

from typing import Any

import pytest

from . import npus
from .programs import slow
from .serving import ASCEND, MISSING, RELEASE, python_path

pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="vllm-ascend's modules are unpacked for the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def run(
    function: str, ranks: int, args: list[Any], timeout: float = 400, check: bool = True, **settings: str
) -> npus.Outcome:
    return npus.run(
        "ascend",
        function,
        ranks=ranks,
        args=args,
        timeout=timeout,
        check=check,
        EMULATED_NPU_RACE="report",
        PYTHONPATH=python_path(),
        **settings,
    )


def test_the_four_names_are_taken_over() -> None:
    (result,) = run("surface", 1, []).results
    assert result["modules"] == ["vllm_ascend_eplb.adaptors.ascend.runner"] * 4
    assert result["settings"] == ""
    assert result["counts"] is True  # in every forward


def test_a_runner_that_calls_more_keeps_its_own_classes() -> None:
    (result,) = run("strange_runner", 1, []).results
    assert result["differences"] == ["it calls eplb_updator.something_new"]
    assert result["left_alone"]


# ours, owned, redundant experts, steps, fault, intervals, quantised. Owned is what MC2 and All2All are, not owned is
# AllGather: all ranks route the same tokens.
OURS: dict[str, list[Any]] = {
    "owned": [True, True, 0, 100, ""],
    "owned, redundant": [True, True, 2, 100, ""],
    "gathered, redundant": [True, False, 2, 100, ""],
    "killed planner": [True, True, 2, 500, "kill"],
    "slow planner": [True, True, 2, 700, "slow", [400, 3]],
    "shortest intervals": [True, True, 2, 100, "", [1, 1]],
    "ranks in different stages": [True, True, 2, 150, "skew"],
    "a placement that stays": [True, False, 2, 30, "map"],
    "W8A8 with scales": [True, True, 2, 100, "", [10, 3], "W8A8"],
    "MXFP8 with exponents": [True, True, 2, 100, "", [10, 3], "MXFP8"],
    "MXFP4 with exponents": [True, True, 2, 100, "", [10, 3], "MXFP4"],
}
if ASCEND != RELEASE:  # refused there: weights are loaded in vLLM's order whatever a map says
    del OURS["a placement that stays"]
STOCK: dict[str, list[Any]] = {
    "owned": [False, True, 0, 60, ""],
    "gathered, redundant": [False, False, 2, 10, ""],
    "slow planner": [False, True, 0, 20, "slow"],
}


@pytest.fixture(scope="module")
def ours() -> dict[str, list[dict[str, Any]]]:
    """Per case the results of both ranks."""
    results = run("several", 2, [list(OURS.values())]).results
    return {name: [rank[number] for rank in results] for number, name in enumerate(OURS)}


@pytest.fixture(scope="module")
def stock() -> dict[str, list[dict[str, Any]]]:
    results = run("several", 2, [list(STOCK.values())]).results
    return {name: [rank[number] for rank in results] for number, name in enumerate(STOCK)}


@pytest.mark.parametrize("case", OURS)
def test_moves_change_no_output(ours: dict[str, list[dict[str, Any]]], case: str) -> None:
    for result in ours[case]:
        assert result["wrong"] == 0
        if case == "a placement that stays":
            assert result["phase"] == "no balancer"
            continue
        assert result["placements"] >= 2
        assert result["phase"] != "OFF"
        if case == "slow planner":
            assert result["slowest"] < slow.SECONDS / 2  # no step waits for it


def test_experts_with_unknown_tensors_are_refused() -> None:
    unnamed = "W4A8" if ASCEND == RELEASE else "W4A8MXFP"
    outcome = run("balance", 2, [True, True, 2, 10, "", [10, 3], unnamed], check=False)
    assert outcome.results == [None, None]
    assert f"EPLB not support QuantType.{unnamed}" in outcome.text()


def test_on_four_ranks() -> None:
    for result in run("balance", 4, [True, False, 4, 100, ""]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 3


def test_stock_eplb_is_right_where_tokens_are_owned(stock: dict[str, list[dict[str, Any]]]) -> None:
    for result in stock["owned"]:
        assert result["wrong"] == 0
        assert result["placements"] >= 2


def test_stock_tables_count_gathered_replicas_twice(stock: dict[str, list[dict[str, Any]]]) -> None:
    """Not ours: with redundant experts its tables name another replica on each rank, so where all ranks route
    the same tokens each of them computes it, or none."""
    for result in stock["gathered, redundant"]:
        assert result["wrong"] == 10


def test_its_own_slow_planner_stops_every_rank_for_as_long(stock: dict[str, list[dict[str, Any]]]) -> None:
    """Not ours: the step thread waits for the planner's answer."""
    for result in stock["slow planner"]:
        assert result["slowest"] > slow.SECONDS / 2


@pytest.mark.parametrize(
    ("fault", "intervals"),
    [
        ("kill", [10, 3]),  # the step thread waits for ever for the dead planner's answer
        ("skew", [10, 3]),  # ranks count different steps, so that one gathers while another serves
        ("", [0, 3]),  # passes its validation; nobody asks the planner, and everybody waits for its answer
    ],
)
def test_its_own_eplb_freezes(fault: str, intervals: list[int]) -> None:
    """Not ours. Ranks that enter communicators in different orders hang, as they may on hardware."""
    case = [False, True, 0, 60, fault, intervals]
    outcome = run("balance", 2, case, timeout=300, check=False, EMULATED_NPU_COMM_ORDER="report")
    assert any(outcome.results), outcome.text()
    for result in outcome.results:
        assert result is None or "frozen" in result, outcome.results
