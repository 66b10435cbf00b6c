# SPDX-License-Identifier: Apache-2.0
"""Quantise the experts of examples/tiny_moe to W8A8 or W4A8: in the form that vllm-ascend reads (ModelSlim's
``W8A8_DYNAMIC`` and ``W4A8_DYNAMIC`` by channel), and as a model of transformers.

    python -m tests.npu.quantised FOLDER W8A8
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


def whole_rows(values: torch.Tensor, scale_type: torch.dtype, largest: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise every row to whole numbers and a scale; the largest magnitude of a row becomes ``largest``.

    Args:
        values: [..., columns].
        scale_type: dtype to which the scale is rounded.
        largest: 127 for int8, 7 for int4.

    Returns:
        float32 [..., columns] of whole numbers, scale_type [..., 1].
    """
    scale = (values.float().abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30).to(scale_type)
    return torch.round(values.float() / scale.float()).clamp(-largest, largest), scale


def packed(whole: torch.Tensor) -> torch.Tensor:
    """Pack int4 [rows, columns] into int8 [rows / 2, columns]: the even rows in the lower halves of the bytes."""
    even, odd = whole.to(torch.int16).view(-1, 2, whole.shape[1]).unbind(1)
    return (16 * odd + even % 16).to(torch.int8)


def unpacked(packs: torch.Tensor) -> torch.Tensor:
    """Undo :func:`packed`."""
    odd = packs.to(torch.int16) // 16
    even = (packs.to(torch.int16) - 16 * odd + 8) % 16 - 8
    return torch.stack([even, odd], dim=1).view(-1, packs.shape[1])


def make(folder: Path, form: str) -> None:
    """Write the quantised model into an empty folder; its scales are exact in float16.

    Args:
        form: W8A8 or W4A8. W4A8 also has a bias of every output: 8 times the sum of its weights.
    """
    for path in MODEL.iterdir():
        if path.suffix == ".json":
            (folder / path.name).symlink_to(path)
    kind = f"{form}_DYNAMIC"
    tensors = {}
    description: dict[str, object] = {"model_quant_type": kind, "version": "1.0.0", "group_size": 0}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        description[name] = "FLOAT"
        tensors[name] = tensor
        if found := EXPERT.match(name):
            whole, scale = whole_rows(tensor, torch.float16, 127 if form == "W8A8" else 7)
            further = {f"{name}_scale": scale.float(), f"{name}_offset": torch.zeros_like(scale.float())}
            tensors[name] = whole.to(torch.int8)
            if form == "W4A8":
                tensors[name] = packed(whole)
                bias = 8 * whole.sum(1, keepdim=True) * scale.float()
                parts = 16 if found[3] == "down" else 1
                further[f"{name[: -len('weight')]}scale_bias"] = (bias / parts).repeat(1, parts)
            tensors |= further
            description |= dict.fromkeys((name, *further), kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "quant_model_description.json").write_text(json.dumps(description))


def _experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' loop over experts, with rows rounded to int8 before every product."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        whole, scale = whole_rows(rows, torch.float32)
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
    described = json.loads((folder / "quant_model_description.json").read_text())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if found := EXPERT.match(name):
                experts = layers[int(found[1])].mlp.experts
                whole = tensor if described[name] == "W8A8_DYNAMIC" else unpacked(tensor)
                value, expert = whole.float() * tensors[f"{name}_scale"], int(found[2])
                if found[3] == "down":
                    experts.down_proj[expert] = value
                else:
                    experts.gate_up_proj[expert].chunk(2)[found[3] == "up"].copy_(value)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
