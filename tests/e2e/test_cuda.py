# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on two GPUs, with either of its model runners: the same tokens whatever moves, eager and from
captured graphs, and counts that are the routers' own. For machines that have them: ``pytest -m cuda``."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from .conftest import BUSY, prompts
from .test_offline import TOKENS, assert_equal_every_turn, equal_tokens

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]
ARGUMENTS = {
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 2**30,  # not measured, so that others may use these GPUs at the same time
    "attention_backend": "TRITON_ATTN",  # the one that computes in float32
    "disable_custom_all_reduce": True,
}
WHOLE = {"TRITON_F32_DEFAULT": "ieee"}
"""Triton would round to TF32 before it multiplies. Sums come in another order once experts have moved, and what that
changes in the last bit would grow until a token changes here and there."""

V2 = {"V1": "0", "V2": "1"}
"""VLLM_USE_V2_MODEL_RUNNER for each of the two."""

CYCLES = 12


@pytest.fixture(scope="module")
def expected(runs) -> list[list[int]]:
    """Tokens of one GPU without expert parallelism."""
    asked = {"prompts": prompts(6), "max_tokens": TOKENS}
    run = runs("one gpu", ranks=1, eplb=None, arguments=ARGUMENTS, variables=WHOLE, **asked)
    assert run.code == 0, run.log[-6000:]
    return run.result["tokens"]


@pytest.fixture(scope="module", params=list(V2))
def eager(request, runs):
    return _balanced(runs, request.param, BUSY, probe=True)


@pytest.fixture(scope="module", params=list(V2))
def captured(request, runs):
    return _balanced(runs, request.param, {**BUSY, "weighted_dispatch": True}, compile=True)


def _balanced(runs, runner: str, config, **more):
    run = runs(
        f"{runner} {more}",
        ranks=2,
        eplb=config,
        arguments=ARGUMENTS,
        variables={**WHOLE, "VLLM_USE_V2_MODEL_RUNNER": V2[runner]},
        prompts=prompts(6),
        cycles=CYCLES,
        max_tokens=TOKENS,
        corrupt=True,
        **more,
    )
    assert run.code == 0, run.log[-6000:]
    assert ("Using V2 Model Runner" in run.log) is (runner == "V2")
    assert ("Graph capturing finished" in run.log) is ("compile" in more)
    return run.result


def assert_balanced(result, expected) -> None:
    """Experts moved on both ranks alike, no token changed; and with a planted fault tokens do change."""
    first, second = result["ranks"]
    stats = json.loads(first["stats"])
    assert stats["cycles_done"] >= 10
    assert stats["cycles_failed"] == 0
    assert stats["experts_moved"] > 10 * 6 * 64 / 2
    for key in ("digest", "step", "cycle", "phase"):
        assert first[key] == second[key]
    assert first["views"]
    assert second["views"]
    assert_equal_every_turn(result["tokens"], expected)
    same, total = equal_tokens(result["corrupt_tokens"], expected)
    assert same < total / 2


def test_tokens_are_those_of_one_gpu_whatever_moved(eager, expected):
    assert_balanced(eager, expected)


def test_captured_graphs_are_replayed_while_experts_move(captured, expected):
    assert_balanced(captured, expected)
    assert json.loads(captured["ranks"][0]["stats"])["dispatch_updates"] >= 10


def test_the_recorded_load_is_the_routers_own_choice(eager):
    first, second = eager["ranks"]
    loads, windows = np.array(first["loads"]), np.array(first["windows"])
    assert len(loads) >= 10
    np.testing.assert_array_equal(loads, windows[: len(loads)])
    assert len(set(loads.sum(axis=2).ravel().tolist())) > 1
    np.testing.assert_array_equal(np.array(second["windows"]), windows)
