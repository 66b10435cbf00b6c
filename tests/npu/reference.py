# SPDX-License-Identifier: Apache-2.0
"""Compute the greedy answers of a model with transformers in float32 on the CPU, without vLLM and torch_npu. With a
folder of quantised.py, the experts of examples/tiny_moe are in W8A8.

    python -m tests.npu.reference JOB.json ANSWER.json [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .quantised import quantise


def answer(texts: list[str], tokens: int, folder: Path, quantised: Path | None) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if quantised is not None:
        quantise(model, quantised)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, max_new_tokens=tokens
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    quantised = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    Path(sys.argv[2]).write_text(json.dumps(answer(job["texts"], job["tokens"], Path(job["model"]), quantised)))
