# SPDX-License-Identifier: Apache-2.0
"""The planner against its peers, balance against moves: ``python -m benchmarks.planner --csv PATH --plot PATH``.

Every shape, load and policy is one row of the CSV; rows that are there already are not measured again, so a run can be
stopped and gone on with. A peer is ahead where it has a lower PAR, by more than 0.002, than all plans of this package
that move no more; then the exit status is 1.

Loads: real ones from ``--loads`` DIR (JSON files with ``logical_count``) for the shapes with 256 experts, and generated
ones with the statistics of a large model in service (``benchmarks.loads``). The placement in force was made from
scratch for the load before. Peers: vLLM's policy (that of the environment, else this package's bit-equal one), and from
``--vllm-ascend`` PATH (an unpacked source distribution) swift, flashlb and, from 0.30.0rc2 on, STAIR; ``--download
DIR`` fetches one with pip. Slow peers plan every k-th layer only; they are compared on the same layers.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loads, planner_peers
from benchmarks.placements import FloatArray, Slots, greedy_placement, receipts
from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.values.placement import Placement

AHEAD = 0.002
"""PARs closer than this are equal."""

TARGETS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2)

VLLM_ASCEND = "0.30.0rc2"


@dataclass(frozen=True)
class Shape:
    model: str
    layers: int
    experts: int
    ranks: int
    slots: int

    def __str__(self) -> str:
        return f"{self.model} EP{self.ranks}/{self.slots}"


def _shapes() -> Iterator[Shape]:
    for ranks, slots in (
        (8, 264), (16, 272), (32, 288), (64, 320), (128, 384), (144, 288), (160, 320), (256, 512), (320, 320),
    ):  # fmt: skip
        yield Shape("DeepSeek-V3", 58, 256, ranks, slots)
    for ranks, slots in ((8, 136), (16, 144), (32, 160), (64, 192)):
        yield Shape("Qwen3-235B", 94, 128, ranks, slots)
    for ranks, slots in ((32, 416), (64, 448), (128, 512)):
        yield Shape("Kimi-K2", 60, 384, ranks, slots)
    for ranks, slots in ((64, 576), (128, 640), (320, 640), (640, 1280)):
        yield Shape("512 experts", 60, 512, ranks, slots)
    for ranks, slots in ((4, 12), (8, 16)):
        yield Shape("Mixtral-like", 32, 8, ranks, slots)


SHAPES = tuple(_shapes())
QUICK = tuple(s for s in SHAPES if (s.model, s.ranks) in (("DeepSeek-V3", 32), ("DeepSeek-V3", 144), ("Qwen3-235B", 16),
                                                          ("Mixtral-like", 8)))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One plan. ``step``: every how many-th layer was planned; ``layers``: how many these are. ``milliseconds``:
    processor time of this process."""

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
    def key(self) -> tuple[str, str, int, str]:
        return self.shape, self.load, self.step, self.policy


@dataclass
class Case:
    """A load, and the placement that was made for the one before it."""

    shape: Shape
    load_name: str
    load: FloatArray
    slots: Slots

    def every(self, step: int) -> Case:
        return self if step == 1 else Case(self.shape, self.load_name, self.load[::step], self.slots[::step].copy())


# -- cases ------------------------------------------------------------------------------------------------------------


def load_pairs(shape: Shape, files: dict[str, FloatArray], seeds: int, quick: bool) -> Iterator[tuple[str, Any]]:
    """Names and functions that give (load before, load)."""
    if shape.experts == 256 and files:
        names = (loads.PREFILL_1K, loads.PREFILL_4K, loads.DECODE_1000, loads.DECODE_1500)
        short, longer, decode, longer_decode = names if set(names) <= files.keys() else (list(files) * 4)[:4]
        for name, first, second in (
            ("real, prompts 1K to 4K", short, longer),
            ("real, prefill to decode", short, decode),
            ("real, decode to decode", decode, longer_decode),
        ):
            yield name, lambda first=first, second=second: (files[first], files[second])
    for seed in range(1 if quick else seeds):
        for kind in ("hard",) if quick else ("mild", "medium", "hard"):
            yield f"{kind} drift, seed {seed}", lambda seed=seed, kind=kind: _generated(shape, kind, seed, quick)


def _generated(shape: Shape, kind: str, seed: int, quick: bool) -> tuple[FloatArray, FloatArray]:
    generator = loads.LoadGenerator(8 if quick else shape.layers, shape.experts, seed)
    first = generator.window().astype(np.float64)
    generator.drift(kind)
    return first, generator.window().astype(np.float64)


# -- measurements -----------------------------------------------------------------------------------------------------


