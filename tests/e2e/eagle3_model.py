# SPDX-License-Identifier: Apache-2.0
"""A draft model for examples/tiny_moe (EAGLE-3): Llama's architecture without experts, with random weights. It takes
hidden states of the model's layers, so its draft tokens depend on the experts; few of them are accepted.

    python -m tests.e2e.eagle3_model FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from .random_weights import RandomWeights, under, write_model

HIDDEN, HEADS, GROUPS, HEAD, INNER, VOCABULARY = 128, 4, 2, 32, 256, 4096
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "draft_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
}


def write_eagle3_model(folder: Path) -> None:
    """Write the draft model into a new folder. The weights are always the same."""
    drawn = RandomWeights(HIDDEN)
    layer = {
        **drawn.norm("hidden_norm"),
        **drawn.norm("input_layernorm"),
        **drawn.norm("post_attention_layernorm"),
        **under("mlp", drawn.mlp(INNER)),
        "self_attn.o_proj.weight": drawn.matrix(HIDDEN, HEADS * HEAD),
    }
    for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
        layer[f"self_attn.{name}_proj.weight"] = drawn.matrix(heads * HEAD, 2 * HIDDEN)
    weights = {
        **under("midlayer", layer),
        "fc.weight": drawn.matrix(HIDDEN, 3 * HIDDEN),
        **drawn.norm("norm"),
        "lm_head.weight": drawn.matrix(VOCABULARY),
    }
    write_model(folder, CONFIG, weights, tokenizer=False)


if __name__ == "__main__":
    write_eagle3_model(Path(sys.argv[1]))
