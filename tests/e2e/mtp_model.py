# SPDX-License-Identifier: Apache-2.0
"""A small model with a draft model in its checkpoint (multi-token prediction), both with experts: GLM-4.5's
architecture with random weights. Its text is meaningless, but every token depends on the experts that computed it.

    python -m tests.e2e.mtp_model FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .random_weights import RandomWeights, Weights, under, write_model

HIDDEN, HEADS, GROUPS, HEAD, DENSE, INNER, EXPERTS = 128, 4, 2, 32, 256, 64, 16
CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 4096,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_mtp_model(folder: Path) -> Path:
    """Write the model into a new folder, with the tokenizer of examples/tiny_moe. The weights are always the same."""
    return write_model(folder, CONFIG, mtp_weights())


def mtp_weights(draft_model: bool = True) -> Weights:
    """The weights of the model, with or without those of its draft model."""
    drawn = RandomWeights(HIDDEN)

    def layer(with_experts: bool) -> Weights:
        found = {**drawn.norm("input_layernorm"), **drawn.norm("post_attention_layernorm")}
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            found[f"self_attn.{name}_proj.weight"] = drawn.matrix(rows * HEAD)
        found["self_attn.o_proj.weight"] = drawn.matrix(HIDDEN, HEADS * HEAD)
        if not with_experts:
            return {**found, **under("mlp", drawn.mlp(DENSE))}
        found |= {**drawn.experts(EXPERTS, INNER), "mlp.gate.e_score_correction_bias": torch.zeros(EXPERTS)}
        return {**found, **under("mlp.shared_experts", drawn.mlp(INNER))}

    embedding, head = drawn.embedding(4096), drawn.matrix(4096)
    found = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, **drawn.norm("model.norm")}
    for number in range(3):
        found |= under(f"model.layers.{number}", layer(with_experts=number > 0))
    if not draft_model:
        return found
    draft = {**layer(with_experts=True), **drawn.norm("enorm"), **drawn.norm("hnorm"), **drawn.norm("shared_head.norm")}
    draft |= {"eh_proj.weight": drawn.matrix(HIDDEN, 2 * HIDDEN)}
    draft |= {"embed_tokens.weight": embedding.clone(), "shared_head.head.weight": head.clone()}
    return {**found, **under("model.layers.3", draft)}


if __name__ == "__main__":
    write_mtp_model(Path(sys.argv[1]))
