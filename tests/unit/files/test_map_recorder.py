# SPDX-License-Identifier: Apache-2.0
"""MapRecorder: the file always has a whole placement, at the end that in force, and a bad disk stops nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.unit.files.test_expert_map import placement
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.files.map_recorder import KEPT_WINDOWS, MapRecorder, load_path
from vllm_ascend_eplb.files.traces import read_trace


def test_recorded_map_is_the_last_one_in_force(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    recorder = MapRecorder(path)
    placements = [placement(seed=seed) for seed in range(20)]
    for number, in_force in enumerate(placements):
        recorder.record(in_force, np.full((3, 8), number))
    recorder.record(placements[-1])  # a cycle without a window
    recorder.close()
    assert read_expert_map(path) == placements[-1]
    with np.load(load_path(path)) as archive:
        assert int(archive["digest"]) == placements[-1].digest
    np.testing.assert_array_equal(read_trace(load_path(path)).load[:, 0, 0], np.arange(20))  # `simulate` takes it
    assert sorted(os.listdir(tmp_path)) == ["map.json", "map.load.npz"]


def test_load_of_the_last_windows_is_kept(tmp_path: Path) -> None:
    recorder = MapRecorder(tmp_path / "map.json")
    for number in range(KEPT_WINDOWS + 5):
        recorder.record(placement(), np.full((3, 8), number))
    recorder.close()
    kept = read_trace(load_path(tmp_path / "map.json")).load
    np.testing.assert_array_equal(kept[:, 0, 0], np.arange(5, KEPT_WINDOWS + 5))


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    known = [placement(seed=seed, layers=40) for seed in range(4)]
    recorder = MapRecorder(path)
    recorder.record(known[0])
    recorder.close()
    recorder = MapRecorder(path)
    for number in range(60):
        recorder.record(known[number % 4])
        assert read_expert_map(path) in known
    recorder.close()


def test_disk_error_is_logged_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = MapRecorder(tmp_path / "gone" / "map.json")
    written = threading.Event()
    original = recorder.write
    monkeypatch.setattr(recorder, "write", lambda *args: (original(*args), written.set()))
    for seed in range(3):
        written.clear()
        recorder.record(placement(seed=seed), np.zeros((3, 8), dtype=np.int64))
        assert written.wait(20)
    assert [record.message for record in caplog.records if "not recorded" in record.message] == [caplog.messages[0]]
    (tmp_path / "gone").mkdir()  # recording continues when the folder exists again
    recorder.record(placement(seed=9))
    recorder.close()
    assert read_expert_map(tmp_path / "gone" / "map.json") == placement(seed=9)


def test_layers_of_a_draft_model_come_after_the_models(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    recorder, models, drafts = MapRecorder(path), [placement(seed=1), placement(seed=2)], placement(seed=3, layers=2)
    draft_recorder = recorder.of_draft_model(drafts)
    recorder = recorder.of_model(models[0])
    for number in range(3):
        recorder.record(models[1], np.full((3, 8), number))
    for number in (50, 51):
        draft_recorder.record(drafts, np.full((2, 8), number))
    draft_recorder.close()
    assert recorded_rows(path) == models[1].physical_to_logical.tolist() + drafts.physical_to_logical.tolist()
    load = read_trace(load_path(path)).of_all_layers()
    np.testing.assert_array_equal(load[:, :3], np.broadcast_to(np.array([1, 2])[:, None, None], (2, 3, 8)))
    np.testing.assert_array_equal(load[:, 3:], np.broadcast_to(np.array([50, 51])[:, None, None], (2, 2, 8)))


def test_draft_model_may_be_there_before_its_model(tmp_path: Path) -> None:
    """Nothing is written before the model's placement is known, and nothing is lost."""
    path = tmp_path / "map.json"
    recorder, model, drafts = MapRecorder(path), placement(seed=1), placement(seed=3, layers=2)
    draft_recorder = recorder.of_draft_model(placement(seed=9, layers=2))
    draft_recorder.record(drafts, np.full((2, 8), 50))
    time.sleep(0.2)
    assert not path.exists()
    recorder.of_model(model)
    draft_recorder.close()
    assert recorded_rows(path) == model.physical_to_logical.tolist() + drafts.physical_to_logical.tolist()
    assert not load_path(path).exists()  # the model has had no window


def recorded_rows(path: Path) -> list[list[int]]:
    return read_expert_map(path).physical_to_logical.tolist()
