# SPDX-License-Identifier: Apache-2.0
"""What balancing brings in time is said everywhere: statistics, metrics, ``watch`` and the report; predicted and
realised apart, and neither where nothing was measured."""

from __future__ import annotations

import io
from collections import deque

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from tests.windows import rank_window
from vllm_ascend_eplb.cli.watch import History, panel, parse
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.prometheus import EplbGauges
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.report.live import live_body

TIMED = (
    "moe_seconds", "moe_seconds_start_placement", "moe_time_saved_seconds", "plan_saved_fraction", "plan_cost_seconds",
    "step_seconds", "step_seconds_start_placement", "step_time_saved_seconds",
)  # fmt: skip


def keeper(mode: str = "async", *, measured: bool = True, would_ms: float | None = None) -> StatsKeeper:
    """Two windows and a cycle between them."""
    kept = StatsKeeper("1", "incremental", mode)
    for window in range(2):
        kept.window_ended(rank_window([[3, 1]], [[3, 1]], [[2, 2]] if would_ms and window else None))
        if measured:
            kept.time_spent(8.0 if window else 10.0, 10.0, 100, would_ms if window else None)
        if window == 0:
            kept.planned([1.0], 0.01, 5)
            if measured:
                kept.weighed(2.5, 0.25, 30.0)
            kept.cycle_ended("skipped" if would_ms else "done", moved=5)
        elif measured:
            kept.steps_timed(19.0, 20.0, 0.1)
    return kept


def page(stats: EplbStats) -> str:
    registry = CollectorRegistry()
    gauges = EplbGauges(registry)
    gauges.show(stats)
    return generate_latest(registry).decode()


def watched(stats: EplbStats) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(panel(parse(page(stats)), History(deque()), "http://here"))
    return console.export_text()


def test_statistics_keep_predicted_and_realised_apart() -> None:
    stats = EplbStats.from_json(keeper().stats().to_json())
    assert stats.moe_time_saved_seconds == pytest.approx(100 * 2.0 / 1e3)
    assert stats.step_time_saved_seconds == pytest.approx(0.1)
    (cycle,) = stats.cycles
    assert (cycle.saved_ms, cycle.moe_ms_realised, cycle.moe_ms_observed) == (2.5, 8.0, None)


@pytest.mark.parametrize("measured", [True, False])
def test_metrics_have_times_only_where_measured(measured: bool) -> None:
    sample = parse(page(keeper(measured=measured).stats()))
    assert [name in sample for name in TIMED] == [measured] * len(TIMED)
    if measured:
        assert sample["moe_seconds"] == pytest.approx(8e-3)
        assert sample["step_seconds_start_placement"] == pytest.approx(20e-3)
    assert "moe_seconds_observed" not in sample


@pytest.mark.parametrize("measured", [True, False])
def test_watch_and_report_show_times_where_measured(measured: bool) -> None:
    stats = keeper(measured=measured).stats()
    said, html = watched(stats), live_body(stats)
    for text in ("MoE layers, predicted", "8.00 ms", "whole step, measured", "saves 25.0% of MoE time"):
        assert (text in said) is measured, text
    for text in ("8.000 ms", "of MoE time saved so far, predicted", "saved so far, measured", "ms saved per step"):
        assert (text in html) is measured, text


def test_observing_says_what_would_be_saved_in_time() -> None:
    stats = keeper("observe", would_ms=6.0).stats()
    assert "of MoE time would be saved: 2.000 of 8.000 ms in each step" in live_body(stats)
    assert "with the plan that was not carried out" in watched(stats)
    assert "if it follows the busiest rank" in live_body(keeper("observe", measured=False, would_ms=6.0).stats())
