# SPDX-License-Identifier: Apache-2.0
"""A process of test_serving.py: vllm-ascend, unmodified, with TP2 and expert parallelism on emulated NPUs.

    python -m tests.npu.serve MODEL MODE REDUNDANT ANSWER

MODE: "off" (no balancing) or "ours". ANSWER: file for the greedy tokens, as JSON.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    model, mode, redundant, answer = sys.argv[1:5]
    from vllm import LLM, SamplingParams

    settings = {}
    if mode == "ours":
        from vllm_ascend_eplb.adaptors import ascend

        settings = ascend.hand_over(
            {
                "eplb_config": {
                    "dynamic_eplb": True,
                    "num_redundant_experts": int(redundant),
                    "expert_heat_collection_interval": 12,
                    "algorithm_execution_interval": 2,
                    "transport": "hccl",
                }
            }
        )
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        distributed_executor_backend="mp",
        max_num_seqs=8,
        num_gpu_blocks_override=128,
        enable_prefix_caching=False,
        additional_config=settings,
    )
    prompts = ["hello world", "the cat sat", "once upon a time", "def f(x):"] * 2
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    Path(answer).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
