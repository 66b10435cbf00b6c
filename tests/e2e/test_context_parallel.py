# SPDX-License-Identifier: Apache-2.0
"""Requests that are divided over two GPUs by position: the keys and values of each (decode context parallelism), or the
tokens of each prompt (prefill context parallelism). Tokens stay equal while experts move. Run with ``pytest -m cuda``.

Latent attention has no kernel for float32, so the model is in bfloat16, with one expert per token and results that do
not depend on the batch.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from .conftest import BUSY, prompts
from .in_step import assert_counted_once, assert_one_rank_counts
from .mla_model import EXPERTS, LAYERS, write_mla_model
from .test_cuda import ARGUMENTS, CYCLES, V2, assert_balanced
from .test_offline import TOKENS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]

WAYS = {
    "decode": {"ranks": 2, "arguments": {"decode_context_parallel_size": 2}},
    "prefill": {"ranks": 1, "arguments": {"prefill_context_parallel_size": 2}},
}
"""By kind of context parallelism: tensor-parallel ranks, which share keys and values, and arguments."""

INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_mla_model(tmp_path_factory.mktemp("latent") / "mla")


@pytest.fixture(scope="module", params=[("decode", "V1"), ("decode", "V2"), ("prefill", "V2")], ids="-".join)
def served(request, runs, model):
    """The tokens without balancing, and a run with it. vLLM's first runner has no prefill context parallelism."""
    kind, runner = request.param

    def run(eplb, **more):
        found = runs(
            f"context parallel {kind} {runner} {eplb is None}",
            True,
            ranks=WAYS[kind]["ranks"],
            eplb=eplb,
            arguments={
                **ARGUMENTS,
                **WAYS[kind]["arguments"],
                "model": str(model),
                "dtype": "bfloat16",
                "attention_backend": "TRITON_MLA",
                "enable_expert_parallel": True,
                "enable_prefix_caching": False,
            },
            variables={**INVARIANT, "VLLM_USE_V2_MODEL_RUNNER": V2[runner]},
            prompts=prompts(6),
            max_tokens=TOKENS,
            **more,
        )
        assert found.code == 0, found.log[-6000:]
        assert ("Using V2 Model Runner" in found.log) is (runner == "V2")
        return found.result

    return kind, run(None)["tokens"], run(BUSY, probe=True, cycles=CYCLES, corrupt=True)


def test_tokens_are_those_without_balancing(served):
    _, expected, balanced = served
    assert_balanced(balanced, expected, LAYERS * EXPERTS)


def test_every_pair_is_counted_once(served):
    """With prefill context parallelism each rank counts its part of a batch; else both see the whole batch, and one of
    them counts it."""
    kind, _, balanced = served
    ranks = balanced["ranks"]
    if kind == "prefill":
        assert ranks[0]["routed"] != ranks[1]["routed"]
        assert_counted_once(ranks, balanced["computed"], top_k=1)
        return
    assert ranks[0]["counted"] == ranks[0]["routed"] == ranks[1]["routed"]
    assert ranks[0]["counted"] == [balanced["computed"]] * LAYERS
    assert_one_rank_counts(ranks)
