# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves examples/tiny_moe with our balancer on more ranks, with data parallelism and with
pipeline stages: the real torch_npu on emulated CANN. There is one server per way; tests run in the order of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from . import npus
from .rows import assert_rows_counted
from .serving import (
    ASCEND,
    MISSING,
    RELEASE,
    SECOND_RUNNER,
    SETTINGS,
    NpuServer,
    freeze_weights_until_noticed,
    serve_until,
)

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
DATA_PARALLEL = ("--data-parallel-size", "2")
STAGES: dict[str, Any] = {"arguments": ("--pipeline-parallel-size", "2"), "parts": ("stage0", "stage1")}
FOUR_RANKS = {**SETTINGS, "num_redundant_experts": 4}
EIGHT_RANKS = {**SETTINGS, "num_redundant_experts": 8}
SHARED_OUT = {"beside": {"enable_flashcomm1": True}}
FUSED = {"beside": {"enable_fused_mc2": 1}}
CAPTURED = {"graphs": (1, 2, 4)}
TP2: dict[str, Any] = {"eplb_config": SETTINGS, "ranks": 2}
DP2: dict[str, Any] = {"eplb_config": SETTINGS, "ranks": 1, "arguments": DATA_PARALLEL}
DP2_TP2: dict[str, Any] = {"eplb_config": FOUR_RANKS, "ranks": 2, "arguments": DATA_PARALLEL}
WAYS: dict[str, dict[str, Any]] = {
    "TP4": {"eplb_config": FOUR_RANKS, "ranks": 4},
    "DP2": DP2,
    "DP2 TP2": DP2_TP2,
    "PP2 TP2": {**TP2, **STAGES},
    "PP2 DP2": {**DP2, **STAGES, "arguments": (*STAGES["arguments"], *DATA_PARALLEL)},
    "TP4 DCP2": {"eplb_config": FOUR_RANKS, "ranks": 4, "arguments": ("--decode-context-parallel-size", "2")},
    "DP2 on A3": {**DP2, "device": "A3"},
    "DP2 TP2 on A3": {**DP2_TP2, "device": "A3"},
    "TP2 on A3, fused MC2": {**TP2, **FUSED, "device": "A3"},
    "DP2 TP2 on A3, fused MC2": {**DP2_TP2, **FUSED, "device": "A3"},
    "TP2 on A3, captured": {**TP2, **CAPTURED, "device": "A3"},
    "DP2, captured": {**DP2, **CAPTURED},
    "DP2 on A3, captured": {**DP2, **CAPTURED, "device": "A3"},
    "PP2 TP2, captured": {**TP2, **STAGES, **CAPTURED},
}
SEQUENCE_PARALLEL = {
    f"{way}, sequence parallel": {**settings, **SHARED_OUT}
    for way, settings in {
        "TP2": TP2,
        "TP2 on A3": {**TP2, "device": "A3"},
        "DP2 TP2": DP2_TP2,
        "DP2 TP2 on A3": {**DP2_TP2, "device": "A3"},
    }.items()
    if ASCEND == RELEASE or way.startswith("DP2")  # 0.30.0rc2 shares rows out for several engines only
}
"""The ways in which ranks of an engine share its rows out."""
WAYS |= SEQUENCE_PARALLEL
if ASCEND == RELEASE:
    WAYS["DP2 TP4"] = {"eplb_config": EIGHT_RANKS, "ranks": 4, "arguments": DATA_PARALLEL}
elif not SECOND_RUNNER:
    del WAYS["TP4 DCP2"]  # there it calls a Triton kernel; Triton is on the path for the second runner only


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpuServer]:
    server = NpuServer(folder=tmp_path_factory.mktemp("server"), probe=True, **WAYS[way]).started()
    server.call("probe_watch")
    server.call("probe_scatters")
    server.call("probe_replays")
    yield server
    server.stop()


def test_tokens_equal_those_of_transformers_while_moving(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    assert "EPLB is on: " in server.log
    serve_until(server, batches, want, 10)
    for stats in server.all_stats():
        assert stats is not None
        assert stats.cycles_failed == 0
        assert all(cycle.moved > 0 for cycle in stats.cycles if cycle.result == "done")


def test_single_request_moves_experts_too(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """With data parallelism, the other engine runs dummy batches meanwhile."""
    serve_until(server, [batch[:1] for batch in batches], [batch[:1] for batch in want], 2)


def test_every_token_is_counted_once_with_idle_engines(server: NpuServer, way: str) -> None:
    """Load is the tokens that slots receive, also the slots of an engine without requests. On A2 ranks gather the
    tokens before routing, so every rank sees the whole load."""
    workers = server.call("probe_watched")  # those of the first engine
    ranks, gathered = WAYS[way]["ranks"], "A3" not in way
    for first in workers[::ranks]:  # the first rank of every stage
        loads = assert_rows_counted(first, ranks, gathered, fused="fused" in way, shared_out=way in SEQUENCE_PARALLEL)
        if gathered and "captured" not in way:  # a replayed graph calls no router
            np.testing.assert_array_equal(loads, first["windows"][: len(loads)])


def test_sequence_parallel_ranks_share_rows_out(server: NpuServer, way: str) -> None:
    if way not in SEQUENCE_PARALLEL:
        pytest.skip("every rank has all rows")
    assert min(map(int, server.call("probe_scatters"))) > 0


def test_captured_graphs_are_replayed(server: NpuServer, way: str) -> None:
    if "captured" not in way:
        pytest.skip("no graphs")
    assert min(map(int, server.call("probe_replays"))) > 100


def test_every_balancer_has_a_planner_and_metrics(server: NpuServer) -> None:
    """There is one balancer, or one per pipeline stage."""
    parts = [f'part="{part}"' for part in server.parts] or ['result="done"']
    assert len(server.planners()) == len(parts)
    for part in parts:
        assert server.metric("vllm_eplb_cycles", 'result="done"', part) >= 10


def test_pipeline_stages_step_alike_and_route_alone(server: NpuServer, way: str) -> None:
    if not server.parts:
        pytest.skip("one stage")
    workers, ranks = server.call("probe_watched"), WAYS[way]["ranks"]
    for planning, *rest in (workers[:ranks], workers[ranks:]):
        assert len(planning["placement"]) == 3  # of six layers
        for routing in rest:
            assert planning["placement"] == routing["placement"]
            assert planning["windows"] == routing["windows"]
    first, last = workers[0], workers[-1]
    assert first["placement"] != last["placement"]
    assert first["windows"][0] != last["windows"][0]


def test_no_race_and_no_wrong_order(server: NpuServer) -> None:
    assert not server.unexpected_races()[:3]


def test_weights_that_did_not_move_change_tokens(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """Negative control. It runs last on this server, because it leaves wrong weights."""
    freeze_weights_until_noticed(server, batches, want)


def test_server_ends_in_order(server: NpuServer) -> None:
    assert server.stop() == []
    assert server.processes() == []
