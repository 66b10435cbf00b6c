# SPDX-License-Identifier: Apache-2.0
"""What vLLM cannot run on a CPU, by its own sources: the reason why some options are refused, or shown on GPUs only.

A vLLM that can run one of them fails here, so that a person lifts the refusal with a test, or finds another reason.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest


def part(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(module), name)


def test_attention_on_a_cpu_has_no_context_parallelism() -> None:
    """``check_attention_cp_compatibility`` asks for these two: one for prefill, one for decode."""
    attention = part("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend").get_impl_cls()
    assert attention.supports_pcp is False
    assert attention.can_return_lse_for_decode is False


def test_micro_batches_run_on_cuda_streams_only() -> None:
    """The wrapper of a micro-batched model makes a CUDA stream, and the runner for CPUs has no such wrapper."""
    wrapper = part("vllm.v1.worker.gpu_ubatch_wrapper", "UBatchWrapper")
    assert "torch.cuda.Stream" in inspect.getsource(wrapper.__init__)
    runner = part("vllm.v1.worker.cpu_model_runner", "CPUModelRunner")
    assert "load_model" in vars(runner)
    assert "UBatchWrapper" not in inspect.getsource(runner)
    platform = part("vllm.platforms.cpu", "CpuPlatform")
    assert "parallel_config.enable_dbo = False" in inspect.getsource(platform.check_and_update_config)


def test_draft_models_of_deepseek_v4_are_not_there_on_a_cpu() -> None:
    pytest.importorskip("vllm.config")
    try:
        module = importlib.import_module("vllm.models.deepseek_v4.cpu.dspark")
    except ImportError:
        pytest.skip("this vLLM has no DSpark")
    with pytest.raises(NotImplementedError):
        module.DSparkDeepseekV4ForCausalLM(vllm_config=None)
