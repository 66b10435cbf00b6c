# SPDX-License-Identifier: Apache-2.0
"""Times placements with real kernels: one GPU runs the work of R ranks in turn.

There are three commands, because cases need the planner and timing needs the accelerator::

    python -m benchmarks.virtual_ep cases --loads FOLDER cases.npz   # anywhere: NumPy and the planner
    python -m benchmarks.virtual_ep time cases.npz --out FOLDER      # torch on the accelerator, NumPy
    python -m benchmarks.virtual_ep report FOLDER                    # table; virtual_ep.png where matplotlib is there

The time of a layer is that of the slowest rank's expert products: gate and up, SiLU, down, in bf16, as torch grouped
products over the tokens of each slot. Collectives are not included. The loads are recorded ones of DeepSeek-V3 (FOLDER
holds decode_in500out1500.json, decode_in1000out1000.json, prefill_in2048.json and prefill_in1024.json, as published
with SGLang's guide to large-scale EP); without FOLDER they are lognormal with sigma 0.7. For decode and for prefill,
plans are made from the first file, and steps are drawn from the second.

``time`` needs neither this package nor its C++ library. With many ranks it only times the ranks that can be slowest:
those with most tokens, most tiles of 128 rows and most slots in use. It stops after ``--seconds`` and lists the cases
that were left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.virtual_ep_cases import (
    PRIMARY_SCENARIOS,
    SCENARIOS,
    TINY_SCENARIOS,
    Case,
    make_cases,
    primary_cases,
    read_cases,
    save_cases,
)

FIELDS = (
    "scenario", "layer", "stage", "tokens", "mode", "redundant", "slots", "par", "par_step", "active", "ms",
    "ms_expected",
)  # fmt: skip

POOL_SLOTS = 24
"""Slots for which weights are kept: runs take them in turn, so that no run finds the last one's in the cache."""

CANDIDATES = 24
"""Ranks of a step that are timed at most: those that may be slowest."""

TILE = 128


class Kernel:
    """The expert products of one rank.

    Args:
        hidden, width: of an expert.
        device: torch's.
    """

    def __init__(self, hidden: int, width: int, device: str) -> None:
        import torch

        self._torch, self._device, self._width = torch, device, width
        self._gate_up = torch.randn(POOL_SLOTS, 2 * width, hidden, device=device, dtype=torch.bfloat16) * 0.02
        self._down = torch.randn(POOL_SLOTS, hidden, width, device=device, dtype=torch.bfloat16) * 0.02
        self._tokens = torch.randn(1, hidden, device=device, dtype=torch.bfloat16)
        self._next = 0

    def run(self, ends: Any, slots: int, rows: int) -> Any:
        """Computes ``rows`` tokens, sorted by slot; ``ends`` int32 [slots] on the device: where each slot's end."""
        torch = self._torch
        if self._next + slots > POOL_SLOTS:
            self._next = 0
        mine = slice(self._next, self._next + slots)
        self._next += slots
        both = torch._grouped_mm(self._tokens[:rows], self._gate_up[mine].transpose(-2, -1), offs=ends)
        inner = torch.nn.functional.silu(both[:, : self._width]).mul_(both[:, self._width :])
        return torch._grouped_mm(inner, self._down[mine].transpose(-2, -1), offs=ends)

    def milliseconds(self, counts: npt.NDArray[np.int32], passes: int = 2) -> npt.NDArray[np.float64]:
        """float64 [n]: what each row of ``counts`` [n, S] takes, the shorter of two passes."""
        torch = self._torch
        rows = counts.sum(axis=1)
        if rows.max() > len(self._tokens):
            self._tokens = torch.randn(
                int(rows.max()), self._tokens.shape[1], device=self._device, dtype=torch.bfloat16
            )
        ends = torch.from_numpy(np.cumsum(counts, axis=1, dtype=np.int32)).to(self._device)
        best = np.full(len(counts), np.inf)
        for _ in range(passes):
            best = np.minimum(best, self._one_pass(ends, rows, counts.shape[1]))
        return best

    def _one_pass(self, ends: Any, rows: npt.NDArray[np.int64], slots: int) -> npt.NDArray[np.float64]:
        torch = self._torch
        took = np.zeros(len(rows))
        if self._device == "cpu":
            for i, count in enumerate(rows):
                began = time.perf_counter()
                if count:
                    self.run(ends[i], slots, int(count))
                took[i] = 1e3 * (time.perf_counter() - began)
            return took
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in rows]
        # The device sleeps while the host runs ahead, so that no kernel waits for its launch.
        torch.cuda._sleep(1_000_000 + 120_000 * len(rows))
        for i, (count, (start, end)) in enumerate(zip(rows, marks, strict=True)):
            start.record()
            if count:
                self.run(ends[i], slots, int(count))
            end.record()
        torch.cuda.synchronize()
        for i, (start, end) in enumerate(marks):
            took[i] = start.elapsed_time(end)
        return took


