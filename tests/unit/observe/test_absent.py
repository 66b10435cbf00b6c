# SPDX-License-Identifier: Apache-2.0
"""Absent is not zero: there is no sample without a value, and a server without figures says which server has them.

Cases: ``/metrics`` before the first report, plan, cycle or audit, and after a value has gone; several API servers,
which share files that samples cannot be removed from; API servers of a data-parallel group without rank 0, in
``/metrics``, ``watch`` and ``/eplb``; the end of a program.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.windows import rank_window
from vllm_ascend_eplb.cli import watch as watch_command
from vllm_ascend_eplb.cli.output import CommandError
from vllm_ascend_eplb.files.run_folder import OWNED_FOLDER
from vllm_ascend_eplb.observe import stats_file
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.prometheus import EplbGauges
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile, note_first_rank, reported_elsewhere
from vllm_ascend_eplb.report.live import NoStatsError, StatsReader


def samples(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


NEEDS = {
    "vllm_eplb_updated_timestamp_seconds": "a report",
    "vllm_eplb_moves_planned": "a plan",
    "vllm_eplb_planner_seconds": "a plan",
    "vllm_eplb_par_planned": "a plan",
    "vllm_eplb_par_window": "a window",
    "vllm_eplb_par_window_start_placement": "a window",
    "vllm_eplb_experts_moved_last_cycle": "a cycle",
    "vllm_eplb_control_wait_last_cycle_seconds": "a cycle",
    "vllm_eplb_par_before": "a cycle",
    "vllm_eplb_par_realised": "a cycle",
    "vllm_eplb_dispatch_par_before": "shares",
    "vllm_eplb_audit_damaged_slots": "an audit",
    "vllm_eplb_par_predicted": "a cycle",
    "vllm_eplb_par_window_observed": "a second window",
    "vllm_eplb_par_p95_before": "a plan of windows",
    "vllm_eplb_par_p95_planned": "a plan of windows",
    "vllm_eplb_dispatch_par_after": "shares",
    "vllm_eplb_moe_time_saved_seconds": "times",
    "vllm_eplb_moe_seconds": "times",
    "vllm_eplb_moe_seconds_start_placement": "times",
    "vllm_eplb_moe_seconds_observed": "times of an observed plan",
    "vllm_eplb_step_seconds": "timed steps",
    "vllm_eplb_step_seconds_start_placement": "timed steps",
    "vllm_eplb_step_time_saved_seconds": "timed steps",
    "vllm_eplb_plan_saved_fraction": "a plan that was weighed",
    "vllm_eplb_plan_cost_seconds": "a plan that was weighed",
    "vllm_eplb_failures": "a failure",
    "vllm_eplb_reported_elsewhere": "another server",
}
"""What there must be before a gauge has a value."""

ALWAYS = {
    "cycles", "phase", "info", "steps", "experts_moved", "dispatch_updates", "planner_starts", "control_wait_seconds",
    "control_wait_longest_seconds", "transfer_wait_seconds", "commit_seconds", "commit_longest_seconds",
    "longest_step_seconds", "paused", "audits", "audit_repaired_slots", "audit_mended_slots",
}  # fmt: skip
"""Gauges of which 0 is a value: totals so far, the longest so far, and states."""


def test_every_gauge_says_when_it_has_a_value() -> None:
    """A gauge that is added shows here, so that a person decides what it shows before there is a value."""
    names = {gauge.name for gauge in EplbGauges(CollectorRegistry()).gauges()}
    assert names == {*NEEDS, *(f"vllm_eplb_{name}" for name in ALWAYS)}


@pytest.mark.parametrize("parts", [(), ("stage0", "stage1")])
def test_no_sample_before_the_first_report(parts: tuple[str, ...]) -> None:
    registry = CollectorRegistry()
    gauges = EplbGauges(registry, parts)
    assert samples(registry) == {}
    gauges.show(EplbStats(), *parts[:1])
    names = {name.partition("{")[0] for name in samples(registry)}
    assert names == {f"vllm_eplb_{name}" for name in ALWAYS}
    if parts:
        assert not [name for name in samples(registry) if parts[1] in name]


def test_samples_appear_with_their_values() -> None:
    registry = CollectorRegistry()
    gauges, keeper = EplbGauges(registry), StatsKeeper("1", "incremental", "balance")

    def names() -> set[str]:
        gauges.show(keeper.stats())
        return {NEEDS.get(name.partition("{")[0], "") for name in samples(registry)} - {"", "a report"}

    assert names() == set()
    keeper.window_ended(rank_window([[3, 1], [2, 2]], [[4, 0], [1, 3]]))
    assert names() == {"a window"}
    keeper.planned([1.01, 1.0], 0.02)
    assert names() == {"a window", "a plan"}
    keeper.time_spent(1.5, 1.5, 10)  # nothing saved is a value
    assert names() == {"a window", "a plan", "times"}
    keeper.weighed(0.0, 0.0, 2.0)
    assert names() == {"a window", "a plan", "times", "a plan that was weighed"}
    keeper.steps_timed(2.0, 2.0, 0.0)
    assert names() == {"a window", "a plan", "times", "a plan that was weighed", "timed steps"}
    keeper.cycle_ended("done", moved=7)
    assert names() == {"a window", "a plan", "times", "a plan that was weighed", "timed steps", "a cycle"}


def without_realised(registry: CollectorRegistry) -> list[float]:
    return [value for name, value in samples(registry).items() if name.startswith("vllm_eplb_par_realised")]


def test_sample_goes_away_with_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    gauges = EplbGauges(registry)
    with_all = EplbStats(par_realised={"mean": 1.1, "worst": 1.3}, audits=1, audit_damaged=2, policy="a")  # type: ignore[arg-type]
    for _ in range(2):  # the value may come back
        gauges.show(with_all)
        assert without_realised(registry) == [1.1, 1.3]
        assert samples(registry)["vllm_eplb_audit_damaged_slots"] == 2
        gauges.show(EplbStats(policy="b"))
        assert without_realised(registry) == []
        assert "vllm_eplb_audit_damaged_slots" not in samples(registry)
        assert [name for name in samples(registry) if "info" in name] == [
            'vllm_eplb_info{mode="",policy="b",version=""}'
        ]


SHARED = """
import sys
from vllm_ascend_eplb.observe.prometheus import EplbGauges
from vllm_ascend_eplb.observe.stats import EplbStats, Par
gauges = EplbGauges()
for step in sys.argv[1]:
    if step == "a": gauges.show(EplbStats(step=3, audits=1, audit_damaged=2, par_realised=Par(mean=1.5, worst=2.0)))
    if step == "b": gauges.show(EplbStats(step=4))
    if step == "e": gauges.show_elsewhere(8)
