# SPDX-License-Identifier: Apache-2.0
"""Compares the planner with its peers, PAR against moves: ``python -m benchmarks.planner --csv PATH --plot PATH``.

Every shape, load and policy is one row of the CSV. Rows that are in the file are not measured again, except those of
policies that begin with ``--again`` NAME: after a change of this package's planner, ``--again incremental`` measures
the table's own rows again, and needs no peer. A peer is ahead on a load if its PAR is more than 0.002 below all plans
of this package with at most as many moves; exit status 1 if so.

Loads are real ones from ``--loads`` DIR (JSON files with ``logical_count``) for shapes with 256 experts, and
generated ones (``benchmarks.loads``). The placement in force was made from scratch for the previous load. Peers: vLLM's
policy (the installed one, otherwise this package's bit-equal one); swift, flashlb and STAIR from ``--vllm-ascend`` PATH
(an unpacked source distribution; may be repeated); SGLang's two from ``--sglang`` PATH (an unpacked wheel);
TensorRT-LLM's from ``--tensorrt-llm`` PATH (moeLoadBalancer.cpp, compiled with g++). Slow peers plan every k-th layer.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loads, planner_peers
from benchmarks.placements import FloatArray, Slots, greedy_placement, receipts
from benchmarks.planner_table import AHEAD, Row, Table, ahead, draw, summary
from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.values.placement import Placement

TARGETS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2)

THOROUGH_TARGETS = (1.0, 1.02, 1.05)


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
QUICK_LAYERS = 8

MANY_RANKS = 320
"""On more ranks slow peers take minutes for a layer: these shapes are each peer's last."""


@dataclass(frozen=True)
class Settings:
    """The command line."""

    csv: Path
    again: str
    plot: Path | None
    loads: Path | None
    vllm_ascend: tuple[Path, ...]
    sglang: Path | None
    tensorrt_llm: Path | None
    quick: bool
    only: str
    seeds: int
    budget: float
    jobs: int
    seconds: float
    swift_every: int
    flashlb_every: int
    stair_every: int


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A load, and the placement that was made for the previous load."""

    shape: Shape
    load_name: str
    load: FloatArray
    slots: Slots

    def every(self, step: int) -> Case:
        return self if step == 1 else Case(self.shape, self.load_name, self.load[::step], self.slots[::step].copy())


def load_names(shape: Shape, settings: Settings) -> list[str]:
    real = list(_real_pairs(settings)) if shape.experts == 256 and settings.loads else []
    kinds = ("hard",) if settings.quick else ("mild", "medium", "hard")
    seeds = range(1 if settings.quick else settings.seeds)
    return real + [f"{kind} drift, seed {seed}" for seed in seeds for kind in kinds]


@functools.cache
def _real_pairs(settings: Settings) -> dict[str, tuple[FloatArray, FloatArray]]:
    """(load before, load) by name."""
    files = loads.read_folder(settings.loads)
    names = (loads.PREFILL_1K, loads.PREFILL_4K, loads.DECODE_1000, loads.DECODE_1500)
    short, longer, decode, longer_decode = names if set(names) <= files.keys() else (list(files) * 4)[:4]
    return {
        "real, prompts 1K to 4K": (files[short], files[longer]),
        "real, prefill to decode": (files[short], files[decode]),
        "real, decode to decode": (files[decode], files[longer_decode]),
    }


@functools.lru_cache(maxsize=2)
def make_case(shape: Shape, load_name: str, settings: Settings) -> Case:
    layers = QUICK_LAYERS if settings.quick else shape.layers
    if load_name.startswith("real"):
        first, load = (found[:layers] for found in _real_pairs(settings)[load_name])
    else:
        generator = loads.LoadGenerator(layers, shape.experts, int(load_name.rpartition(" ")[2]))
        first = generator.window().astype(np.float64)
        generator.drift(load_name.partition(" ")[0])
        load = generator.window().astype(np.float64)
    return Case(shape, load_name, load, greedy_placement(first, shape.slots, shape.ranks))


# -- peers ------------------------------------------------------------------------------------------------------------


def own_default(load: FloatArray, slots: Slots, num_ranks: int) -> Slots:
    return plan(load, slots, num_ranks, policy="default").physical_to_logical


@dataclass(frozen=True)
class Source:
    """A peer, and every how many-th layer it plans."""

    name: str
    step: int
    load: Callable[[], planner_peers.Peer]


@functools.cache
def sources(settings: Settings) -> dict[str, Source]:
    """By name, quick ones first."""
    in_environment = importlib.util.find_spec("vllm") is not None
    found = [
        Source("vLLM default", 1, planner_peers.vllm_peer)
        if in_environment
        else Source("default", 1, lambda: own_default)
    ]
    if settings.sglang:
        for policy in ("deepseek", "deepseek_vec"):
            loader = functools.partial(planner_peers.sglang_peer, settings.sglang, policy)
            found.append(Source(f"SGLang {policy}", 1, loader))
    if settings.tensorrt_llm:
        found.append(Source("TensorRT-LLM", 1, functools.partial(planner_peers.tensorrt_peer, settings.tensorrt_llm)))
    seen: set[bytes] = set()
    steps = {"swift": settings.swift_every, "flashlb": settings.flashlb_every, "STAIR": settings.stair_every}
    for policy, step in steps.items():
        for path in settings.vllm_ascend:
            file = planner_peers.ascend_source(path, policy)
            if not file.exists() or file.read_bytes() in seen:
                continue
            seen.add(file.read_bytes())
            version = path.resolve().name.rpartition("-")[2]
            loader = functools.partial(planner_peers.ascend_peer, path, policy)
            found.append(Source(f"vllm-ascend {version} {policy}", step, loader))
    return {source.name: source for source in found}


# -- measurements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The plans of one peer for one load; of "incremental", this package's for all targets."""

    shape: Shape
    load_name: str
    step: int
    source: str

    @property
    def case(self) -> tuple[str, str, int]:
        return str(self.shape), self.load_name, self.step


