# SPDX-License-Identifier: Apache-2.0
"""Quantise the experts of examples/tiny_moe to W8A8: in the form that vllm-ascend reads (ModelSlim's ``W8A8_DYNAMIC``),
and as a model of transformers.

    python -m tests.npu.quantised FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")


def int8_rows(values: torch.Tensor, scale_type: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every row to whole numbers and a scale; the largest magnitude of a row becomes 127.

    Args:
        values: [..., columns].
        scale_type: dtype to which the scale is rounded.

    Returns:
        float32 [..., columns] of whole numbers, scale_type [..., 1].
    """
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30).to(scale_type)
    return torch.round(values.float() / scale.float()).clamp(-127, 127), scale


def make(folder: Path) -> None:
    """Write the quantised model into an empty folder; its scales are exact in float16."""
    for path in MODEL.iterdir():
        if path.suffix == ".json":
            (folder / path.name).symlink_to(path)
    tensors, description = {}, {"model_quant_type": "W8A8_DYNAMIC"}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        description[name] = "FLOAT"
        tensors[name] = tensor
        if EXPERT.match(name):
            whole, scale = int8_rows(tensor, torch.float16)
            tensors[name] = whole.to(torch.int8)
            tensors[f"{name}_scale"] = scale.float()
            tensors[f"{name}_offset"] = torch.zeros_like(scale.float())
            description |= dict.fromkeys((name, f"{name}_scale", f"{name}_offset"), "W8A8_DYNAMIC")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "quant_model_description.json").write_text(json.dumps(description))


def _experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' loop over experts, with rows rounded to int8 before every product."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        whole, scale = int8_rows(rows, torch.float32)
        return whole * scale

    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, place = torch.where(index == expert)
        gate, up = torch.nn.functional.linear(rounded(hidden[token]), self.gate_up_proj[expert]).chunk(2, dim=-1)
        result = torch.nn.functional.linear(rounded(self.act_fn(gate) * up), self.down_proj[expert])
        out.index_add_(0, token, result * weights[token, place, None])
    return out


def quantise(model: Any, folder: Path) -> None:
    """Give transformers' model of examples/tiny_moe the experts that :func:`make` wrote, and int8 arithmetic."""
    layers = model.model.layers
    type(layers[0].mlp.experts).forward = _experts
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if found := EXPERT.match(name):
                experts = layers[int(found[1])].mlp.experts
                value, expert = tensor.float() * tensors[f"{name}_scale"], int(found[2])
                if found[3] == "down":
                    experts.down_proj[expert] = value
                else:
                    experts.gate_up_proj[expert].chunk(2)[found[3] == "up"].copy_(value)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