"""
READ = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.mark.parametrize("steps", ["", "a", "ab", "e"])
def test_several_api_servers_show_no_zero(tmp_path: Path, steps: str) -> None:
    """A sample cannot be removed from files that several processes share. It becomes NaN, which fires no alert."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SHARED, steps], env=environment, check=True)
    page = subprocess.run([sys.executable, "-c", READ], env=environment, check=True, capture_output=True, text=True)
    found = watch_command.parse(page.stdout)
    values = {line.split()[0]: float(line.split()[1]) for line in page.stdout.splitlines() if line[:1] == "v"}
    if steps in ("", "e"):
        assert values == ({'vllm_eplb_reported_elsewhere{dp_rank="8"}': 1.0} if steps else {})
        return
    assert found["steps"] == len(steps) + 2
    assert ("audit_damaged_slots" in found) == (steps == "a")
    assert ("par_realised.mean" in found) == (steps == "a")
    assert math.isnan(values["vllm_eplb_audit_damaged_slots"]) == (steps == "ab")


@pytest.fixture
def second_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of an API server whose first DP rank is 8."""
    monkeypatch.setenv("EPLB_STATS_FILE", str(tmp_path / "stats.json"))
    monkeypatch.delenv("EPLB_FIRST_DP_RANK", raising=False)
    monkeypatch.setenv("EPLB_FIRST_DP_RANK", "0")
    note_first_rank(8)
    assert reported_elsewhere() == 8
    return tmp_path / "stats.json"


def test_metrics_of_a_server_without_rank_0_say_so(second_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend_eplb.observe import prometheus

    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus, "watchers", [])
    monkeypatch.setattr(prometheus, "EplbGauges", lambda parts: EplbGauges(registry, parts))
    prometheus.watch()
    try:
        assert samples(registry) == {'vllm_eplb_reported_elsewhere{dp_rank="8"}': 1.0}
        StatsFile(second_host).write(EplbStats(step=5))  # both hosts share the folder, and so the figures
        end = time.monotonic() + 20
        while "vllm_eplb_steps" not in samples(registry) and time.monotonic() < end:
            time.sleep(0.05)
        assert samples(registry)["vllm_eplb_steps"] == 5
        assert not [name for name in samples(registry) if "elsewhere" in name]
    finally:
        for watcher in prometheus.watchers:
            watcher.close()


def test_watch_of_a_server_without_rank_0_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    gauges = EplbGauges(registry)
    gauges.show_elsewhere(8)

    def opened(*_: object, **__: object) -> object:
        import contextlib
        import io

        return contextlib.closing(io.BytesIO(generate_latest(registry)))

    monkeypatch.setattr("urllib.request.OpenerDirector.open", opened)
    with pytest.raises(CommandError, match="ranks from 8 on; rank 0 reports for the balancer: ask the API server"):
        watch_command.look("http://localhost:8000/metrics", 1.0)
    gauges.show(EplbStats(step=4))  # figures are shown instead
    assert watch_command.look("http://localhost:8000/metrics", 1.0)["steps"] == 4


def test_page_of_a_server_without_rank_0_says_so(second_host: Path) -> None:
    reader = StatsReader()
    with pytest.raises(NoStatsError, match="ranks from 8 on; rank 0 reports for the balancer"):
        reader.json()
    StatsFile(second_host).write(EplbStats(step=5))
    assert '"step":5' in reader.json()[0]
    note_first_rank(0)
    assert reported_elsewhere() is None
    second_host.unlink()
    with pytest.raises(NoStatsError, match="has not reported yet"):
        StatsReader().json()


# --- the end of a program --------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "cannot be written" in record.message]


def test_no_false_warning_at_the_end_of_a_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The front-end process removes its private folder before the engine sends its last report."""
    caplog.set_level(logging.WARNING)
    folder = tmp_path / f"{OWNED_FOLDER}{os.getpid()}-abc"
    folder.mkdir()
    file = StatsFile(folder / "stats.json", min_interval=0.0)
    file.publish(EplbStats(step=1))
    end = time.monotonic() + 20
    while not file.path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    shutil.rmtree(folder)
    file.publish(EplbStats(step=2))
    threading.Timer(0.2, file.close).start()
    file.close(timeout=20)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("case", ["owner lives", "owner is gone", "folder of a user"])
def test_missing_folder_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Negative control of the test above: while the server runs, a missing folder is a fault."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(stats_file, "OWNER_ENDS", 0.01)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = {"owner lives": f"{OWNED_FOLDER}{os.getpid()}-abc", "owner is gone": f"{OWNED_FOLDER}{ended.pid}-abc"}
    file = StatsFile(tmp_path / name.get(case, "mine") / "stats.json", min_interval=0.0)
    file.publish(EplbStats(step=2))
    end = time.monotonic() + (1 if case == "owner is gone" else 20)
    while not warnings_of(caplog) and time.monotonic() < end:
        time.sleep(0.01)
    assert bool(warnings_of(caplog)) == (case != "owner is gone")
    file.close()