def tasks(settings: Settings, table: Table) -> Iterator[Task]:
    """All of them: first those of quick peers, and of each peer first one load of every shape; with ``again`` those of
    the table's rows."""
    if settings.again:
        shapes = {str(shape): shape for shape in SHAPES if settings.only in str(shape)}
        for (shape, load_name, step), rows in table.cases.items():
            for source in ("incremental", *(row.policy for row in rows.values() if not row.is_ours)):
                if shape in shapes:
                    yield Task(shapes[shape], load_name, step, source)
        return
    shapes = [s for s in (QUICK if settings.quick else SHAPES) if settings.only in str(s)]
    names = {shape: load_names(shape, settings) for shape in shapes}
    peers = sources(settings)
    steps = [s.step for s in peers.values()]
    for name, step in [("incremental", s) for s in sorted({1, *steps})] + [(s.name, s.step) for s in peers.values()]:
        of_source = [
            Task(shape, names[shape][i], step, name)
            for i in range(max(map(len, names.values()), default=0))
            for shape in shapes
            if i < len(names[shape])
        ]
        yield from sorted(of_source, key=lambda task: task.shape.ranks > MANY_RANKS)


def measure(case: Case, step: int, policy: str, answer: Callable[[], Slots]) -> Row:
    began = time.process_time()
    after = answer()
    milliseconds = 1e3 * (time.process_time() - began)
    ranks = case.shape.ranks
    before, par = (Placement(slots, case.shape.experts, ranks).par(case.load) for slots in (case.slots, after))
    moved = receipts(case.slots, after, ranks)
    return Row(
        str(case.shape), case.load_name, step, policy, len(case.load), round(float(before.mean()), 5),
        round(float(par.mean()), 5), round(float(par.max()), 5), int(moved.sum()), int(moved.max()),
        round(milliseconds, 2),
    )  # fmt: skip


def own(case: Case, step: int, policy: str, **options: Any) -> Row:
    return measure(
        case, step, policy,
        lambda: plan(case.load, case.slots, case.shape.ranks, threads=1, **options).physical_to_logical,
    )  # fmt: skip


def own_plans(settings: Settings, task: Task, known: dict[str, Row]) -> Iterator[Row]:
    case = make_case(task.shape, task.load_name, settings).every(task.step)
    for target in TARGETS:
        if (name := f"incremental fast {target:g}") not in known:
            yield own(case, task.step, name, target_par=target)
    for target in THOROUGH_TARGETS:
        if (name := f"incremental thorough {target:g}") not in known:
            options = {"effort": "thorough", "time_budget": budget(settings, case)}
            yield own(case, task.step, name, target_par=target, **options)


def budget(settings: Settings, case: Case) -> float:
    """Seconds of a thorough plan: that of all layers, for these."""
    return max(0.02, float(settings.budget) * len(case.load) / case.shape.layers)


@functools.cache
def loaded(settings: Settings, source: str) -> planner_peers.Peer:
    return sources(settings)[source].load()


