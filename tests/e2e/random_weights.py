# SPDX-License-Identifier: Apache-2.0
"""Random weights of small models, by the names of their checkpoints. The same seed gives the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .offline import MODEL

Weights = dict[str, torch.Tensor]


class RandomWeights:
    """Tensors of a model, drawn one after another.

    Args:
        hidden: the model's hidden size.
    """

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden
        self.generator = torch.Generator().manual_seed(0)

    def matrix(self, rows: int, columns: int | None = None) -> torch.Tensor:
        """[rows, columns], of which a product has about the scale of its input. The hidden size is the default."""
        columns = columns or self.hidden
        return torch.randn(rows, columns, generator=self.generator) / columns**0.5

    def embedding(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.hidden, generator=self.generator)

    def mlp(self, inner: int) -> Weights:
        up = {f"{name}_proj.weight": self.matrix(inner) for name in ("gate", "up")}
        return {**up, "down_proj.weight": self.matrix(self.hidden, inner)}

    def norm(self, name: str, size: int | None = None) -> Weights:
        return {f"{name}.weight": torch.ones(size or self.hidden)}

    def experts(self, number: int, inner: int) -> Weights:
        """A router and its experts."""
        found = {"mlp.gate.weight": self.matrix(number)}
        for expert in range(number):
            found |= under(f"mlp.experts.{expert}", self.mlp(inner))
        return found


def write_model(folder: Path, config: Mapping[str, object], weights: Weights, tokenizer: bool = True) -> Path:
    """Write a model into a new folder, with the tokenizer of examples/tiny_moe unless it is a draft model."""
    folder.mkdir()
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
