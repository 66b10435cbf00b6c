# SPDX-License-Identifier: Apache-2.0
"""The reference answers: one process, no expert parallelism, no balancer.

Usage: python -m examples.demo.reference MAX_NEW_TOKENS MAX_NUM_SEQS DOMAIN... > tokens.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from examples.demo.server import MAX_TOKENS_PER_REQUEST, MODEL, REPOSITORY, cpu_environment
from examples.tiny_moe.expert_load import read_prompts


def reference_tokens(domains: list[str], max_new_tokens: int, max_num_seqs: int) -> dict[str, list[list[int]]]:
    """Greedy token ids of each prompt of each domain, from a process of its own.

    Raises:
        RuntimeError: that process failed; the message ends with its last lines.
    """
    result = subprocess.run(
        [sys.executable, "-m", "examples.demo.reference", str(max_new_tokens), str(max_num_seqs), *domains],
        cwd=REPOSITORY,
        env=cpu_environment(1) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = "\n".join(result.stderr.splitlines()[-30:])
        raise RuntimeError(f"the run without balancing ended with status {result.returncode}:\n{last}")
    answers: dict[str, list[list[int]]] = json.loads(result.stdout.splitlines()[-1])
    return answers


def main() -> None:
    from vllm import LLM, SamplingParams

    max_new_tokens, max_num_seqs, domains = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_TOKENS_PER_REQUEST,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True)
    prompts = {domain: read_prompts(domain) for domain in domains}
    outputs = iter(llm.generate([text for texts in prompts.values() for text in texts], sampling, use_tqdm=False))
    answers = {domain: [list(next(outputs).outputs[0].token_ids) for _ in texts] for domain, texts in prompts.items()}
    print(json.dumps(answers), flush=True)
    os._exit(0)  # do not wait for the engine's threads


if __name__ == "__main__":
    main()