def peers_plans(settings: Settings, task: Task, known: dict[str, Row]) -> Iterator[Row]:
    """A peer's plan, and where it moves less than half of the slots this package's with at most as many moves: fast,
    and thorough where that is behind."""
    case = make_case(task.shape, task.load_name, settings).every(task.step)
    row = known.get(task.source)
    if row is None:
        try:
            peer = loaded(settings, task.source)
            row = measure(
                case, task.step, task.source, functools.partial(peer, case.load, case.slots, case.shape.ranks)
            )
        except (ImportError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            print(f"{task.shape} {task.load_name}: {task.source} refuses: {str(error)[:90]}", flush=True)
            return
        yield row
    if not moves_few(task.shape, row):
        return
    options: dict[str, Any] = {"target_par": 1.0, "max_moves": row.moves}
    ours = own(case, task.step, f"incremental fast, moves of {task.source}", **options)
    yield ours
    if row.par_mean < ours.par_mean - AHEAD:
        options |= {"effort": "thorough", "time_budget": budget(settings, case)}
        yield own(case, task.step, f"incremental thorough, moves of {task.source}", **options)


def moves_few(shape: Shape, row: Row) -> bool:
    return row.moves < 0.5 * row.layers * shape.slots


def is_done(task: Task, known: dict[str, Row]) -> bool:
    if task.source == "incremental":
        return {f"incremental fast {t:g}" for t in TARGETS} | {
            f"incremental thorough {t:g}" for t in THOROUGH_TARGETS
        } <= known.keys()
    row = known.get(task.source)
    return row is not None and (not moves_few(task.shape, row) or f"incremental fast, moves of {row.policy}" in known)


def work(settings: Settings, item: tuple[Task, dict[str, Row]]) -> tuple[Task, list[Row]]:
    task, known = item
    plans = own_plans if task.source == "incremental" else peers_plans
    return task, list(plans(settings, task, known))


def start_worker() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"


def run(table: Table, settings: Settings) -> Counter[str]:
    """Adds the rows that are missing. Returns the number of tasks left out, by source."""
    began = time.monotonic()
    left = [task for task in tasks(settings, table) if not is_done(task, table.cases.get(task.case, {}))]
    items = [(task, table.cases.get(task.case, {})) for task in left]
    done: set[Task] = set()
    start_worker()  # what workers inherit
    with multiprocessing.get_context("spawn").Pool(settings.jobs, start_worker) as pool:
        answers = pool.imap_unordered(functools.partial(work, settings), items)
        for _ in items:
            seconds = settings.seconds - (time.monotonic() - began)
            try:
                task, rows = answers.next(timeout=max(0.0, min(seconds, 1e6)))
            except multiprocessing.TimeoutError:
                break  # leaving the pool ends its processes
            done.add(task)
            for row in rows:
                table.add(row)
                print(row, flush=True)
    return Counter(task.source for task in left if task not in done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, required=True, help="rows measured; those in it are not measured again")
    parser.add_argument("--again", default="", metavar="NAME", help="measure rows of policies that begin so again")
    parser.add_argument("--plot", type=Path, help="picture of balance against moves (PNG or SVG)")
    parser.add_argument("--loads", type=Path, help="folder of JSON files with logical_count [layers][experts]")
    parser.add_argument(
        "--vllm-ascend", type=Path, action="append", default=[], metavar="PATH", help="unpacked sources of vllm-ascend"
    )
    parser.add_argument("--sglang", type=Path, metavar="PATH", help="unpacked sglang (the folder that holds sglang/)")
    parser.add_argument("--tensorrt-llm", type=Path, metavar="PATH", help="TensorRT-LLM's moeLoadBalancer.cpp")
    parser.add_argument(
        "--download", type=Path, metavar="DIR", help=f"fetch vllm-ascend {planner_peers.VLLM_ASCEND} into DIR"
    )
    parser.add_argument("--quick", action="store_true", help="four shapes, eight layers, one seed")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--seeds", type=int, default=5, help="of the generated loads")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of a thorough plan for all layers")
    parser.add_argument("--jobs", type=int, default=1, help="processes that plan")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time and say what is left out")
    parser.add_argument("--swift-every", type=int, default=1, help="swift plans every so many-th layer")
    parser.add_argument("--stair-every", type=int, default=20, help="STAIR plans every so many-th layer")
    parser.add_argument("--flashlb-every", type=int, default=20, help="flashlb plans every so many-th layer")
    arguments = parser.parse_args()
    values = vars(arguments)
    folder = values.pop("download")
    paths = [*values.pop("vllm_ascend"), *([planner_peers.download(folder)] if folder else [])]
    settings = Settings(vllm_ascend=tuple(paths), **values)
    table = Table(settings.csv)
    if settings.again:
        table.drop(lambda row: row.policy.startswith(settings.again) and settings.only in row.shape)
    left_out = run(table, settings)
    summary(table)
    if settings.plot:
        draw(table, settings.plot)
    behind = ahead(table)
    for line in behind:
        print("AHEAD:", line)
    for source, number in left_out.items():
        print(f"left out: {number} loads of {source}")
    print(f"\n{len(table.rows)} rows; a peer is ahead in {len(behind)}")
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
