# SPDX-License-Identifier: Apache-2.0
"""Step times are measured, read from a file, or unknown; a log line says which."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.balancer import timing
from vllm_ascend_eplb.balancer.calibration import LayerRuns
from vllm_ascend_eplb.balancer.timing import learn_times
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.step_cost import StepCost
from vllm_ascend_eplb.values.topology import Topology

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


def test_noisy_file_is_measured_again_and_the_best_is_kept(
    tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A noisy start does not decide for all that follow; a quiet one is not repeated."""
    path = tmp_path / "cost.json"
    noisy = replace(FOUND, milliseconds=[[[3.0], [3.0]], [[3.0], [3.5]]], noise=0.2)
    path.write_text(noisy.to_json())
    config = EplbConfig(dynamic_eplb=True, calibration_path=str(path))
    cost = learn_times(adaptor(RUNS), config, LOADER).cost
    assert len(measured) == 1
    assert cost.milliseconds.ravel().tolist() == [1.0, 1.0, 2.0, 3.5]
    assert cost.noise == FOUND.noise
    assert "busy" not in caplog.text
    assert learn_times(adaptor(RUNS), config, LOADER).cost == cost
    assert len(measured) == 1


def test_noise_that_stays_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(timing, "calibrate", lambda runs, **_: replace(FOUND, noise=0.21))
    learn_times(adaptor(RUNS), EplbConfig(dynamic_eplb=True), LOADER)
    assert "measurements differ by 21 %, so a plan must save more than that" in caplog.text


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


def test_layers_are_timed_with_the_recorded_skew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The load beside the recorded map, where there is one; a file that holds none is said, and not used."""
    skews: list[Any] = []

    def calibrate(*_: Any, skew: Any, **__: Any) -> StepCost:
        skews.append(skew)
        return FOUND

    monkeypatch.setattr(timing, "calibrate", calibrate)
    config = EplbConfig(dynamic_eplb=True, expert_map_record_path=str(tmp_path / "map.json"))
    learn_times(adaptor(RUNS), config, LOADER)
    np.savez(tmp_path / "map.load.npz", load=np.array([[[1.0, 1, 1, 5], [0, 0, 0, 0]]]))
    learn_times(adaptor(RUNS), config, LOADER)
    assert skews[0] is None
    assert (skews[1].min(), skews[1].max()) == (0.5, 2.5)
    (tmp_path / "map.load.npz").write_bytes(b"no load")
    learn_times(adaptor(RUNS), config, LOADER)
    assert skews[2] is None
    assert "timed without the recorded load" in caplog.text


def test_recorded_load_is_timed_by_counts_at_start(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both placements, and what the times by PAR would have said; nothing where the load is of another model."""
    asked: list[Any] = []

    def time_shares(runs: LayerRuns, shares: Any, tokens: list[int], **_: Any) -> Any:
        asked.append((shares, tokens))
        return np.multiply.outer([3.0] * 3 + [2.0] * 3, np.ones(len(tokens)))

    monkeypatch.setattr(timing, "time_shares", time_shares)
    served = adaptor(RUNS)
    served.placement = Placement.initial(4, 8, 2)
    served.topology, served.num_groups = Topology.even(2), 1
    load = np.tile([9.0, 9, 9, 9, 1, 1, 1, 1], (1, 4, 1))
    np.savez(tmp_path / "map.load.npz", load=load)
    config = EplbConfig(dynamic_eplb=True, expert_map_record_path=str(tmp_path / "map.json"))
    with caplog.at_level(logging.INFO, "vllm.eplb"):
        learn_times(served, config, LOADER)
    ((shares, tokens),) = asked
    assert tokens == [64]
    assert shares.reshape(2, 3, 2, 4).sum(axis=3).max(axis=2).tolist() == [[0.9] * 3, [0.5] * 3]
    said = "at 64 tokens per rank a layer takes 3.000 ms, 2.000 ms balanced (3.600 and 2.000 ms by PAR)"
    assert said in caplog.text
    np.savez(tmp_path / "map.load.npz", load=load[:, :2])
    learn_times(served, config, LOADER)
    assert len(asked) == 1
