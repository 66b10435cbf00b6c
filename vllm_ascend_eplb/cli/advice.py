# SPDX-License-Identifier: Apache-2.0
"""``doctor --model``: expected milliseconds, memory and advice for a model on a machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files.disk import expand_user, parse_json, read_bounded
from ..simulate.advice import AdviceError, advised, choices, read_sizes
from ..simulate.cost import MACHINES, CostModel
from .output import table

MOST_CONFIG_BYTES = 4 << 20


def advise(model: Path, ranks: int, tokens: float, machine: str, weight_bytes: float) -> dict[str, Any]:
    """Estimates a model on a machine; the result has JSON's types.

    Raises:
        AdviceError: the configuration, the ranks or the machine do not fit.
        FileError: the file cannot be read.
    """
    if machine not in MACHINES:
        raise AdviceError(f"machine is {machine!r}; allowed are {', '.join(MACHINES)}")
    model = Path(expand_user(model))
    path = model / "config.json" if model.is_dir() else model
    config = parse_json(read_bounded(path, MOST_CONFIG_BYTES, "config.json of a model"), path)
    if not isinstance(config, dict):
        raise AdviceError(f"{path} is not a JSON object; give the config.json of a Mixture-of-Experts model")
    sizes = read_sizes(config, str(path))
    preset = MACHINES[machine]
    nodes = -(-ranks // preset.ranks_per_node)
    nodes = nodes if ranks % nodes == 0 else 1
    cost = CostModel(preset, sizes.shape, ranks, nodes, tokens, weight_bytes)
    found = choices(sizes, cost)
    best, why = advised(found)
    return {
        "model": sizes.shape.name,
        "machine": preset.title,
        "ranks": ranks,
        "tokens_per_rank": tokens,
        "choices": [asdict(choice) for choice in found],
        "redundant": None if best is None else best.redundant,
        "advice": why,
    }


def show_advice(out: Console, answer: dict[str, Any]) -> None:
    """Prints the result of :func:`advise` as text."""
    shown = table(
        "redundant", "slots per rank", "PAR", "MoE time per step", "saved", "memory per rank", "KV tokens lost"
    )
    for choice in answer["choices"]:
        shown.add_row(
            str(choice["redundant"]),
            str(choice["slots"]),
            f"{choice['par_before']:.2f} to {choice['par_after']:.2f}",
            f"{choice['ms']:.2f} ms",
            f"{choice['saved']:.1%}",
            f"{choice['memory'] / 2**30:.2f} GiB",
            f"{choice['kv_tokens']:,}",
        )
    out.print(
        f"{answer['model']} on {answer['ranks']} ranks of {answer['machine']}, {answer['tokens_per_rank']:g} tokens "
        "per rank and step; an estimate for load as uneven as DeepSeek-V3's"
    )
    out.print(shown)
    out.print(f"Advice: {answer['advice']}")
