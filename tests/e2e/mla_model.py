# SPDX-License-Identifier: Apache-2.0
"""A small model with latent attention (MLA) and experts: DeepSeek-V2's architecture with random weights. Its text is
meaningless, but every token depends on the experts that computed it.

A token has one expert, and the shared expert, which the architecture must have, gives zeros. So a token's result is a
sum of one expert and of zeros, which is the same to the last bit wherever the expert lies.

    python -m tests.e2e.mla_model FOLDER

``write_eagle_draft`` writes a draft model for it (EAGLE), which has experts, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from .random_weights import RandomWeights, Weights, under, write_model

LAYERS, EXPERTS, HIDDEN, HEADS, INNER = 3, 32, 128, 4, 64
LATENT, ROTARY, PLAIN, VALUE = 512, 64, 128, 128
"""Sizes of the attention, which are DeepSeek-V2's, because kernels take no others."""

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 4096,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": LATENT,
    "q_lora_rank": None,
    "qk_rope_head_dim": ROTARY,
    "qk_nope_head_dim": PLAIN,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_mla_model(folder: Path) -> Path:
    """Write the model into a new folder, with the tokenizer of examples/tiny_moe. The weights are always the same."""
    return write_model(folder, CONFIG, _rounded(_weights()))


def write_eagle_draft(folder: Path) -> Path:
    """Write a draft model for the model into a new folder. Embedding and output layer are those of the model."""
    config = {**CONFIG, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 1}
    drawn = RandomWeights(HIDDEN)
    weights = {**under("layers.0", _layer(drawn)), "fc.weight": drawn.matrix(HIDDEN, 2 * HIDDEN)}
    for name in ("enorm", "hnorm", "norm"):
        weights |= drawn.norm(name)
    return write_model(folder, config, _rounded(weights), tokenizer=False)


def _rounded(weights: Weights) -> Weights:
    return {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}


def _weights() -> Weights:
    drawn = RandomWeights(HIDDEN)
    found = {"model.embed_tokens.weight": drawn.embedding(4096), "lm_head.weight": drawn.matrix(4096)}
    found |= drawn.norm("model.norm")
    for number in range(LAYERS):
        found |= under(f"model.layers.{number}", _layer(drawn))
    return found


def _layer(drawn: RandomWeights) -> Weights:
    shared = drawn.mlp(INNER)
    shared["down_proj.weight"].zero_()
    return {
        **under("mlp.shared_experts", shared),
        **drawn.norm("input_layernorm"),
        **drawn.norm("post_attention_layernorm"),
        **drawn.norm("self_attn.kv_a_layernorm", LATENT),
        "self_attn.q_proj.weight": drawn.matrix(HEADS * (PLAIN + ROTARY)),
        "self_attn.kv_a_proj_with_mqa.weight": drawn.matrix(LATENT + ROTARY),
        "self_attn.kv_b_proj.weight": drawn.matrix(HEADS * (PLAIN + VALUE), LATENT),
        "self_attn.o_proj.weight": drawn.matrix(HIDDEN, HEADS * VALUE),
        **drawn.experts(EXPERTS, INNER),
    }


if __name__ == "__main__":
    write_mla_model(Path(sys.argv[1]))
