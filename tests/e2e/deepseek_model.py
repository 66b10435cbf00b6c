# SPDX-License-Identifier: Apache-2.0
"""A small model of DeepSeek's class (DeepseekV2ForCausalLM), which loads its experts by itself: the random weights of
mtp_model.py without their draft model. It has plain attention instead of latent attention (MLA), which no emulated
operator computes. vLLM's configuration of DeepSeek always has latent attention, so it has GLM's.

    python -m tests.e2e.deepseek_model FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from .mtp_model import write_mtp_model

CHANGES = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_nextn_predict_layers": 0,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}


def write_deepseek_model(folder: Path) -> Path:
    """Write the model into a new folder, with the tokenizer of examples/tiny_moe. The weights are always the same."""
    config, weights = write_mtp_model(folder) / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **CHANGES}))
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("model.layers.3.")}
    save_file(kept, weights, metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    write_deepseek_model(Path(sys.argv[1]))
