# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on two GPUs, with both model runners, eager and with captured graphs: tokens stay equal while
experts move, and counts are the routers' own. Run with ``pytest -m cuda``."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from .conftest import BUSY, prompts
from .in_step import assert_counted_once, assert_one_rank_counts
from .test_draft_model import (  # noqa: F401  the tests, with the engines of this module
    drafting,
    in_parallel,
    test_data_parallel_engines_draft_the_same,
    test_draft_model_load_is_its_routers_own_choice,
    test_experts_of_both_models_move,
    test_maps_without_weights_change_draft_tokens,
    test_tokens_and_draft_tokens_are_equal,
)
from .test_offline import TOKENS, assert_equal_every_turn, equal_tokens
from .test_sequence_parallel import TOP_K

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]
ARGUMENTS = {
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 2**30,  # fixed, so that several engines can share the GPUs
    "attention_backend": "TRITON_ATTN",  # computes in float32
    "disable_custom_all_reduce": True,
}
WHOLE = {"TRITON_F32_DEFAULT": "ieee"}
"""Without this Triton multiplies in TF32. Two GPUs, and moved experts, change the order of sums and so the last bits.
In TF32 that would change a token if two tokens are nearly as likely, also without balancing."""

PARALLEL = {
    "ranks": 1,
    "arguments": {**ARGUMENTS, "data_parallel_size": 2, "enable_prefix_caching": False},
    "parts": [None, 0, 1, None],
}

MICRO_BATCHES = {"enable_dbo": True, "dbo_decode_token_threshold": 2, "dbo_prefill_token_threshold": 2}

V2 = {"V1": "0", "V2": "1"}
"""VLLM_USE_V2_MODEL_RUNNER by runner."""

CYCLES = 12


