# SPDX-License-Identifier: Apache-2.0
"""The tiny model with experts whose weights are quantised to FP8, with scales beside them.

    python -m tests.e2e.fp8_model KIND FOLDER

``channel`` is a checkpoint of compressed-tensors with a scale for each row of a weight, ``block`` one with a scale for
each block of 128 x 128, and ``online`` the checkpoint in bfloat16, which vLLM quantises itself. Experts are padded with
zeros to an inner size of 128, which changes no result, because kernels for FP8 take no less.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .offline import MODEL

INNER = 128
KINDS = ("online", "channel", "block")
_FP8 = torch.float8_e4m3fn
_OTHERS = ("q_proj", "k_proj", "v_proj", "o_proj")

Tensors = dict[str, torch.Tensor]


def write_fp8_model(kind: str, folder: Path) -> Path:
    """Write the model into a new folder. The weights are always the same."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    config = json.loads((MODEL / "config.json").read_text()) | {"moe_intermediate_size": INNER}
    tensors: Tensors = {}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        tensors |= _quantised(kind, name, _padded(name, weight)) if ".experts." in name else {name: weight}
    if kind != "online":
        config["quantization_config"] = _quantization_config(kind, int(config["num_hidden_layers"]))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _padded(name: str, weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    shape = (rows, INNER) if "down_proj" in name else (INNER, columns)
    whole = torch.zeros(shape, dtype=weight.dtype)
    whole[:rows, :columns] = weight
    return whole


def _quantised(kind: str, name: str, weight: torch.Tensor) -> Tensors:
    if kind == "online":
        return {name: weight}
    most = weight.float().abs().amax(dim=1 if kind == "channel" else (0, 1), keepdim=True)  # one block of 128 x 128
    scale = most.clamp(min=1e-6) / torch.finfo(_FP8).max
    suffix = "_scale" if kind == "channel" else "_scale_inv"
    return {name: (weight.float() / scale).to(_FP8), name + suffix: scale}


def _quantization_config(kind: str, layers: int) -> dict[str, Any]:
    if kind == "block":
        names = [f"self_attn.{name}" for name in _OTHERS] + ["mlp.gate"]
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [INNER, INNER],
            "modules_to_not_convert": [f"model.layers.{layer}.{name}" for layer in range(layers) for name in names],
        }
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"],
    }


if __name__ == "__main__":
    write_fp8_model(sys.argv[1], Path(sys.argv[2]))
