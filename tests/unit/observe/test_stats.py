# SPDX-License-Identifier: Apache-2.0
"""Statistics: the keeper adds up, reading is strict, and readers always see a whole file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.windows import rank_window
from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe import stats_file
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.stats import KEPT_CYCLES, MAX_STATS_BYTES, EplbStats, Par, PhaseName, StatsError
from vllm_ascend_eplb.observe.stats_file import StatsFile, read_stats

START = [[30.0, 10.0], [20.0, 20.0]]
BALANCED = [[22.0, 18.0], [20.0, 20.0]]


def busy_keeper(cycles: int = 1) -> StatsKeeper:
    keeper = StatsKeeper("1.0", "default", "balance")
    for number in range(cycles):
        keeper.step = 100 * (number + 1)
        keeper.window_ended(rank_window(START, START))
        keeper.planned([1.1, 1.0], 0.25)
        keeper.step += 10
        keeper.cycle_ended("done", moved=3)
    return keeper


def test_keeper_records_every_stage_of_a_cycle() -> None:
    keeper = busy_keeper()
    done = keeper.stats()
    assert (done.cycles_done, done.experts_moved, done.experts_moved_last) == (1, 3, 3)
    assert done.par_before == Par(mean=1.25, worst=1.5)
    assert done.par_predicted == Par(mean=1.05, worst=1.1)
    assert done.par_realised is None
    assert done.planner_seconds == 0.25
    assert (done.cycles[0].step, done.cycles[0].end_step) == (100, 110)

    keeper.step = 200
    keeper.window_ended(rank_window(BALANCED, START))
    keeper.cycle_ended("skipped", reason="gain below min_gain")
    after = keeper.stats()
    assert after.par_realised == Par(mean=1.05, worst=1.1)
    assert after.cycles[0].par_realised == after.par_realised
    assert (after.cycles_done, after.cycles_skipped, after.cycles_failed) == (1, 1, 0)
    assert after.cycles[1].par_predicted is None  # the plan of cycle 1 is not the plan of cycle 2
    assert after.par_before == Par(mean=1.25, worst=1.5)  # still that of the cycle that moved experts
    assert after.window is not None
    assert after.window.par_start == Par(mean=1.25, worst=1.5)
    assert after.window.rank_load == ((1.1, 0.9), (1.0, 1.0))
    assert after.window.tokens == 80


def test_keeper_records_the_95th_percentile_of_windows() -> None:
    """Only plans from several windows have a percentile, and a cycle's record has only that of the cycle's own plan."""
    keeper = StatsKeeper()
    keeper.window_ended(rank_window(START, START))
    keeper.planned([1.1, 1.0], 0.25, 3, [1.5, 1.7], [1.2, 1.0])
    keeper.cycle_ended("done", moved=3)
    told = keeper.stats()
    assert (told.p95_before, told.p95_planned) == (Par(mean=1.6, worst=1.7), Par(mean=1.1, worst=1.2))
    assert (told.cycles[0].p95_before, told.cycles[0].p95_predicted) == (told.p95_before, told.p95_planned)

    keeper.window_ended(rank_window(BALANCED, START))
    keeper.cycle_ended("failed", reason="no plan")
    assert keeper.stats().p95_planned == told.p95_planned  # still that of the last plan
    assert keeper.stats().cycles[1].p95_predicted is None

    keeper.planned([1.1, 1.0], 0.25, 3)
    keeper.cycle_ended("done", moved=3)
    assert keeper.stats().p95_planned is None
    assert keeper.stats().cycles[2].p95_predicted is None


def test_keeper_adds_up_waits() -> None:
    keeper = StatsKeeper()
    for seconds in (0.25, 0.5):
        keeper.waited_for_control(seconds)
        keeper.waited_for_transfer(seconds)
        keeper.committed(seconds)
        keeper.step_took(seconds)
    keeper.cycle_ended("failed", reason="RuntimeError:\n  " + "x" * 1000)
    keeper.waited_for_control(0.125)
    keeper.cycle_ended("failed")
    result = keeper.stats()
    assert (result.control_wait_seconds, result.control_wait_longest_seconds) == (0.875, 0.5)
    assert result.control_wait_last_cycle_seconds == 0.125
    assert result.transfer_wait_seconds == 0.75
    assert (result.commit_seconds, result.commit_longest_seconds) == (0.75, 0.5)
    assert result.longest_step_seconds == 0.5
    assert result.cycles[0].reason == "RuntimeError: " + "x" * 286


def test_keeper_forgets_old_cycles_and_switches_off() -> None:
    keeper = busy_keeper(KEPT_CYCLES + 5)
    keeper.switched_off("too many failures")
    result = keeper.stats()
    assert [record.cycle for record in result.cycles] == list(range(6, KEPT_CYCLES + 6))
    assert (result.phase, result.off_reason) == ("off", "too many failures")
    assert EplbStats.from_json(result.to_json()) == result


def test_keeper_takes_no_load_and_many_ranks() -> None:
    keeper = StatsKeeper()
    keeper.window_ended(rank_window(np.zeros((2, 4)), np.zeros((2, 4))))
    window = keeper.stats().window
    assert window is not None
    assert window.par == Par(mean=1.0, worst=1.0)
    keeper.window_ended(rank_window(np.ones((64, 65)), np.ones((64, 65))))
    window = keeper.stats().window
    assert window is not None
    assert window.rank_load == ()


def test_phases_are_those_of_the_cycle() -> None:
    cycle = pytest.importorskip("vllm_ascend_eplb.agreement.transition")
    listening = {"listen"}  # shown as collecting
    assert {phase.name.lower() for phase in cycle.Phase} - listening == set(get_args(PhaseName))


def changed(**fields: object) -> str:
    return json.dumps(json.loads(busy_keeper().stats().to_json()) | fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        changed(step=-1),
        changed(step=1.5),
        changed(step="1"),
        changed(step=2**63),
        changed(phase="sleeping"),
        changed(planner_seconds=-0.1),
        changed(planner_seconds=None),
        changed(par_before={"mean": 1.0}),
        changed(par_before={"mean": float("nan"), "worst": 1.0}),
        changed(window={"step": 1}),
        changed(cycles=[{}]),
        changed(unknown=1),
        changed(version="x" * 301),
        changed().replace("}", "", 1),
        changed(version=" " * MAX_STATS_BYTES),
    ],
    ids=lambda text: text[:20],
)
def test_reading_is_strict(text: str) -> None:
    with pytest.raises(StatsError) as caught:
        EplbStats.from_json(text)
    assert len(str(caught.value)) < 500


SOUND = busy_keeper(2).stats().model_copy(update={"updated_at": 1.5e9}).to_json().encode()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_text_is_read_or_a_stats_error(damage: list[tuple[int, int]]) -> None:
    text = bytearray(SOUND)
    for position, value in damage:
        text[position] = value
    try:
        read = EplbStats.from_json(bytes(text))
    except StatsError:
        return
    assert EplbStats.from_json(read.to_json()) == read


def test_file_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    assert read_stats(path) is None
    file = StatsFile(path)
    stop, torn = threading.Event(), []

    def read_all_the_time() -> None:
        while not stop.is_set():
            try:
                read_stats(path)
            except StatsError as error:
                torn.append(error)

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    for number in range(200):
        file.write(busy_keeper(1 + number % 60).stats())
    stop.set()
    reader.join()
    assert torn == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["stats.json"]


def test_torn_file_is_a_stats_error(tmp_path: Path) -> None:
    """Negative control of the test above."""
    path = tmp_path / "stats.json"
    path.write_text(busy_keeper(3).stats().to_json()[:-40])
    with pytest.raises(StatsError):
        read_stats(path)


def test_files_that_are_not_regular_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StatsError, match="not a regular file"):
        read_stats(tmp_path / "fifo")
    with pytest.raises((StatsError, OSError)):
        read_stats(tmp_path)


def test_publish_writes_the_newest(tmp_path: Path) -> None:
    file = StatsFile(tmp_path / "stats.json", min_interval=0.05)
    keeper = busy_keeper()
    for step in range(1000, 1500):
        keeper.step = step
        file.publish(keeper.stats())
    file.close()
    result = read_stats(tmp_path / "stats.json")
    assert result is not None
    assert result.step == 1499


def test_publish_survives_a_missing_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "later"
    file = StatsFile(folder / "stats.json", min_interval=0.0)
    write, tried = file.write, threading.Semaphore(0)

    def counted(stats: EplbStats) -> None:
        try:
            write(stats)
        finally:
            tried.release()

    file.write = counted  # type: ignore[method-assign]
    for _ in range(3):
        file.publish(EplbStats())
        assert tried.acquire(timeout=60)
    folder.mkdir()
    file.publish(EplbStats(step=7))
    file.close()
    result = read_stats(folder / "stats.json")
    assert result is not None
    assert result.step == 7
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_path_is_provided_once_and_cleaned_up() -> None:
    code = (
        "import os, stat\n"
        "from vllm_ascend_eplb.observe.stats_file import provide_stats_path, stats_path\n"
        "assert stats_path() is None\n"
        "path = provide_stats_path()\n"
        "assert provide_stats_path() == path == stats_path()\n"
        "assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700\n"
        "if os.fork() == 0:\n"
        "    raise SystemExit(0)\n"  # a child that exits leaves the folder alone
        "os.wait()\n"
        "assert path.parent.is_dir()\n"
        "path.write_text('x')\n"
        "print(path)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != STATS_VARIABLE}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert not Path(result.stdout.strip()).parent.exists()


def test_path_of_the_user_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATS_VARIABLE, str(tmp_path / "mine.json"))
    assert stats_file.provide_stats_path() == tmp_path / "mine.json"
