# SPDX-License-Identifier: Apache-2.0
"""Count which experts the prompts of this folder use, in one process, with transformers.

Usage: python examples/tiny_moe/expert_load.py [--new-tokens 48] [--ranks 2,4,8]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_ascend_eplb import Placement

FOLDER = Path(__file__).resolve().parent


def read_prompts(domain: str) -> list[str]:
    lines = (FOLDER / "prompts" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def domains() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "prompts").glob("*.jsonl"))


def expert_load(prompts: list[str], new_tokens: int) -> npt.NDArray[np.int64]:
    """int64 [layers, experts]: tokens per expert over the prompts and their greedy continuations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    config = model.config
    load = np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64)
    with torch.inference_mode():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            ids = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=2)
            # the last token was generated but not routed
            logits = model(ids[:, :-1], output_router_logits=True, use_cache=False).router_logits
            for layer, scores in enumerate(logits):
                chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices
                load[layer] += np.bincount(chosen.flatten().numpy(), minlength=config.num_experts)
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--ranks", default="2,4,8")
    args = parser.parse_args()
    ranks = [int(text) for text in args.ranks.split(",")]
    loads = {domain: expert_load(read_prompts(domain), args.new_tokens) for domain in domains()}
    loads["all together"] = sum(loads.values(), np.zeros_like(next(iter(loads.values()))))
    print(f"{'domain':14s} {'tokens':>7s} {'max/mean':>9s} " + " ".join(f"{f'PAR, {r} ranks':>15s}" for r in ranks))
    for domain, load in loads.items():
        cells = []
        for count in ranks:
            par = Placement.initial(*load.shape, count).par(load)
            cells.append(f"{f'{par.mean():.3f} ({par.max():.3f})':>15s}")
        skew = (load.max(axis=1) / load.mean(axis=1)).mean()
        print(f"{domain:14s} {load[0].sum() // 4:7d} {skew:9.2f} " + " ".join(cells))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