class Table:
    """The rows measured so far, in a CSV file that grows by a row at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, int, str], Row] = {}
        types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Row)}
        if path.exists():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    row = Row(**{name: types[name](line[name]) for name in types})
                    self.rows[row.key] = row
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(types)

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, [f.name for f in fields(Row)]).writerow(asdict(row))


def measure(table: Table, case: Case, step: int, policy: str, answer: Any) -> Row:
    """The row of a policy, taken from the table where it is there."""
    known = table.rows.get((str(case.shape), case.load_name, step, policy))
    if known is not None:
        return known
    part = case.every(step)
    began = time.process_time()
    after: Slots = answer(part)
    milliseconds = 1e3 * (time.process_time() - began)
    ranks = case.shape.ranks
    before, par = (Placement(slots, case.shape.experts, ranks).par(part.load) for slots in (part.slots, after))
    moved = receipts(part.slots, after, ranks)
    row = Row(
        str(case.shape), case.load_name, step, policy, len(part.load), round(float(before.mean()), 5),
        round(float(par.mean()), 5), round(float(par.max()), 5), int(moved.sum()), int(moved.max()),
        round(milliseconds, 2),
    )  # fmt: skip
    table.add(row)
    print(
        f"{row.shape:24s} {row.load:26s} 1/{step:<2d} {policy:38s} PAR {row.par_before:.4f} to {row.par_mean:.4f} "
        f"(worst {row.par_worst:.4f}), {row.moves:6d} moves, {row.milliseconds:9.1f} ms",
        flush=True,
    )
    return row


def own(options: dict[str, Any]) -> Any:
    return lambda case: plan(case.load, case.slots, case.shape.ranks, **options).physical_to_logical


def run_case(table: Table, case: Case, peers: dict[str, tuple[planner_peers.Peer, int]], seconds: float) -> None:
    """All policies on one case; for each peer also this package's plan with at most as many moves."""
    steps = sorted({1, *(step for _, step in peers.values())})
    for step in steps:
        scale = len(case.load) / case.shape.layers / step
        for target in TARGETS:
            measure(table, case, step, f"incremental fast {target:g}", own({"target_par": target}))
        for target in (1.0, 1.02, 1.05):
            options = {"target_par": target, "effort": "thorough", "time_budget": max(0.02, seconds * scale)}
            measure(table, case, step, f"incremental thorough {target:g}", own(options))
        for name, (peer, its_step) in peers.items():
            if its_step != step:
                continue
            try:
                row = measure(
                    table, case, step, name, lambda part, peer=peer: peer(part.load, part.slots, case.shape.ranks)
                )
            except (ValueError, RuntimeError, IndexError) as error:
                print(f"{case.shape} {case.load_name}: {name} refuses: {str(error)[:90]}", flush=True)
                continue
            options = {"target_par": 1.0, "max_moves": row.moves}
            if row.moves < 0.5 * case.slots[::step].size:
                measure(table, case, step, f"incremental, moves of {name}", own(options))


# -- judgement --------------------------------------------------------------------------------------------------------


def is_ours(row: Row) -> bool:
    return row.policy.startswith("incremental")


def ahead(table: Table) -> list[str]:
    """Cases in which a peer has a lower PAR than every plan of this package with at most as many moves."""
    found = []
    for row in table.rows.values():
        if is_ours(row):
            continue
        ours = [r for r in table.rows.values() if r.key[:3] == row.key[:3] and is_ours(r) and r.moves <= row.moves]
        best = min((r.par_mean for r in ours), default=row.par_before)
        if row.par_mean < best - AHEAD:
            found.append(f"{row.shape}, {row.load}: {row.policy} {row.par_mean:.4f} with {row.moves}, ours {best:.4f}")
    return found


def summary(table: Table) -> None:
    """Per shape, means over loads: the peers, and the cheapest plan of ours that is as good."""
    print("\nshape, policy: mean PAR with part of the slots moved; ours as good, or better, with")
    shapes = dict.fromkeys(row.shape for row in table.rows.values())
    for shape in shapes:
        for policy in dict.fromkeys(r.policy for r in table.rows.values() if r.shape == shape and not is_ours(r)):
            theirs = [r for r in table.rows.values() if (r.shape, r.policy) == (shape, policy)]
            pairs = []
            for row in theirs:
                ours = [
                    r
                    for r in table.rows.values()
                    if r.key[:3] == row.key[:3] and is_ours(r) and r.par_mean <= row.par_mean + AHEAD
                ]
                if ours:
                    pairs.append((row.moves, min(r.moves for r in ours)))
            more, fewer = (sum(p[i] for p in pairs) for i in (0, 1))
            par = np.mean([r.par_mean for r in theirs])
            print(
                f"  {shape:24s} {policy:24s} PAR {par:.4f}, {more:8d} moves; ours {fewer:8d} "
                f"({len(pairs)} of {len(theirs)} cases)"
            )


