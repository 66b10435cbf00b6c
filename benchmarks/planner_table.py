# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/planner.py: their file, the comparison with peers, and the picture."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

AHEAD = 0.002
"""PARs closer than this are equal."""


@dataclass(frozen=True)
class Row:
    """One plan. ``step``: every how many-th layer was planned; ``layers``: how many these are. ``milliseconds``:
    processor time of the process that planned, on one thread."""

    shape: str
    load: str
    step: int
    policy: str
    layers: int
    par_before: float
    par_mean: float
    par_worst: float
    moves: int
    moves_per_rank: int
    milliseconds: float

    @property
    def case(self) -> tuple[str, str, int]:
        return self.shape, self.load, self.step

    @property
    def is_ours(self) -> bool:
        return self.policy.startswith("incremental")

    def __str__(self) -> str:
        return (
            f"{self.shape:24s} {self.load:26s} 1/{self.step:<2d} {self.policy:46s} PAR {self.par_before:.4f} to "
            f"{self.par_mean:.4f} (worst {self.par_worst:.4f}), {self.moves:6d} moves, {self.milliseconds:9.1f} ms"
        )


class Table:
    """The rows measured so far by case and policy, in a CSV file that grows by a row at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: defaultdict[tuple[str, str, int], dict[str, Row]] = defaultdict(dict)
        types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Row)}
        if path.exists():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    row = Row(**{name: types[name](line[name]) for name in types})
                    self.cases[row.case][row.policy] = row
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(types)

    def add(self, row: Row) -> None:
        self.cases[row.case][row.policy] = row
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, [f.name for f in fields(Row)]).writerow(asdict(row))

    @property
    def rows(self) -> list[Row]:
        return [row for case in self.cases.values() for row in case.values()]

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(shape for shape, _, _ in self.cases))


def best_within(row: Row, case: dict[str, Row]) -> float:
    """The lowest PAR of this package's plans that move no more than ``row``; that before, where there is none."""
    return min((r.par_mean for r in case.values() if r.is_ours and r.moves <= row.moves), default=row.par_before)


def ahead(table: Table) -> list[str]:
    """Cases in which a peer has a lower PAR than every plan of this package with at most as many moves."""
    found = []
    for case in table.cases.values():
        for row in case.values():
            best = best_within(row, case)
            if not row.is_ours and row.par_mean < best - AHEAD:
                found.append(
                    f"{row.shape}, {row.load}: {row.policy} {row.par_mean:.4f} with {row.moves}, ours {best:.4f}"
                )
    return found


def summary(table: Table) -> None:
    """Per shape, means over loads: the peers, and the cheapest plan of ours that is as good."""
    print("\nshape, policy: mean PAR with so many moves per layer; ours as good, or better, with")
    for shape in table.shapes():
        cases = [case for key, case in table.cases.items() if key[0] == shape]
        for policy in dict.fromkeys(row.policy for case in cases for row in case.values() if not row.is_ours):
            pars, more, fewer, layers = [], 0, 0, 0
            for case in cases:
                if policy not in case:
                    continue
                row = case[policy]
                pars.append(row.par_mean)
                ours = [r.moves for r in case.values() if r.is_ours and r.par_mean <= row.par_mean + AHEAD]
                if ours:
                    more, fewer, layers = more + row.moves, fewer + min(ours), layers + row.layers
            shown = f"{more / layers:7.1f} moves; ours {fewer / layers:7.1f}" if layers else "never reached by ours"
            print(f"  {shape:24s} {policy:32s} PAR {np.mean(pars):.4f}, {shown} ({len(pars)} loads)")


def draw(table: Table, path: Path) -> None:
    """Mean PAR against moves, one panel for each shape; means over its loads, over those of peers if they have any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = table.shapes()
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    peers = list(dict.fromkeys(row.policy for row in table.rows if not row.is_ours))
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [row for row in table.rows if row.shape == shape]
        compared = {row.load for row in rows if not row.is_ours}
        rows = [row for row in rows if not compared or row.load in compared]
        policies = list(dict.fromkeys(row.policy for row in rows))
        for name, style in (("incremental fast", "o-"), ("incremental thorough", "s-")):
            points = [
                _point([r for r in rows if r.policy == p and r.step == 1]) for p in policies if p.startswith(name + " ")
            ]
            points = sorted(p for p in points if p is not None)
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=name)
        for number, policy in enumerate(peers):
            point = _point([r for r in rows if r.policy == policy])
            if point is not None:
                axis.plot(*point, "x+1234"[number % 6], color=f"C{2 + number % 8}", label=policy)
        axis.set(title=shape, xlabel="moves per layer", ylabel="mean PAR")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _point(rows: list[Row]) -> tuple[float, float] | None:
    """Moves for each planned layer and mean PAR."""
    if not rows:
        return None
    moves = [row.moves / row.layers for row in rows]
    return float(np.mean(moves)), float(np.mean([row.par_mean for row in rows]))
