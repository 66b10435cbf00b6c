# SPDX-License-Identifier: Apache-2.0
"""Loads to plan for: from files, from a trace, or generated with the statistics of a large served model.

The generator follows the statistics of DeepSeek-V3 in production-like serving (the expert counts published with
SGLang's large-scale EP reproduction guide): log load per layer with standard deviation 0.4..0.85 (mean 0.62), skew 0.35
and kurtosis 3.6, the hottest expert 5.6 to 8.1 times the mean. Drift between two windows, as standard deviation of the
log ratio and correlation of the log load: mild 0.07 and 0.99 (decode to decode), medium 0.26 and 0.96 (prompts of 1K to
4K tokens), hard 0.46 and 0.72 (prefill to decode).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

EXPONENTIAL_PART = 0.56
"""Weight of an exponential variable beside a normal one: skew 2 * 0.56^3 = 0.35, kurtosis 3 + 6 * 0.56^4 = 3.6."""

PREFILL_1K, PREFILL_2K, PREFILL_4K = (f"prefill_in{tokens}" for tokens in (1024, 2048, 4096))
DECODE_1000, DECODE_1500 = "decode_in1000out1000", "decode_in500out1500"
"""Names of the published loads, by the tokens of a prompt or of an answer."""

TOKENS_PER_EXPERT = 4096
"""Mean tokens of an expert in a generated window; counts are Poisson."""


def read_counts(path: Path) -> FloatArray:
    """float64 [L, E] from a JSON file with ``logical_count`` [layers][experts]; layers without load are left out and
    each layer is scaled to sum 1.

    Raises:
        ValueError: the file has no such table, or no layer has load.
    """
    try:
        table = np.asarray(json.loads(path.read_text())["logical_count"], dtype=np.float64)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no load file: expected JSON with logical_count [layers][experts] ({error})"
        ) from None
    table = table[table.sum(axis=-1) > 0] if table.ndim == 2 else table
    if table.ndim != 2 or not table.size:
        raise ValueError(f"{path}: logical_count has shape {table.shape}; expected [layers][experts] with some load")
    return np.asarray(table / table.sum(axis=1, keepdims=True))


def read_folder(folder: Path) -> dict[str, FloatArray]:
    """Every ``*.json`` of a folder by its name without ending, in order of names."""
    return {path.stem: read_counts(path) for path in sorted(folder.glob("*.json"))}


def read_trace(path: Path) -> FloatArray:
    """float64 [T, L, E] from an .npz file whose array ``load`` (or only array) holds windows of tokens per expert."""
    with np.load(path) as arrays:
        name = "load" if "load" in arrays.files else arrays.files[0]
        trace = np.asarray(arrays[name], dtype=np.float64)
    if trace.ndim != 3:
        raise ValueError(f"{path}: {name} has shape {trace.shape}; expected [windows, layers, experts]")
    return trace


class LoadGenerator:
    """Windows of tokens per expert that drift.

    Args:
        num_layers: L.
        num_experts: E.
        seed: equal seeds give equal windows.
    """

    def __init__(self, num_layers: int, num_experts: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._sigma = self._random.triangular(0.40, 0.62, 0.85, size=(num_layers, 1))
        self._shape = (num_layers, num_experts)
        self._latent = self._fresh()
        self._stretch = 1.0

    def window(self) -> npt.NDArray[np.int64]:
        """int64 [L, E]: tokens counted in one window at the present state."""
        popularity = np.exp(self._sigma * self._stretch * self._latent)
        mean = popularity / popularity.sum(axis=1, keepdims=True) * (TOKENS_PER_EXPERT * self._shape[1])
        return self._random.poisson(mean)

    def drift(self, kind: str) -> None:
        """Moves the state on by one window: "none", "mild", "medium" or "hard"."""
        correlation = {"none": 1.0, "mild": 0.9936, "medium": 0.96, "hard": 0.72}[kind]
        if kind == "medium":  # longer prompts spread the load more, shorter ones less
            self._stretch = 1.2 if self._stretch == 1.0 else 1.0
        fresh = self._fresh()
        self._latent = correlation * self._latent + np.sqrt(1 - correlation**2) * fresh

    def _fresh(self) -> FloatArray:
        normal = self._random.normal(size=self._shape)
        exponential = self._random.exponential(size=self._shape) - 1
        return np.asarray(np.sqrt(1 - EXPONENTIAL_PART**2) * normal + EXPONENTIAL_PART * exponential)


def drifting_windows(kind: str, num_windows: int, num_layers: int, num_experts: int, seed: int = 0) -> FloatArray:
    """float64 [T, L, E]: windows that drift by "mild" or "medium" steps, or "mixed": mild, medium in the second third,
    with a hard switch after each third."""
    generator = LoadGenerator(num_layers, num_experts, seed)
    windows = []
    for t in range(num_windows):
        third = 3 * t // num_windows
        if kind == "mixed":
            switch = t > 0 and 3 * (t - 1) // num_windows != third
            step = "hard" if switch else "medium" if third == 1 else "mild"
        else:
            step = kind
        if t > 0:
            generator.drift(step)
        windows.append(generator.window())
    return np.asarray(windows, dtype=np.float64)
