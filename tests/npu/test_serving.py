# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves examples/tiny_moe with our balancer, turned on by one flag, on 2 ranks: the real
torch_npu on emulated CANN. Most tests share one server and run in the order of this file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_ascend_eplb.files.expert_map import read_expert_map, write_expert_map
from vllm_ascend_eplb.values.placement import Placement

from . import npus, serving
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, freeze_weights_until_noticed, serve_until

pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
PLATFORM = "ascend_eplb,eplb,ascend_kv_connector,ascend_model,ascend_model_loader,ascend_service_profiling"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpuServer]:
    """All its processes are spawned, as for a user."""
    server = NpuServer(SETTINGS, tmp_path_factory.mktemp("server"), probe=True, spawned=True).started()
    yield server
    server.stop()


def slots(server: NpuServer) -> list[dict[str, Any]]:
    """The result of probe_checkpoint, by rank."""
    return server.call("probe_checkpoint", str(serving.MODEL / "model.safetensors"))


LAYER, LAYOUT = "AscendFusedMoE", [*range(33), *range(32, 64), 0]
if serving.ASCEND != serving.RELEASE:
    LAYER, LAYOUT = "AscendRoutedExperts", [*range(64), 0, 1]


def test_slots_hold_the_experts_of_the_layers_maps(server: NpuServer) -> None:
    """Before any move, the tensors that the adaptor finds in vllm-ascend's own layers are those of the checkpoint."""
    for rank in slots(server):
        assert rank == {"class": LAYER, "right": 6 * 33, "wrong": 0, "placement": LAYOUT}


