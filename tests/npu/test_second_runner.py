# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's second model runner (NPU_TEST_RUNNER=V2): weighted dispatch, its stand-ins, and its own EPLB without
this package. test_serving.py and its neighbours test our balancer with this runner, under the same variable."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ..processes import title
from . import npus
from .serving import (
    MISSING,
    SECOND_RUNNER,
    SETTINGS,
    TOKENS,
    NpuServer,
    freeze_weights_until_noticed,
    python_path,
    serve_until,
)

pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.skipif(not SECOND_RUNNER, reason="only for the second model runner; set NPU_TEST_RUNNER=V2"),
]


def run(function: str) -> Any:
    outcome = npus.run("second_runner", function, PYTHONPATH=python_path(), TRITON_INTERPRET="1")
    return outcome.results[0]


@pytest.mark.parametrize("device", ["A2", "A3"])
def test_tokens_are_split_by_planned_shares(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]], device: str
) -> None:
    """Weighted dispatch, which the first runner does not have: tables change with and between placements. Ranks that
    route the same tokens have the same tables."""
    settings = {**SETTINGS, "weighted_dispatch": True, "num_redundant_experts": 8}
    server = NpuServer(settings, tmp_path, device=device, probe=True).started()
    try:
        server.call("probe_watch")
        serve_until(server, batches, want, 4)
        stats = server.stats()
        assert stats is not None
        assert stats.cycles_failed == 0
        assert stats.dispatch_updates > 0
        first, second = server.call("probe_tables")
        assert (first == second) == (device == "A2")
        if device == "A2":
            loads = np.array(server.call("probe_watched")[0]["loads"])
            windows = np.array(server.call("probe_watched")[0]["windows"])
            np.testing.assert_array_equal(loads, windows[: len(loads)])
        assert not server.unexpected_races()[:3]
        freeze_weights_until_noticed(server, batches, want)
    finally:
        server.stop()


def test_stand_ins_equal_the_kernels() -> None:
    assert run("kernels") == {"map": [True] * 6, "record": [True] * 4, "rope": [True] * 4}


def test_stock_tables_name_other_copies_on_each_rank() -> None:
    """vllm-ascend's own EPLB: if ranks route the same gathered tokens, all ranks compute a token, or none does."""
    assert run("tables") == [0, 1024]


def test_stock_policy_misses_the_best_swap() -> None:
    """STAIR, if each rank may receive one expert per layer (``rank_transfer_limit`` 1, which vllm-ascend also sets
    where HIXL is missing). Our plan is as good as the best swap of all."""
    found = run("one_move_per_rank")
    assert found["ours"] == pytest.approx(found["best"])
    assert max(found["stair"]) > 1.25
    assert max(found["ours"]) < 1.1
    assert found["stair"][0] == found["start"][0] > found["ours"][0]


@pytest.mark.parametrize("copies", [0, 2])
def test_stock_eplb_is_right_only_without_copies(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]], copies: int
) -> None:
    """vllm-ascend's own EPLB on A2; with copies answers are wrong from the start, before any expert has moved. If its
    planner dies while it plans, the server ends."""
    settings = json.dumps({"num_redundant_experts": copies, "window_size": 12, "step_interval": 12, "use_async": True})
    server = NpuServer(None, tmp_path, arguments=("--enable-eplb", "--eplb-config", settings)).started()
    try:
        assert (server.complete(batches[0], TOKENS) == want[0]) == (copies == 0)
        assert ([server.complete(batch, TOKENS) for batch in batches] == want) == (copies == 0)
        assert "Ascend async EPLB cycle committed" in server.log
        assert "EPLB is on" not in server.log
        if copies == 0:
            end_planner_while_it_plans(server, batches)
    finally:
        server.stop()


def end_planner_while_it_plans(server: NpuServer, batches: list[list[str]]) -> None:
    """Stop a rank's process of STAIR, let it be asked, and kill it. The next step ends the server."""
    planner, _ = [process for process in server.processes() if "_stair_process" in title(process)]
    os.kill(planner, signal.SIGSTOP)
    for batch in batches:  # several windows
        server.complete(batch, TOKENS)
    os.kill(planner, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while server.running():
        assert time.monotonic() < deadline, server.log[-3000:]
        with contextlib.suppress(httpx.HTTPError):
            server.complete(batches[0], TOKENS)
    for line in (
        "async loop error (Rank 0): STAIR",
        "async loop error (Rank 1): STAIR",
        "STAIR planner subprocess terminated unexpectedly",
        "EPLB background worker terminated unexpectedly",
    ):
        assert line in server.log
