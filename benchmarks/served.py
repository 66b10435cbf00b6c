# SPDX-License-Identifier: Apache-2.0
"""The engine that benchmarks on a CPU measure: vLLM with the tiny model on two expert-parallel ranks."""

from __future__ import annotations

from typing import Any

RANKS = 2


def cpu_engine(requests: int, eplb_config: dict[str, Any], **more: Any) -> Any:
    """Starts it; ``cpu_environment(RANKS)`` must be set.

    Args:
        requests: most that are served at once.
        eplb_config: the settings of the balancer.
        more: further arguments of vLLM's ``LLM``.
    """
    from vllm import LLM

    from examples.demo.server import MODEL

    return LLM(
        str(MODEL),
        dtype="float32",
        seed=0,
        max_model_len=512,
        max_num_seqs=requests,
        tensor_parallel_size=RANKS,
        enforce_eager=True,
        enable_expert_parallel=True,
        additional_config={"eplb_config": eplb_config},
        **more,
    )