@pytest.fixture(scope="module", params=list(V2))
def runner(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(runs) -> list[list[int]]:
    """Tokens of one GPU without expert parallelism."""
    asked = {"prompts": prompts(6), "max_tokens": TOKENS}
    run = runs("one gpu", True, reference=True, ranks=1, eplb=None, arguments=ARGUMENTS, variables=WHOLE, **asked)
    assert run.code == 0, run.log[-6000:]
    return run.result["tokens"]


@pytest.fixture(scope="module")
def eager(runner, runs):
    return _balanced(runs, runner, BUSY, probe=True)


@pytest.fixture(scope="module")
def captured(runner, runs):
    return _balanced(runs, runner, {**BUSY, "weighted_dispatch": True}, compile=True)


@pytest.fixture(scope="module")
def workers_of_ray(runner, runs):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    arguments = {**ARGUMENTS, "distributed_executor_backend": "ray"}
    return _balanced(runs, runner, BUSY, probe=True, compile=False, arguments=arguments)


@pytest.fixture(scope="module")
def drafter_job(tmp_path_factory):
    return drafting(tmp_path_factory)


@pytest.fixture(scope="module")
def plain(runner, runs, drafter_job):
    return _drafted(runs, drafter_job, runner, ranks=1, eplb=None)


@pytest.fixture(scope="module")
def plain_on_two(plain):
    """Attention computes in float32: two ranks answer as one."""
    return plain


@pytest.fixture(scope="module")
def drafted(runner, runs, drafter_job):
    return _drafted(runs, drafter_job, runner, ranks=2, eplb=BUSY, cycles=CYCLES, corrupt=True)


@pytest.fixture(scope="module")
def drafted_in_parallel(runner, runs, drafter_job):
    return _drafted(runs, in_parallel(drafter_job), runner, ranks=1, eplb=BUSY, cycles=CYCLES)


def _drafted(runs, job, runner: str, **more):
    """A model and its draft model, both with experts."""
    arguments = {**ARGUMENTS, **job["arguments"]}
    variables = {**WHOLE, "VLLM_USE_V2_MODEL_RUNNER": V2[runner]}
    run = runs(
        f"drafter {runner} {list(more)} {list(job['arguments'])}",
        True,
        **{**job, **more, "arguments": arguments, "variables": variables},
    )
    assert run.code == 0, run.log[-6000:]
    assert ("Using V2 Model Runner" in run.log) is (runner == "V2")
    return run.result


@pytest.fixture(scope="module")
def parallel(runner, runs):
    """Two data-parallel engines. In turns, the prompts go to both, to the first, to the second, and to both again."""
    return _balanced(runs, runner, BUSY, probe=True, **PARALLEL)


@pytest.fixture(scope="module")
def parallel_captured(runner, runs):
    return _balanced(runs, runner, {**BUSY, "weighted_dispatch": True}, compile=True, **PARALLEL)


@pytest.fixture(scope="module")
def in_micro_batches(runner, runs):
    """Data-parallel engines that split their batches. On CUDA vLLM asserts a backend whose kernels no test machine has;
    without assertions it splits batches around its own collectives, as it does on ROCm."""
    arguments = {**PARALLEL["arguments"], **MICRO_BATCHES}
    return _balanced(runs, runner, BUSY, probe=True, unasserted=True, **{**PARALLEL, "arguments": arguments})


@pytest.fixture(scope="module")
def micro_batches_captured(runner, runs):
    """The same, with graphs of whole decode steps. The threads of two micro-batches cannot compile at the same time, so
    nothing is compiled."""
    if runner == "V2":
        pytest.skip("vLLM 0.33 replays no such graphs: its first request has no answer, without balancing, too")
    graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    arguments = {**PARALLEL["arguments"], **MICRO_BATCHES, **graphs}
    given = {**PARALLEL, "arguments": arguments}
    return _balanced(runs, runner, BUSY, split=True, compile=True, unasserted=True, **given)


def _balanced(runs, runner: str, config, ranks: int = 2, arguments=ARGUMENTS, unasserted=False, **more):
    run = runs(
        f"{runner} {ranks} {list(more)} {unasserted}",
        True,  # a process that has imported vLLM may hold the GPUs, so none is forked
        ranks=ranks,
        eplb=config,
        arguments=arguments,
        variables={**WHOLE, "VLLM_USE_V2_MODEL_RUNNER": V2[runner], **({"PYTHONOPTIMIZE": "1"} if unasserted else {})},
        prompts=prompts(6),
        cycles=CYCLES,
        max_tokens=TOKENS,
        corrupt=True,
        **more,
    )
    assert run.code == 0, run.log[-6000:]
    assert ("Using V2 Model Runner" in run.log) is (runner == "V2")
    assert ("Graph capturing finished" in run.log) is more.get("compile", False)
    return run.result


def assert_balanced(result, expected, experts: int = 6 * 64) -> None:
    """Assert that experts moved equally on both ranks and no token changed; a planted fault must change tokens.

    Args:
        experts: of all layers.
    """
    first, second = result["ranks"]
    stats = json.loads(first["stats"])
    assert stats["cycles_done"] >= 10
    assert stats["cycles_failed"] == 0
    assert stats["experts_moved"] > 10 * experts / 2
    for key in ("digest", "step", "cycle", "phase"):
        assert first[key] == second[key]
    assert first["views"]
    assert second["views"]
    assert first["async_scheduling"]  # steps are scheduled ahead of the device
    assert_equal_every_turn(result["tokens"], expected)
    same, total = equal_tokens(result["corrupt_tokens"], expected)
    assert same < total * 0.9


def test_tokens_equal_those_of_one_gpu_while_experts_move(eager, expected):
    assert_balanced(eager, expected)


def test_captured_graphs_are_replayed_while_experts_move(captured, expected):
    assert_balanced(captured, expected)
    assert json.loads(captured["ranks"][0]["stats"])["dispatch_updates"] >= 10


def test_captured_graphs_of_data_parallel_are_replayed(parallel_captured, expected):
    assert_balanced(parallel_captured, expected)


def test_workers_of_ray_answer_as_one_gpu(workers_of_ray, expected):
    assert_balanced(workers_of_ray, expected)


def test_recorded_load_is_the_routers_own_choice(eager):
    assert_one_rank_counts(eager["ranks"])


def test_data_parallel_engines_answer_as_one_gpu(parallel, expected):
    assert_balanced(parallel, expected)


def test_data_parallel_engines_count_every_pair_once(parallel):
    assert_counted_once(parallel["ranks"], parallel["computed"], TOP_K)


def test_data_parallel_engines_stay_in_step_with_one_idle(parallel):
    first, second = parallel["ranks"]
    assert first["history"] == second["history"]
    assert len(first["history"]) > 350
    assert all(rank["idle"] > 90 for rank in (first, second))


def test_tokens_are_equal_in_micro_batches(in_micro_batches, expected):
    assert_balanced(in_micro_batches, expected)


def test_captured_micro_batches_are_replayed(micro_batches_captured, expected):
    assert_balanced(micro_batches_captured, expected)
    assert all(rank["split"] > 100 for rank in micro_batches_captured["ranks"])


def test_micro_batches_count_every_pair_once(in_micro_batches):
    assert all(rank["split"] > 100 for rank in in_micro_batches["ranks"])
    assert_counted_once(in_micro_batches["ranks"], in_micro_batches["computed"], TOP_K)
