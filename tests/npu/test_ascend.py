# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own modules with our balancer, and with vllm-ascend's own EPLB for comparison.

The modules are unchanged, from the source distribution of the release. The MoE layers are small, have vllm-ascend's
maps and weight names, and are computed exactly, so that "wrong" means a wrong bit.
"""

from typing import Any

import pytest

from . import npus
from .programs import slow
from .serving import ASCEND, MISSING, PRELOADED, RELEASE, python_path

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
        preloaded=PRELOADED,
        EMULATED_NPU_RACE="report",
        PYTHONPATH=python_path(),
        **settings,
    )


def test_four_classes_of_the_runner_are_replaced() -> None:
    (result,) = run("surface", 1, []).results
    assert result["modules"] == ["vllm_ascend_eplb.adaptors.ascend.runner"] * 4
    assert result["settings"] == ""
    assert result["counts"] is True  # in every forward


def test_forked_programs_read_their_own_settings() -> None:
    """Of the emulator. The modules that they are forked with ask for the kind of device, which reads settings, too."""
    assert run("memory", 1, [], EMULATED_NPU_MEMORY_MB="512").results == [512 << 20]


def test_runner_with_an_unknown_call_keeps_its_classes() -> None:
    (result,) = run("strange_runner", 1, []).results
    assert result["differences"] == ["it calls eplb_updator.something_new"]
    assert result["left_alone"]


# ours, owned, redundant experts, steps, fault, intervals, quantised. Tokens are owned with MC2 and All2All. With
# AllGather they are not: all ranks route the same tokens.
OURS: dict[str, list[Any]] = {
    "owned": [True, True, 0, 100, ""],
    "owned, redundant": [True, True, 2, 100, ""],
    "gathered, redundant": [True, False, 2, 100, ""],
    "killed planner": [True, True, 2, 500, "kill"],
    "slow planner": [True, True, 2, 700, "slow", [400, 3]],
    "shortest intervals": [True, True, 2, 100, "", [1, 1]],
    "ranks in different stages": [True, True, 2, 150, "skew"],
    "KV consumer": [True, True, 2, 150, "consumer"],
    "static placement": [True, False, 2, 30, "map"],
    "W8A8 with scales": [True, True, 2, 100, "", [10, 3], "W8A8"],
    "MXFP8 with exponents": [True, True, 2, 100, "", [10, 3], "MXFP8"],
    "MXFP4 with exponents": [True, True, 2, 100, "", [10, 3], "MXFP4"],
}
if ASCEND != RELEASE:  # refused there, because weights are always loaded in vLLM's order
    del OURS["static placement"]
STOCK: dict[str, list[Any]] = {
    "owned": [False, True, 0, 60, ""],
    "gathered, redundant": [False, False, 2, 10, ""],
    "slow planner": [False, True, 0, 20, "slow"],
}


@pytest.fixture(scope="module")
def ours() -> dict[str, list[dict[str, Any]]]:
    """The results of both ranks, by case."""
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
        if case == "static placement":
            assert result["phase"] == "no balancer"
            continue
        assert result["placements"] >= 2
        assert result["phase"] != "OFF"
        if case == "slow planner":
            assert result["slowest"] < slow.SECONDS / 2  # no step waits for the planner


def test_kv_consumers_count_the_steps_that_all_ranks_count(ours: dict[str, list[dict[str, Any]]]) -> None:
    """Slots count what they receive from all ranks. A window of whole steps is a multiple of a step's pairs of token
    and expert. Negative control: ranks that do not agree on the stage."""
    step = 2 * 24 * 2 * 2  # ranks, tokens per rank, layers, experts per token
    counted, apart = ours["KV consumer"][0]["counted"], ours["ranks in different stages"][0]["counted"]
    assert sum(counted) > 0
    assert [load % step for load in counted] == [0] * len(counted)
    assert any(load % step for load in apart)


def test_experts_with_unknown_tensors_are_refused() -> None:
    unnamed = "W4A8" if ASCEND == RELEASE else "W4A8MXFP"
    outcome = run("balance", 2, [True, True, 2, 10, "", [10, 3], unnamed], check=False)
    assert outcome.results == [None, None]
    assert f"EPLB not support QuantType.{unnamed}" in outcome.text()


def test_moves_on_four_ranks_change_no_output() -> None:
    for result in run("balance", 4, [True, False, 4, 100, ""]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 3


def test_stock_eplb_is_right_if_tokens_are_owned(stock: dict[str, list[dict[str, Any]]]) -> None:
    for result in stock["owned"]:
        assert result["wrong"] == 0
        assert result["placements"] >= 2


def test_stock_tables_count_gathered_replicas_twice(stock: dict[str, list[dict[str, Any]]]) -> None:
    """vllm-ascend's own EPLB: with redundant experts its tables name different replicas on different ranks. If all
    ranks route the same tokens, each rank computes such a token, or none does."""
    for result in stock["gathered, redundant"]:
        assert result["wrong"] == 10


def test_stock_slow_planner_stops_every_rank(stock: dict[str, list[dict[str, Any]]]) -> None:
    """vllm-ascend's own EPLB: the step thread waits for the planner's answer."""
    for result in stock["slow planner"]:
        assert result["slowest"] > slow.SECONDS / 2


FREEZES: dict[str, tuple[str, list[int]]] = {
    "killed planner": ("kill", [10, 3]),  # the step thread waits for ever for the answer of the dead planner
    "skew": ("skew", [10, 3]),  # ranks count different steps, so that one rank gathers while another rank serves
    "no interval": ("", [0, 3]),  # accepted by its validation; the planner is never asked, and all ranks wait for it
}


@pytest.fixture(scope="module")
def frozen() -> dict[str, npus.Outcome]:
    """All at once, because most of the time they stand still."""
    begun = {}
    for case, (fault, intervals) in FREEZES.items():
        arguments = [False, True, 0, 60, fault, intervals]
        begun[case] = npus.Ranks(
            "ascend", "balance", 2, arguments, PRELOADED,
            EMULATED_NPU_RACE="report", EMULATED_NPU_COMM_ORDER="report", PYTHONPATH=python_path(),
        )  # fmt: skip
    return {case: ranks.finish(300) for case, ranks in begun.items()}


@pytest.mark.parametrize("case", FREEZES)
def test_stock_eplb_freezes(frozen: dict[str, npus.Outcome], case: str) -> None:
    """vllm-ascend's own EPLB. Ranks that enter communicators in different orders hang, as they may on hardware."""
    outcome = frozen[case]
    assert any(outcome.results), outcome.text()
    for result in outcome.results:
        assert result is None or "frozen" in result, outcome.results
