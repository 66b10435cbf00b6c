# SPDX-License-Identifier: Apache-2.0
"""Draws the figure of README and guide from ``benchmarks/results/virtual_ep_h200.csv``.

    python -m benchmarks.plots                 # writes docs/images/layer_time.svg

Needs matplotlib. The same results give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.virtual_ep import read_rows, table

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"

PANELS = {"DeepSeek-V3 EP32": ("DeepSeek-V3, 32 ranks", 8), "DeepSeek-V3 EP64": ("DeepSeek-V3, 64 ranks", 4)}
"""Title of a panel, and slots of a rank without redundancy, by scenario of the results."""

STEPS = (*(("decode", tokens) for tokens in (8, 32, 64, 128, 256, 512)), ("prefill", 1024), ("prefill", 4096))
"""Stage, and tokens per rank."""

LINES = (
    ("default", 1, "vLLM's algorithm, 1 redundant slot per rank", "#d55e00", "s"),
    ("ours", 0, "this package, no redundant slots", "#56b4e9", "o"),
    ("ours", 1, "this package, 1 redundant slot per rank", "#0072b2", "D"),
    ("perfect", 0, "perfect balance", "#777777", "x"),
)
"""Mode of the results, redundant slots of a rank, label, colour and marker."""


def draw_layer_time(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of an MoE layer relative to no balancing, by tokens per rank.

    Args:
        rows: of ``virtual_ep_h200.csv``, as ``benchmarks.virtual_ep`` writes it.
        path: of the SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "layer time", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(9.6, 3.5), sharey=True, layout="constrained")
    tables = table(rows)
    for axes, (scenario, (title, slots)) in zip(panels, PANELS.items(), strict=True):
        steps = [tables[scenario][step] for step in STEPS]
        axes.axhline(1.0, color="black", linewidth=0.8, label="no balancing")
        for mode, redundant, label, colour, marker in LINES:
            way = f"{mode}, {slots + redundant} slots"
            relative = [ms[way] / ms[f"none, {slots} slots"] for ms in steps]
            axes.plot(relative, color=colour, marker=marker, markersize=5, label=label)
            if mode == "ours" and redundant:
                axes.annotate(f"{relative[-1]:.2f}", (len(STEPS) - 1, relative[-1]), xytext=(6, 4),
                              textcoords="offset points")  # fmt: skip
        axes.set_xticks(range(len(STEPS)), [f"{tokens:,}" for _, tokens in STEPS])
        axes.axvline(len(STEPS) - 2.5, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_title(title)
        axes.set_xlabel("tokens per rank and step: decode | prefill")
        axes.set_ylim(0.0, 1.35)
        axes.margins(x=0.08)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of an MoE layer\nrelative to no balancing")
    panels[0].legend(loc="lower left", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "virtual_ep_h200.csv", help="of benchmarks.virtual_ep"
    )
    parser.add_argument("--output", type=Path, default=IMAGES / "layer_time.svg", help="where the figure goes")
    arguments = parser.parse_args()
    draw_layer_time(read_rows(arguments.results), arguments.output)


if __name__ == "__main__":
    main()