def candidates(counts: npt.NDArray[np.int32], most: int = CANDIDATES) -> npt.NDArray[np.int64]:
    """The ranks of ``counts`` [R, S] that can be slowest; all where there are no more than ``most``."""
    if len(counts) <= most:
        return np.arange(len(counts))
    tiles = (-(-counts // TILE)).sum(axis=1)
    orders = (np.argsort(-counts.sum(axis=1)), np.lexsort((-counts.sum(axis=1), -tiles)))
    third = np.lexsort((-counts.sum(axis=1), -(counts > 0).sum(axis=1)))
    part = most // 3
    return np.unique(np.concatenate([order[:part] for order in (*orders, third)]))


def time_case(
    kernel: Kernel, case: Case, everything: bool, ranks: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]]
) -> list[dict[str, Any]]:
    """A row of the CSV per drawn step: ``ms`` of the slowest rank, and what the expectation promised. To ``ranks`` come
    the counts [n, S] of the ranks that were timed, and their times [n]."""
    steps = [counts if everything else counts[candidates(counts)] for counts in case.counts]
    took = kernel.milliseconds(np.concatenate(steps))
    ranks.append((np.concatenate(steps), took))
    slowest = [float(part.max()) for part in np.split(took, np.cumsum([len(step) for step in steps])[:-1])]
    rows = []
    for counts, ms in zip(case.counts[1:], slowest[1:], strict=True):
        by_rank = counts.sum(axis=1)
        par = case.par if case.mode in ("grid", "perfect") else float(by_rank.max() / max(by_rank.mean(), 1e-9))
        rows.append(
            {
                **{name: getattr(case, name) for name in FIELDS if hasattr(case, name)},
                "par": round(case.par, 4),
                "par_step": round(par, 4),
                "active": int((counts > 0).sum(axis=1).max()),
                "ms": round(ms, 5),
                "ms_expected": round(slowest[0], 5),
            }
        )
    return rows