def test_tokens_equal_those_of_transformers_while_moving(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    assert server.log.count("EPLB is on: ") == 1
    serve_until(server, batches, want, 10)
    stats = server.stats()
    assert stats is not None
    assert stats.cycles_failed == 0
    done = [cycle for cycle in stats.cycles if cycle.result == "done"]
    assert len(done) >= 10
    assert all(cycle.moved > 0 for cycle in done)
    for rank in slots(server):
        assert (rank["right"], rank["wrong"]) == (6 * 33, 0)
        assert rank["placement"] != LAYOUT


def test_balancing_lowers_par(server: NpuServer) -> None:
    """PAR of the same windows is lower with the placement in force than with the start placement."""
    stats = server.stats()
    assert stats is not None
    windows = [cycle for cycle in stats.cycles if cycle.par is not None and cycle.par_start is not None]
    later = windows[1:]  # no expert has moved in the first window
    assert windows[0].par.mean == pytest.approx(windows[0].par_start.mean)
    balanced = sum(cycle.par.mean for cycle in later) / len(later)
    unmoved = sum(cycle.par_start.mean for cycle in later) / len(later)
    assert balanced - 1 < 0.75 * (unmoved - 1), f"PAR {balanced:.3f} with balancing, {unmoved:.3f} without"
    for cycle in stats.cycles:
        if cycle.result == "done":
            assert cycle.par_predicted.mean < cycle.par.mean


def test_killed_planner_costs_no_request(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    planners = server.planners()
    assert len(planners) == 1  # that of expert-parallel rank 0
    os.kill(planners[0], signal.SIGKILL)
    assert server.complete(batches[0], TOKENS) == want[0]
    serve_until(server, batches, want, 2)
    assert server.planners() != planners


def test_no_race_and_no_wrong_order(server: NpuServer) -> None:
    assert not server.unexpected_races()[:3]


def test_weights_that_did_not_move_change_tokens(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """Negative control. It runs last on this server, because it leaves wrong weights."""
    freeze_weights_until_noticed(server, batches, want)
    assert all(rank["wrong"] > 0 for rank in slots(server))


def test_server_ends_in_order(server: NpuServer) -> None:
    assert server.stop() == []
    assert server.processes() == []


def test_server_without_the_flag_is_unchanged(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    server = NpuServer(None, tmp_path).started()
    try:
        assert [server.complete(batch, TOKENS) for batch in batches] == want
        assert server.stats() is None
        assert "EPLB is on" not in server.log
    finally:
        server.stop()


def test_platform_ascend_eplb_uses_the_same_adaptor(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """Its weights are loaded by a map, and what it ends with is in the map that it records."""
    given, recorded, start = tmp_path / "given.json", tmp_path / "recorded.json", another_placement()
    write_expert_map(given, start)
    settings = {**SETTINGS, "expert_map_path": str(given), "expert_map_record_path": str(recorded)}
    del settings["num_redundant_experts"]
    server = NpuServer(settings, tmp_path, probe=True, VLLM_PLUGINS=PLATFORM).started()
    try:
        assert "Platform plugin ascend_eplb is activated" in server.log
        assert f"starting from {given}" in server.log
        for rank in slots(server):
            first = start.physical_to_logical[0].tolist()
            assert rank == {"class": LAYER, "right": 6 * 33, "wrong": 0, "placement": first}
        serve_until(server, batches, want, 3)
        assert not server.unexpected_races()[:3]
        deadline = time.monotonic() + 20
        while not recorded.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert read_expert_map(recorded, allow_duplicates=True).num_slots == start.num_slots
        assert read_expert_map(recorded, allow_duplicates=True) != start
    finally:
        server.stop()


def another_placement() -> Placement:
    """A placement with the experts of every layer in reverse order, and two copies of two experts."""
    slots = []
    for layer in range(6):
        order = np.roll(np.arange(64)[::-1], layer)
        slots.append(np.concatenate([order[:32], order[32:33], order[32:], order[:1]]))
    return Placement(np.array(slots, dtype=np.int32), 64, 2)


def test_tokens_on_a3_equal_those_of_transformers(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """On A3 ranks route their own tokens (All2All for large batches, MC2 for small ones), and tables differ by rank."""
    server = NpuServer(SETTINGS, tmp_path, device="A3").started()
    try:
        serve_until(server, batches, want, 4)
        assert server.stats().cycles_failed == 0
        assert not server.unexpected_races()[:3]
    finally:
        server.stop()


@pytest.mark.parametrize(
    "graph_mode", ["FULL_DECODE_ONLY", pytest.param("PIECEWISE", marks=pytest.mark.soak)], ids=str.lower
)
def test_captured_graphs_replay_after_experts_moved(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]], graph_mode: str
) -> None:
    """ACL graphs of a compiled model are captured before the first move and replayed after it."""
    server = NpuServer(SETTINGS, tmp_path, graphs=(1, 2, 4), graph_mode=graph_mode, probe=True).started()
    try:
        assert set(server.call("probe_replays")) == {"0"}
        answers = serve_until(server, batches, want, 4)
        steps = (TOKENS - 1) * len(answers) // len(batches[0])  # decoding steps, if all requests of a batch share them
        assert min(map(int, server.call("probe_replays"))) > steps / 2
        assert server.stats().cycles_failed == 0
        assert not server.unexpected_races()[:3]
        freeze_weights_until_noticed(server, batches, want)
    finally:
        server.stop()


def test_unchecked_release_is_served_without_balancing(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """The release differs from the checked one only in its version number."""
    (known,) = serving.STACK.glob("site/vllm_ascend-*.dist-info")
    unknown = tmp_path / "site" / "vllm_ascend-0.99.0.dist-info"
    shutil.copytree(known, unknown)
    metadata = (unknown / "METADATA").read_text()
    (unknown / "METADATA").write_text(re.sub("(?m)^Version: .*", "Version: 0.99.0", metadata))
    (tmp_path / "server").mkdir()
    path = f"{unknown.parent}:{serving.python_path()}"
    server = NpuServer(SETTINGS, tmp_path / "server", PYTHONPATH=path).started()
    try:
        assert server.complete(batches[0], TOKENS) == want[0]
        assert re.search(
            r"EPLB stays off: it was checked against vllm-ascend 0\.23\.0\.post1.*, and this is 0\.99\.0", server.log
        )
        assert "EPLB is on" not in server.log
        assert server.planners() == []
    finally:
        server.stop()


UNEVEN: tuple[dict[str, object], dict[str, str], str] = (
    {"num_redundant_experts": 3},
    {},
    "64 experts + 3 cannot be shared evenly by 2 ranks",
)
CONTRADICTED = [
    ({}, {"DYNAMIC_EPLB": "false"}, "export DYNAMIC_EPLB=true"),
    ({}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "export VLLM_USE_V2_MODEL_RUNNER=0"),
]
if serving.SECOND_RUNNER:
    CONTRADICTED = [({}, {"DYNAMIC_EPLB": "true"}, "export DYNAMIC_EPLB=false")]
elif serving.ASCEND != serving.RELEASE:
    del CONTRADICTED[1]


@pytest.mark.parametrize(("settings", "variables", "words"), [UNEVEN, *CONTRADICTED])
def test_impossible_setting_ends_the_start_with_one_line(
    tmp_path: Path, settings: dict[str, object], variables: dict[str, str], words: str
) -> None:
    nursery = npus.nursery(serving.python_path(), serving.PRELOADED)
    server = NpuServer({**SETTINGS, **settings}, tmp_path, nursery=nursery, **variables)
    server.start()
    try:
        deadline = time.monotonic() + serving.START_SECONDS
        while server.running() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not server.running()
    finally:
        server.stop(5)
    assert words in server.log
    assert "EngineCore" not in server.log
