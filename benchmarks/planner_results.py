# SPDX-License-Identifier: Apache-2.0
"""Output of benchmarks/planner_checks.py: results, tables and a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planner_cases import Case
from vllm_ascend_eplb.planning import plan


@dataclass
class Row:
    """One policy on one case."""

    case: str
    policy: str
    par_mean: float
    par_worst: float
    next_par_mean: float
    next_par_worst: float
    moves: int
    moves_per_rank: int
    gigabytes: float
    milliseconds: float
    vllm_ratio: float | None = None


@dataclass
class Results:
    machine: dict[str, Any]
    plans: list[Row] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)
    series: list[dict[str, Any]] = field(default_factory=list)
    dispatch: list[dict[str, Any]] = field(default_factory=list)
    scale: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    optimum: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, condition: bool, message: str) -> None:
        if not condition:
            self.failures.append(message)
            print(f"FAILED: {message}", flush=True)


def print_plans(rows: list[Row]) -> None:
    print(f"\n{rows[0].case}")
    print(f"  {'policy':22s} {'PAR':>7s} {'worst':>7s} {'next':>7s} {'worst':>7s} {'moves':>7s} {'/rank':>6s} "
          f"{'GB':>8s} {'ms':>9s} {'x vLLM':>7s}")  # fmt: skip
    for row in rows:
        ratio = "" if row.vllm_ratio is None else f"{row.vllm_ratio:.1f}"
        print(
            f"  {row.policy:22s} {row.par_mean:7.4f} {row.par_worst:7.4f} {row.next_par_mean:7.4f} "
            f"{row.next_par_worst:7.4f} {row.moves:7d} {row.moves_per_rank:6d} {row.gigabytes:8.1f} "
            f"{row.milliseconds:9.2f} {ratio:>7s}",
            flush=True,
        )


def draw(results: Results, cases: list[Case], path: Path) -> None:
    """Balance against moves for all policies, one panel per case; "incremental" as a curve over its target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        curve = []
        for target in (1.005, 1.01, 1.02, 1.03, 1.05, 1.08, 1.12, 1.2):
            made = plan(case.load, case.slots, case.num_ranks, target_par=target)
            curve.append((made.num_moves, float(made.par_after.mean())))
        axis.plot(*zip(*curve, strict=True), "-", color="tab:blue", label="incremental, by target")
        for row in (row for row in results.plans if row.case == case.name and row.policy != "random"):
            ring = {"markersize": 11, "markerfacecolor": "none"} if row.policy == "vllm" else {}  # "default" lies on it
            axis.plot(row.moves, row.par_mean, "o", label=row.policy, clip_on=False, **ring)
        axis.set_xscale("symlog", linthresh=100)
        axis.set(title=case.name, xlabel="moves", ylabel="mean PAR", xlim=(0, None))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
