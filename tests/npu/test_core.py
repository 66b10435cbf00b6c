# SPDX-License-Identifier: Apache-2.0
"""The balancer's core on NPUs, with random delays and the race detector."""

from typing import Any

import pytest

from . import npus

DELAYS = {"EMULATED_NPU_RACE": "report", "EMULATED_NPU_DELAY_US": "500"}
TROUBLE = {"step_delay": 0.002, "message_delay": 0.004, "planner_steps": 4, "damage": 0.02}


def test_recording_counts_as_on_a_cpu() -> None:
    assert npus.run("core", "recorder").results == [""]


@pytest.mark.parametrize(
    ("ranks", "transport", "options"),
    [
        (2, "hccl", {}),
        (4, "hccl", {"budget_bytes": 8192, "lag": 2}),
        (2, "gloo", {"buffers": 1}),
    ],
)
def test_commits_bring_the_right_weights(ranks: int, transport: str, options: dict[str, Any]) -> None:
    outcome = npus.run("core", "cycles", ranks=ranks, args=[transport, options, 3, TROUBLE], **DELAYS)
    for result in outcome.results:
        assert result["wrong"] == ""
        assert result["cycles"] == 3
        assert result["history"] == outcome.results[0]["history"]
    assert outcome.results[0]["commits"] >= 10


@pytest.mark.parametrize("transport", ["hccl", "gloo"])
def test_round_of_other_ranks_only_ends_on_all_ranks(transport: str) -> None:
    outcome = npus.run("core", "bystander", ranks=3, args=[transport], **DELAYS)
    received = [result["received"] for result in outcome.results]
    assert all(result["wrong"] == "" and not result["poisoned"] for result in outcome.results), outcome.results
    assert received[0] > 0
    assert received[2] == 0


def test_weights_that_did_not_move_are_found() -> None:
    """Negative control. The test itself writes the old weights back without waiting for their readers, so reports about
    that write are allowed."""
    outcome = npus.run("core", "first_commit_without_weights", ranks=2, allow=("tests/distributed/model.py",), **DELAYS)
    assert any(outcome.results)


def test_captured_graph_sees_every_commit() -> None:
    for result in npus.run("core", "captured_graph", ranks=2, args=[3], **DELAYS).results:
        assert result["wrong"] == ""
        assert result["commits"] >= 5


@pytest.mark.parametrize(("ranks", "capture"), [(2, False), (2, True), (4, False)])
def test_whole_cycles_change_no_output(ranks: int, capture: bool) -> None:
    outcome = npus.run("core", "updator", ranks=ranks, args=["npu", capture, 3, False], **DELAYS)
    for result in outcome.results:
        assert result["wrong"] == 0
        assert result["placements"] >= 4
        assert result["digest"] == outcome.results[0]["digest"]
        assert result["phase"] != "OFF"


def test_whole_cycles_on_a_cpu_change_no_output() -> None:
    """The reference for the test above: the same model and EplbUpdator, with weights in host memory and Gloo."""
    for result in npus.run("core", "updator", ranks=2, args=["cpu", False, 3, False]).results:
        assert result["wrong"] == 0
        assert result["placements"] >= 4


def test_maps_without_weights_change_outputs() -> None:
    """Negative control of the tests above: new maps with old weights must give wrong outputs.

    The write that restores the old weights is a race too, so the exit status is not checked.
    """
    outcome = npus.run("core", "updator", ranks=2, args=["npu", False, 3, True], check=False, **DELAYS)
    assert all(result["wrong"] > 0 for result in outcome.results)