def draw(table: Table, path: Path) -> None:
    """Mean PAR against moves, one panel for each shape; means over its loads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in table.rows.values()))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [row for row in table.rows.values() if row.shape == shape]
        policies = list(dict.fromkeys(row.policy for row in rows))
        for name, style in (("incremental fast", "o-"), ("incremental thorough", "s-")):
            points = [
                _point([r for r in rows if r.policy == p and r.step == 1]) for p in policies if p.startswith(name)
            ]
            points = sorted(p for p in points if p is not None)
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=name)
        for policy in policies:
            point = _point([r for r in rows if r.policy == policy])
            if point is not None and not policy.startswith("incremental"):
                axis.plot(*point, "x", label=policy)
        axis.set(title=shape, xlabel="moves per layer", ylabel="mean PAR")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _point(rows: list[Row]) -> tuple[float, float] | None:
    """Moves for each planned layer and mean PAR."""
    if not rows:
        return None
    moves = [row.moves / row.layers for row in rows]
    return float(np.mean(moves)), float(np.mean([row.par_mean for row in rows]))


# -- peers ------------------------------------------------------------------------------------------------------------


def download(folder: Path) -> Path:
    """Fetches vllm-ascend's source distribution with pip into ``folder`` and unpacks it; returns its folder."""
    unpacked = folder / f"vllm_ascend-{VLLM_ASCEND}"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        # pip asks the distribution for its metadata; the variables keep that from compiling. It needs setuptools_scm.
        subprocess.run(
            [*command, "-d", str(folder), f"vllm-ascend=={VLLM_ASCEND}"],
            check=True,
            env={**os.environ, "COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b3"},
        )
        with tarfile.open(next(folder.glob("vllm_ascend-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def find_peers(arguments: argparse.Namespace) -> dict[str, tuple[planner_peers.Peer, int]]:
    """Peers by name, with the stride of the layers that each plans."""
    vllm = planner_peers.vllm_peer()
    peers: dict[str, tuple[planner_peers.Peer, int]] = {}
    if vllm is not None:
        peers["vLLM default"] = vllm, 1
    else:
        peers["default"] = (
            (lambda load, slots, ranks: plan(load, slots, ranks, policy="default").physical_to_logical),
            1,
        )
    path = download(arguments.download) if arguments.download else arguments.vllm_ascend
    if path is not None:
        for name, peer in planner_peers.ascend_peers(path).items():
            if name != "vllm-ascend default":
                peers[name] = peer, arguments.flashlb_every if "flashlb" in name else 1
        stair = planner_peers.stair_peer(path)
        if stair is not None:
            peers["vllm-ascend STAIR"] = stair, arguments.stair_every
    return peers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, required=True, help="rows measured; those in it are not measured again")
    parser.add_argument("--plot", type=Path, help="picture of balance against moves (PNG or SVG)")
    parser.add_argument("--loads", type=Path, help="folder of JSON files with logical_count [layers][experts]")
    parser.add_argument("--vllm-ascend", type=Path, help="unpacked sources of vllm-ascend")
    parser.add_argument("--download", type=Path, metavar="DIR", help=f"fetch vllm-ascend {VLLM_ASCEND} into DIR")
    parser.add_argument("--quick", action="store_true", help="four shapes, eight layers, one seed")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--seeds", type=int, default=5, help="of the generated loads")
    parser.add_argument("--seconds", type=float, default=0.3, help="time budget of thorough plans for all layers")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no case after this time")
    parser.add_argument("--stair-every", type=int, default=20, help="STAIR plans every so many-th layer")
    parser.add_argument("--flashlb-every", type=int, default=20, help="flashlb plans every so many-th layer")
    arguments = parser.parse_args()
    table = Table(arguments.csv)
    files = loads.read_folder(arguments.loads) if arguments.loads else {}
    peers = find_peers(arguments)
    began = time.monotonic()
    for shape in QUICK if arguments.quick else SHAPES:
        if arguments.only not in str(shape):
            continue
        for name, pair in load_pairs(shape, files, arguments.seeds, arguments.quick):
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            first, load = pair()
            if arguments.quick:
                first, load = first[:8], load[:8]
            slots = greedy_placement(first, shape.slots, shape.ranks)
            run_case(table, Case(shape, name, load, slots), peers, arguments.seconds)
    summary(table)
    if arguments.plot:
        draw(table, arguments.plot)
    behind = ahead(table)
    for line in behind:
        print("AHEAD:", line)
    print(f"\n{len(table.rows)} rows; a peer is ahead in {len(behind)}")
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
