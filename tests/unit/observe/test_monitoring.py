# SPDX-License-Identifier: Apache-2.0
"""Dashboard, alert rules and guide name existing metrics, and promtool accepts the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from vllm_ascend_eplb.observe.prometheus import EplbGauges, metrics_table

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "grafana"
PROMTOOL = shutil.which("promtool")


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of our metrics, by name."""
    return {gauge.name: set(gauge.labels) for gauge in EplbGauges(CollectorRegistry()).gauges()}


def uses(text: str) -> list[tuple[str, set[str]]]:
    """Our metrics in an expression, with the labels in their selectors."""
    found = re.findall(r"(vllm_eplb_\w+)(?:\{([^}]*)\})?", text)
    return [(name, set(re.findall(r"(\w+)\s*[=!]~?", selector))) for name, selector in found]


def check(text: str, labels: dict[str, set[str]]) -> int:
    found = uses(text)
    for name, selected in found:
        assert name in labels, f"no metric {name}"
        assert selected <= labels[name] | {"instance", "job"}, f"{name} has no labels {selected - labels[name]}"
    return len(found)


def test_check_of_metrics_can_fail(labels: dict[str, set[str]]) -> None:
    for wrong in ("rate(vllm_eplb_nothing[5m])", 'vllm_eplb_steps{result="done"}'):
        with pytest.raises(AssertionError):
            check(wrong, labels)


def test_dashboard_shows_existing_metrics(labels: dict[str, set[str]]) -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    assert dashboard["schemaVersion"] >= 36
    places: list[tuple[int, int, int, int]] = []
    shown: set[str] = set()
    for panel in dashboard["panels"]:
        assert {"id", "type", "title", "description", "gridPos", "targets", "datasource", "fieldConfig"} <= set(panel)
        assert panel["datasource"]["uid"] == "${datasource}"  # chosen by the user who imports the dashboard
        place = tuple(panel["gridPos"][key] for key in "xywh")
        assert place[0] + place[2] <= 24
        assert not any(_overlap(place, earlier) for earlier in places), panel["title"]
        places.append(place)
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert check(target["expr"], labels), target
            shown |= {name for name, _ in uses(target["expr"])}
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= {"instance"}.union(*(labels[name] for name, _ in uses(target["expr"])))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len(shown) >= 15
    variables = {entry["name"]: entry for entry in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "instance"}
    assert check(variables["instance"]["definition"], labels)


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_use_existing_metrics(labels: dict[str, set[str]]) -> None:
    assert len(rules()) >= 5
    for rule in rules():
        assert check(rule["expr"], labels), rule["alert"]
        for name in re.findall(r"docs/[\w-]+\.md", rule["annotations"]["description"]):
            assert (ROOT / name).is_file(), name
    guide = (ROOT / "docs" / "metrics.md").read_text()
    assert all(rule["alert"] in guide for rule in rules())


def test_guide_lists_every_metric(labels: dict[str, set[str]]) -> None:
    guide = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert metrics_table() in guide
    assert {name for name, _ in uses(metrics_table())} == set(labels)


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian package prometheus)")
def test_promtool_accepts_the_rules_and_their_tests() -> None:
    assert PROMTOOL is not None
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([PROMTOOL, *command], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
