# SPDX-License-Identifier: Apache-2.0
"""The emulated platform: the real torch_npu on emulated CANN behaves as an NPU does, and errors are errors.

A fault breaks a device for good, so every fault runs in its own processes.
"""

import pytest

from . import npus

pytestmark = pytest.mark.skipif(npus.REAL, reason="tests the emulator")


def test_operators_equal_those_of_the_cpu() -> None:
    assert npus.run("operators", "against_cpu").results == [{}]


def test_fused_operators_equal_plain_formulas() -> None:
    assert npus.run("operators", "fused").results == [{}]


def test_operator_that_is_not_emulated_is_named() -> None:
    (text,) = npus.run("operators", "not_emulated").results
    assert "not emulated: " in text
    assert "Svd" in text


def test_memory_streams_events_and_graphs_work() -> None:
    assert npus.run("runtime", "check", EMULATED_NPU_DELAY_US="2000").results == [{}]


def test_device_error_is_sticky() -> None:
    (errors,) = npus.run("runtime", "device_error_is_sticky").results
    assert len(errors) == 2
    assert all("aclnnIndexSelect: index out of range" in error for error in errors)


def test_missing_waits_are_flagged_and_waits_are_not() -> None:
    outcome = npus.run("races", "judge", check=False, EMULATED_NPU_RACE="report")
    assert outcome.results == [{}], outcome.text()


def test_missing_wait_raises_at_its_line() -> None:
    outcome = npus.run("races", "error", check=False)
    text = outcome.results[0]
    assert "data race" in text
    assert text.count("races.py:") >= 2, text


@pytest.mark.parametrize(("ranks", "delay"), [(2, "0"), (4, "3000")])
def test_collectives_give_the_right_results(ranks: int, delay: str) -> None:
    assert npus.run("collectives", "check", ranks=ranks, EMULATED_NPU_DELAY_US=delay).results == [{}] * ranks


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("other_operation", ["mismatch", "HcclBroadcast", "HcclAllReduce"]),
        ("other_size", ["mismatch", "16 bytes", "20 bytes"]),
        ("other_type", ["mismatch", "data type 4", "data type 2"]),
        ("other_message_size", ["mismatch", "16 bytes", "20 bytes"]),
        ("dead_peer", ["rank 1 has gone"]),
        ("both_send", ["timeout after 5"]),
        ("other_order", ["among the operations that ranks"]),
    ],
)
def test_wrong_use_of_hccl_is_an_error(program: str, words: list[str]) -> None:
    outcome = npus.run("collectives", program, ranks=2, check=False, HCCL_EXEC_TIMEOUT="5")
    text = " ".join(map(str, [*outcome.results, *outcome.outputs]))  # torch_npu 2.10 ends the process at some of them
    assert all(word in text for word in words), text
    assert "nothing was raised" not in text


def test_read_before_the_work_is_done_is_a_race() -> None:
    outcome = npus.run("collectives", "missing_wait", ranks=2, check=False, EMULATED_NPU_RACE="report")
    for result in outcome.results:
        sound, flagged = result[: result.index("--")], result[result.index("--") + 1 :]
        assert sound == []
        assert "HcclBatchSendRecv" in flagged[0]
