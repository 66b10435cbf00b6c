# SPDX-License-Identifier: Apache-2.0
"""Gauges show the statistics, and no fault of the statistics file harms the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.windows import rank_window
from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe import prometheus as metrics
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.prometheus import EplbGauges, StatsWatcher
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile, stats_path


def sample_stats() -> EplbStats:
    keeper = StatsKeeper("1.0", "default", "balance")
    keeper.step = 40
    keeper.window_ended(rank_window([[30.0, 10.0]], [[40.0, 0.0]]))
    keeper.planned([1.0], 0.5, 6)
    keeper.cycle_ended("done", moved=6)
    keeper.window_ended(rank_window([[22.0, 18.0]], [[40.0, 0.0]], [[21.0, 19.0]]))
    keeper.cycle_ended("skipped")
    keeper.phase = "move"
    keeper.committed(0.25)
    return keeper.stats()


def shown(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_gauges_show_the_statistics() -> None:
    registry = CollectorRegistry()
    EplbGauges(registry).show(sample_stats())
    values = shown(registry)
    expected = {
        'vllm_eplb_par_before{layers="mean"}': 1.5,
        'vllm_eplb_par_predicted{layers="worst"}': 1.0,
        'vllm_eplb_par_realised{layers="mean"}': 1.1,
        'vllm_eplb_par_window{layers="mean"}': 1.1,
        'vllm_eplb_par_window_start_placement{layers="mean"}': 2.0,
        'vllm_eplb_par_window_observed{layers="mean"}': 1.05,
        'vllm_eplb_par_planned{layers="mean"}': 1.0,
        "vllm_eplb_moves_planned": 6.0,
        'vllm_eplb_cycles{result="done"}': 1.0,
        'vllm_eplb_cycles{result="skipped"}': 1.0,
        'vllm_eplb_cycles{result="failed"}': 0.0,
        'vllm_eplb_phase{phase="move"}': 1.0,
        'vllm_eplb_phase{phase="collect"}': 0.0,
        'vllm_eplb_info{mode="balance",policy="default",version="1.0"}': 1.0,
        "vllm_eplb_experts_moved": 6.0,
        "vllm_eplb_planner_seconds": 0.5,
        "vllm_eplb_commit_longest_seconds": 0.25,
        "vllm_eplb_steps": 40.0,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert all(name.startswith("vllm_eplb_") for name in values)
    assert len(values) < 50  # few time series, however large the model


def test_gauges_of_the_95th_percentile_over_windows() -> None:
    """The gauges have a value after a plan from several windows, and none after a plan from one window."""
    keeper = StatsKeeper("1.0", "incremental", "balance")
    registry = CollectorRegistry()
    gauges = EplbGauges(registry)
    names = [
        f'vllm_eplb_par_p95_{name}{{layers="{kind}"}}' for name in ("before", "planned") for kind in ("mean", "worst")
    ]
    keeper.planned([1.0, 1.0], 0.5, 6, [1.5, 1.7], [1.2, 1.0])
    gauges.show(keeper.stats())
    assert [shown(registry).get(name) for name in names] == pytest.approx([1.6, 1.7, 1.1, 1.2])
    keeper.planned([1.0, 1.0], 0.5, 6)
    gauges.show(keeper.stats())
    assert not set(names) & set(shown(registry))


def test_watcher_follows_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    path = tmp_path / "stats.json"
    watcher = StatsWatcher(path, EplbGauges(registry))
    assert not watcher.look()
    StatsFile(path).write(EplbStats(step=1))
    assert watcher.look()
    assert not watcher.look()  # unchanged
    half = sample_stats().to_json()[:200]
    path.write_text(half)
    assert not watcher.look()
    assert shown(registry)["vllm_eplb_steps"] == 1.0  # the last good values stay
    assert any("not updated" in record.message for record in caplog.records)
    StatsFile(path).write(sample_stats())
    assert watcher.look()
    assert shown(registry)["vllm_eplb_steps"] == 40.0
    path.unlink()
    assert not watcher.look()


def test_watcher_survives_broken_gauges(tmp_path: Path) -> None:
    def fail(_: EplbStats) -> None:
        raise RuntimeError("out of space")

    StatsFile(tmp_path / "stats.json").write(EplbStats())
    assert not StatsWatcher(tmp_path / "stats.json", SimpleNamespace(show=fail)).look()  # type: ignore[arg-type]


def test_balancing_off_makes_no_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATS_VARIABLE, raising=False)
    made: list[object] = []
    monkeypatch.setattr(metrics, "EplbGauges", lambda **_: made.append(1))
    metrics.watch()
    assert made == []


def test_old_names_of_metrics_show_the_same_value() -> None:
    registry = CollectorRegistry()
    EplbGauges(registry).show(EplbStats(audits=1, audit_repaired=7))
    assert registry.get_sample_value("vllm_eplb_audit_repaired_slots") == 7
    assert registry.get_sample_value("vllm_eplb_audit_mended_slots") == 7


def test_two_engines_share_one_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    made: list[EplbGauges] = []

    def make(**arguments: Any) -> EplbGauges:
        made.append(EplbGauges(registry, **arguments))
        return made[-1]

    monkeypatch.setattr(metrics, "EplbGauges", make)
    monkeypatch.setattr(metrics, "watchers", [])
    monkeypatch.setenv(STATS_VARIABLE, str(tmp_path / "stats.json"))
    metrics.watch()
    metrics.watch()
    assert len(made) == 1
    (watcher,) = metrics.watchers
    watcher.close()


def test_every_pipeline_stage_has_its_own_file_and_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "EplbGauges", lambda **arguments: EplbGauges(registry, **arguments))
    monkeypatch.setattr(metrics, "watchers", [])
    monkeypatch.setenv(STATS_VARIABLE, str(tmp_path / "stats.json"))
    metrics.watch(["stage0", "stage1"])
    for step, watcher in enumerate(metrics.watchers):
        watcher.close()
        path = stats_path(watcher.part)
        assert path == tmp_path / f"stats-stage{step}.json"
        StatsFile(path).write(EplbStats(step=step + 1, cycles_done=step + 3))
        assert watcher.look()
    for step in (0, 1):
        own = {"part": f"stage{step}"}
        assert registry.get_sample_value("vllm_eplb_steps", own) == step + 1
        assert registry.get_sample_value("vllm_eplb_cycles", {**own, "result": "done"}) == step + 3


def test_gauges_removed_by_vllm_come_back(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    gauges = EplbGauges(registry)
    path = tmp_path / "stats.json"
    gauges.show(EplbStats(step=3))
    assert shown(registry)["vllm_eplb_steps"] == 3
    StatsFile(path).write(EplbStats(step=7))
    for gauge in list(registry._collector_to_names):  # as vLLM 0.23 does before an engine starts
        registry.unregister(gauge)
    assert not shown(registry)
    watcher = StatsWatcher(path, gauges, interval=0.01)
    watcher.start()
    deadline = time.monotonic() + 20
    while shown(registry).get("vllm_eplb_steps") != 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    watcher.close()
    assert shown(registry)["vllm_eplb_steps"] == 7


def test_several_api_servers_show_the_newest(tmp_path: Path) -> None:
    """Two processes with PROMETHEUS_MULTIPROC_DIR give one value per gauge: the last one set, not a sum."""
    code = (
        "import sys\n"
        "from vllm_ascend_eplb.observe.prometheus import EplbGauges\n"
        "from vllm_ascend_eplb.observe.stats import EplbStats\n"
        "EplbGauges().show(EplbStats(step=int(sys.argv[1])))\n"
    )
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for step in ("70", "30"):
        subprocess.run([sys.executable, "-c", code, step], env=environment, check=True)
    result = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    assert "\nvllm_eplb_steps 30.0\n" in result.stdout


def test_metrics_import_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_ascend_eplb.observe.prometheus\n"
        "assert not {'vllm', 'torch'} & set(sys.modules), 'imports too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
