# SPDX-License-Identifier: Apache-2.0
"""A small model of DeepSeek's class (DeepseekV2ForCausalLM), which loads its experts by itself: the random weights of
mtp_model.py without their draft model. It has plain attention instead of latent attention (MLA), which no emulated
operator computes. vLLM's configuration of DeepSeek always has latent attention, so it has GLM's.

    python -m tests.e2e.deepseek_model FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from .mtp_model import CONFIG as GLM
from .mtp_model import mtp_weights
from .random_weights import write_model

CONFIG = {
    **GLM,
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
    return write_model(folder, CONFIG, mtp_weights(draft_model=False))


if __name__ == "__main__":
    write_deepseek_model(Path(sys.argv[1]))
