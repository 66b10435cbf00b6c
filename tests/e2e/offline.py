# SPDX-License-Identifier: Apache-2.0
"""One offline vLLM engine in a process of its own: ``python offline.py JOB.json RESULT.json``.

The job is a dictionary: ``ranks``, ``eplb`` (the eplb_config or null), ``compile``, ``max_tokens``, ``prompts`` (a list
of batches), ``cycles`` (the prompts are repeated until so many cycles are done), and ``probe`` / ``corrupt`` (see
probes.py; what is corrupted is corrupted after all that, for one more turn). The result holds the token ids of every
prompt, turn by turn.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MOST_TURNS = 20
MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe"


def environment(ranks: int) -> dict[str, str]:
    """What vLLM's CPU backend needs for ``ranks`` workers on a small machine."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main(job_path: str, result_path: str) -> None:
    import probes
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_path).read_text())
    expert_parallel = {}
    if job["eplb"] is not None:
        expert_parallel = {"enable_expert_parallel": True, "additional_config": {"eplb_config": job["eplb"]}}
    llm = LLM(
        str(MODEL),
        dtype="float32",
        seed=0,
        max_model_len=512,
        max_num_seqs=16,
        tensor_parallel_size=job["ranks"],
        enforce_eager=not job.get("compile", False),
        **expert_parallel,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    result: dict[str, object] = {}
    if job.get("probe"):
        llm.collective_rpc(probes.install)

    def turn() -> list[list[int]]:
        answers = [llm.generate(batch, sampling, use_tqdm=False) for batch in job["prompts"]]
        return [list(output.outputs[0].token_ids) for batch in answers for output in batch]

    tokens = []
    for _ in range(MOST_TURNS):
        tokens += turn()
        if max(llm.collective_rpc(probes.cycles_done), default=0) >= job.get("cycles", 0):
            break
    result["tokens"] = tokens
    if job["eplb"] is not None:
        result["ranks"] = llm.collective_rpc(probes.report)
    if job.get("corrupt"):
        llm.collective_rpc(probes.switch_maps_without_weights)
        result["corrupt_tokens"] = turn()
    llm.llm_engine.engine_core.shutdown()
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