def measure(arguments: argparse.Namespace) -> int:
    """The command ``time``."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scenarios, cases = read_cases(arguments.cases)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    left_out: dict[str, int] = defaultdict(int)
    written = 0
    of_ranks: dict[str, list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]]] = defaultdict(list)
    with (arguments.out / "virtual_ep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        kernels = {
            (scenario["shape"]["hidden"], scenario["shape"]["width"]): Kernel(
                scenario["shape"]["hidden"], scenario["shape"]["width"], device
            )
            for scenario in scenarios
        }
        kernel_of = {}
        for scenario in scenarios:
            shape = scenario["shape"]
            name = f"{shape['model']} EP{scenario['ranks']}"
            kernel_of[name] = kernels[shape["hidden"], shape["width"]]
            mine = [case for case in cases if case.scenario == name]
            for case in mine[:: max(1, len(mine) // 12)]:  # warm-up: kernels are chosen, memory is allocated
                time_case(kernel_of[name], case, arguments.all_ranks, [])
        for case in cases:
            if time.monotonic() - began > arguments.seconds:
                left_out[case.scenario] += 1
                continue
            ranks: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]] = []
            for row in time_case(kernel_of[case.scenario], case, arguments.all_ranks, ranks):
                writer.writerow(row)
                written += 1
            of_ranks[f"{case.scenario}, {case.slots} slots"] += ranks
        print(f"{len(cases) - sum(left_out.values())} of {len(cases)} cases, {time.monotonic() - began:.0f} s in all")
    np.savez_compressed(
        arguments.out / "virtual_ep_ranks.npz",
        **{f"counts of {name}": np.concatenate([counts for counts, _ in parts]) for name, parts in of_ranks.items()},
        **{f"ms of {name}": np.concatenate([ms for _, ms in parts]) for name, parts in of_ranks.items()},
    )
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    about = {
        "benchmark": "virtual_ep",
        "machine": f"{machine}, torch {torch.__version__}",
        "scenarios": scenarios,
        "rows": written,
        "left_out": {name: count for name, count in left_out.items() if count},
        "seconds": round(time.monotonic() - began, 1),
    }
    (arguments.out / "virtual_ep.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about["left_out"]) if about["left_out"] else "nothing was left out")
    return 0 if written else 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, numbers as numbers."""
    with path.open(newline="") as file:
        texts = ("scenario", "stage", "mode")
        return [
            {name: value if name in texts else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _label(row: dict[str, Any]) -> str:
    return f"{row['mode']}, {row['slots']:.0f} slots"


def table(rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], dict[str, float]]]:
    """Mean ms over layers and steps: by scenario, by (stage, tokens), by way to balance."""
    gathered: dict[str, dict[tuple[str, int], dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row["stage"] != "grid":
            gathered[row["scenario"]][row["stage"], int(row["tokens"])][_label(row)].append(row["ms"])
    return {
        scenario: {step: {way: statistics.fmean(ms) for way, ms in ways.items()} for step, ways in steps.items()}
        for scenario, steps in gathered.items()
    }


def expectation_error(rows: list[dict[str, Any]]) -> list[float]:
    """How far, in parts, a case's expected counts miss the mean of its drawn steps; one entry per case."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["mode"] not in ("grid", "perfect"):
            key = tuple(row[name] for name in ("scenario", "layer", "stage", "tokens", "mode", "redundant"))
            cases[key].append(row)
    return [steps[0]["ms_expected"] / statistics.fmean(row["ms"] for row in steps) - 1.0 for steps in cases.values()]


def step_cost_error(rows: list[dict[str, Any]]) -> tuple[list[float], dict[str, dict[int, tuple[float, float]]]]:
    """How well a ``StepCost`` made of the grid predicts by PAR: the relative error of every case, and by scenario and
    tokens per rank what moving without redundant experts saved and what was predicted."""
    from vllm_ascend_eplb.values.step_cost import StepCost

    names = ("stage", "tokens", "mode", "slots", "layer", "par")
    errors: list[float] = []
    savings: dict[str, dict[int, tuple[float, float]]] = {}
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        grid: dict[tuple[float, ...], list[float]] = defaultdict(list)
        cases: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for row in (row for row in rows if row["scenario"] == scenario):
            if row["mode"] == "grid":
                grid[row["tokens"], row["par"], row["slots"]].append(row["ms"])
            elif row["mode"] != "perfect":
                cases[tuple(row[name] for name in names)].append(row["ms"])
        if not grid:
            continue
        axes = [sorted({point[axis] for point in grid}) for axis in range(3)]
        mean = [[[statistics.fmean(grid[t, p, k]) for k in axes[2]] for p in axes[1]] for t in axes[0]]
        cost = StepCost(*(np.array(axis) for axis in axes), np.array(mean))
        of = {
            case: (statistics.fmean(ms), float(cost.layer_ms(case[1], case[5], case[3]))) for case, ms in cases.items()
        }
        errors += [predicted / measured - 1.0 for measured, predicted in of.values()]
        both = {
            way: {(case[0], case[1], case[4], case[3]): times for case, times in of.items() if case[2] == way}
            for way in ("none", "ours")
        }
        by_tokens: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for key, none in both["none"].items():
            ours = both["ours"][key]
            by_tokens[int(key[1])].append((1.0 - ours[0] / none[0], 1.0 - ours[1] / none[1]))
        savings[scenario] = {
            tokens: (statistics.fmean(a for a, _ in saved), statistics.fmean(b for _, b in saved))
            for tokens, saved in by_tokens.items()
        }
    return errors, savings


def report(arguments: argparse.Namespace) -> int:
    """The command ``report``: Markdown tables, how well expectations predict, and a plot."""
    rows = read_rows(arguments.folder / "virtual_ep.csv")
    tables = table(rows)
    for scenario, steps in tables.items():
        ways = list(next(iter(steps.values())))
        print(f"\n**{scenario}** (ms of a layer, slowest rank)\n")
        print("| tokens per rank | " + " | ".join(ways) + " |")
        print("| --- |" + " ---: |" * len(ways))
        for (stage, tokens), ms in steps.items():
            cells = " | ".join(f"{ms[way]:.3f}" if way in ms else "" for way in ways)
            print(f"| {stage} {tokens:,} | {cells} |")
    error = np.abs(expectation_error(rows))
    print(f"\nexpected counts against drawn steps, {len(error)} cases: median error {np.median(error):.1%}, "
          f"95 % under {np.quantile(error, 0.95):.1%}, worst {error.max():.1%}")  # fmt: skip
    errors, savings = step_cost_error(rows)
    if errors:
        off = np.abs(errors)
        print(f"times by PAR, {len(off)} cases: median error {np.median(off):.1%}, "
              f"90 % under {np.quantile(off, 0.9):.1%}, worst {off.max():.1%}; savings:")  # fmt: skip
        for scenario, steps in savings.items():
            print(f"- {scenario}: " + "; ".join(f"{t:,}: {a:.0%}, {b:.0%}" for t, (a, b) in steps.items()))
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return 0
    if all(row["mode"] != "none" for row in rows):
        print("nothing without balancing to compare with: no plot")
        return 0
    matplotlib.use("Agg")
    _plot(tables, arguments.folder / "virtual_ep.png")
    return 0


def _plot(tables: dict[str, dict[tuple[str, int], dict[str, float]]], path: Path) -> None:
    """Time without balancing over time with it, by tokens per rank."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.8), squeeze=False, sharey=True)
    for axes, (scenario, steps) in zip(all_axes[0], tables.items(), strict=True):
        none = next(way for way in next(iter(steps.values())) if way.startswith("none"))
        for way in next(iter(steps.values())):
            if way == none:
                continue
            places = [(tokens, ms[none] / ms[way]) for (_, tokens), ms in steps.items() if way in ms and none in ms]
            axes.plot(*zip(*places, strict=True), marker="o", markersize=3, linewidth=1, label=way)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_title(scenario, fontsize=9)
        axes.set_xlabel("tokens per rank and step")
        axes.legend(fontsize=6)
    all_axes[0][0].set_ylabel("speed of an MoE layer over no balancing")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def prepare(arguments: argparse.Namespace) -> int:
    """The command ``cases``."""
    scenarios = TINY_SCENARIOS if arguments.tiny else SCENARIOS
    if arguments.primaries:
        scenarios = TINY_SCENARIOS if arguments.tiny else PRIMARY_SCENARIOS
        cases = primary_cases(scenarios, arguments.loads, arguments.layers, arguments.steps)
    else:
        cases = make_cases(scenarios, arguments.loads, arguments.layers, arguments.steps, arguments.grid_only)
    save_cases(arguments.cases, scenarios, cases)
    print(f"{len(cases)} cases of {', '.join(scenario.name for scenario in scenarios)} in {arguments.cases}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    cases = commands.add_parser("cases", help="plans, and draws steps")
    cases.add_argument("cases", type=Path, help="the .npz to write")
    cases.add_argument("--loads", type=Path, help="folder with recorded loads; lognormal ones without it")
    cases.add_argument("--layers", type=int, default=5)
    cases.add_argument("--steps", type=int, default=3)
    cases.add_argument("--grid-only", action="store_true", help="only the grid that the calibration measures")
    cases.add_argument("--primaries", action="store_true", help="only decode steps with and without redundant slots")
    cases.add_argument("--tiny", action="store_true", help="4 ranks, to see that it runs")
    cases.set_defaults(do=prepare)
    timing = commands.add_parser("time", help="times the cases on this machine's accelerator")
    timing.add_argument("cases", type=Path)
    timing.add_argument("--out", type=Path, required=True, help="folder for virtual_ep.csv and virtual_ep.json")
    timing.add_argument("--seconds", type=float, default=240.0, help="cases not begun by then are left out")
    timing.add_argument("--all-ranks", action="store_true", help="times every rank of every step")
    timing.set_defaults(do=measure)
    reporting = commands.add_parser("report", help="table and plot of what was timed")
    reporting.add_argument("folder", type=Path)
    reporting.set_defaults(do=report)
    arguments = parser.parse_args()
    return int(arguments.do(arguments))


if __name__ == "__main__":
    sys.exit(main())
