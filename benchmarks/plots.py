# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of README and guide from the results in ``benchmarks/results``.

    python -m benchmarks.plots                 # writes docs/images/planner.svg

Needs matplotlib (docs/requirements.txt). The same results give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"

PANELS = (
    ("32 ranks, 288 slots per layer", "EP32/288 prefill 1K to decode"),
    ("64 ranks, 320 slots per layer", "EP64/320 prefill 1K to decode"),
)
"""Title of a panel, and what the names of its cases begin with; a case is one target PAR."""

PEERS = {
    "stay": ("no balancing", "#777777", "X"),
    "vllm": ("vLLM (DeepSeek's algorithm)", "#d55e00", "s"),
}
"""Policies of the part ``plans`` that are drawn as one point."""

OURS = {
    "fast": ("incremental, effort fast", "#56b4e9", "o"),
    "thorough": ("incremental, effort thorough", "#0072b2", "D"),
}
"""Parts of the results that hold this package's plans, one point per target PAR, joined by a line."""


def _mean_par(row: dict[str, Any]) -> float:
    """Mean PAR over the layers of a row of ``fast`` (with a prefix) or ``thorough``."""
    return float(next(value for key, value in row.items() if key.endswith("par mean, worst"))[0])


def _moves(row: dict[str, Any]) -> int:
    return int(row["moves"] if "moves" in row else row["fast moves"])


def _of(rows: Iterable[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["case"].startswith(case)]


def draw_planner(results: dict[str, Any], path: Path) -> None:
    """PAR against experts moved when load changes, for this package's planner and its peers.

    Args:
        results: content of ``planner_cpu.json``, as ``benchmarks.planner_checks --json`` writes it.
        path: of the SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "planner", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(9.6, 3.5), sharey=True, layout="constrained")
    for axes, (title, case) in zip(panels, PANELS, strict=True):
        for name, (label, colour, marker) in PEERS.items():
            row = next(row for row in _of(results["plans"]["rows"], case) if row["policy"] == name)
            axes.scatter(row["moves"], row["par_mean"], c=colour, marker=marker, s=55, label=label, zorder=3)
            axes.annotate(
                f"{row['moves']:,} moved\nPAR {row['par_mean']:.3f}",
                (row["moves"], row["par_mean"]),
                xytext=(8, -4) if not row["moves"] else (-4, 10),
                textcoords="offset points",
                ha="left" if not row["moves"] else "right",
                va="top" if not row["moves"] else "bottom",
            )
        for part, (label, colour, marker) in OURS.items():
            rows = sorted(_of(results[part]["rows"], case), key=_moves)
            points = [(_moves(row), _mean_par(row)) for row in rows]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label, zorder=3)
        least = min(_of(results["thorough"]["rows"], case), key=_mean_par)
        axes.annotate(
            f"{_moves(least):,} moved\nPAR {_mean_par(least):.3f}",
            (_moves(least), _mean_par(least)),
            xytext=(10, 14),
            textcoords="offset points",
            va="bottom",
        )
        axes.set_title(title)
        axes.set_xlabel("experts moved, all 58 layers")
        axes.set_xlim(-600, None)
        axes.set_ylim(0.98, None)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PAR of rank load, mean of layers")
    panels[0].legend(loc="upper right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "planner_cpu.json", help="of benchmarks.planner_checks"
    )
    parser.add_argument("--output", type=Path, default=IMAGES / "planner.svg", help="where the figure goes")
    arguments = parser.parse_args()
    draw_planner(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
