# SPDX-License-Identifier: Apache-2.0
"""Step times are measured, read from a file, or unknown; a log line says which."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ascend_eplb.balancer import timing
from vllm_ascend_eplb.balancer.calibration import LayerRuns
from vllm_ascend_eplb.balancer.timing import learn_times
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.step_cost import StepCost

FOUND = StepCost([1, 64], [1.0, 2.0], [2], [[[1.0], [1.0]], [[2.0], [4.0]]], 0.02, "measured", "this server")
LOADER: Any = SimpleNamespace(measure_rates=lambda: (2e9, 8e9))


def prepare(ids: torch.Tensor) -> Callable[[], None]:
    raise AssertionError("calibrate is replaced in these tests")


def adaptor(runs: LayerRuns | None) -> Any:
    return SimpleNamespace(
        rank=0,
        title="EPLB",
        device=torch.device("cpu"),
        control_group=None,
        placement=Placement.initial(1, 2, 1),
        layer_runs=lambda: runs,
    )


RUNS = LayerRuns("this server", 2, 1, 64, 1, prepare)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects of all measurements."""
    subjects: list[str] = []

    def calibrate(runs: LayerRuns, **_: Any) -> StepCost:
        subjects.append(runs.subject)
        return FOUND

    monkeypatch.setattr(timing, "calibrate", calibrate)
    return subjects


def test_times_are_measured_and_logged(measured: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.eplb"):
        times = learn_times(adaptor(RUNS), EplbConfig(dynamic_eplb=True), LOADER)
    assert (times.cost, times.rates.receive, times.rates.commit) == (FOUND, 2e9, 8e9)
    assert "at 64 tokens per rank PAR 2 costs 100% of MoE time" in caplog.text
    assert measured == ["this server"]


@pytest.mark.parametrize("calibrate", [False, True])
def test_par_decides_without_times(calibrate: bool, measured: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """No log line if calibration is off; one line if layers cannot be run by themselves."""
    with caplog.at_level(logging.INFO, "vllm.eplb"):
        config = EplbConfig(dynamic_eplb=True, calibrate=calibrate)
        times = learn_times(adaptor(None if calibrate else RUNS), config, LOADER)
    assert not times.cost.in_milliseconds
    assert times.rates.receive is None
    assert ("weighed by PAR, not by milliseconds" in caplog.text) is calibrate
    assert measured == []


def test_next_start_reads_the_file(tmp_path: Path, measured: list[str]) -> None:
    config = EplbConfig(dynamic_eplb=True, calibration_path=str(tmp_path / "cost.json"))
    first = learn_times(adaptor(RUNS), config, LOADER)
    second = learn_times(adaptor(RUNS), config, LOADER)
    assert first.cost == second.cost == FOUND
    assert len(measured) == 1


@pytest.mark.parametrize("text", ["", "{}", "no JSON", FOUND.to_json().replace("this server", "another server")])
def test_file_of_something_else_is_replaced(
    text: str, tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    config = EplbConfig(dynamic_eplb=True, calibration_path=str(path))
    assert learn_times(adaptor(RUNS), config, LOADER).cost == FOUND
    assert len(measured) == 1
    assert "replaced" in caplog.text
    assert StepCost.from_json(path.read_text()) == FOUND


def test_unwritable_folder_does_not_stop_the_start(
    tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = EplbConfig(dynamic_eplb=True, calibration_path=str(tmp_path / "none" / "cost.json"))
    assert learn_times(adaptor(RUNS), config, LOADER).cost == FOUND
    assert "cannot be written" in caplog.text
