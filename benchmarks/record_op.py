# SPDX-License-Identifier: Apache-2.0
"""Cost of mapping and counting a layer's routed tokens: ``python -m benchmarks.record_op --json PATH``.

On the CPU the op is compared with the same work in torch operators, in turns within one run. On a CUDA GPU it is
compared with a Triton kernel that does the same; both are captured in a CUDA graph. Before that, the result of every
candidate is compared with NumPy's on fresh inputs. The exit status is 1 if one differs. PATH may be a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record_op_candidates import (
    CPU_CANDIDATES,
    INPUT_SETS,
    NUM_EXPERTS,
    NUM_SLOTS,
    TOP_K,
    WIDTH,
    Call,
    Inputs,
    expected,
    make_inputs,
    op,
    op_by_aten,
    op_switched_off,
    triton_peer,
)
from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.values.placement import Placement


class Checks:
    """Counts the comparisons and remembers which failed."""

    def __init__(self) -> None:
        self.made = 0
        self.failed: list[str] = []

    def same(self, name: str, got: torch.Tensor, want: np.ndarray) -> None:
        self.made += 1
        if not np.array_equal(got.cpu().numpy(), want):
            self.failed.append(name)
            print(f"WRONG: {name}", file=sys.stderr)

    def candidate(self, name: str, make: Callable[[Inputs], Call], inputs: Inputs, counts: bool = True) -> None:
        """Runs a candidate on the input sets, half of the tokens being padding in the last one."""
        call = make(inputs)
        for which in (0, 1, INPUT_SETS - 1):
            inputs.counts.zero_()
            out = call(which)
            ids, sums = expected(inputs, which)
            if out is not None:
                self.same(f"{name}: physical ids", out, ids)
            self.same(f"{name}: counts", inputs.counts, sums if counts else np.zeros_like(sums))
        inputs.counts.zero_()


def time_in_turns(calls: dict[str, Call], rounds: int, turn: float = 0.008) -> dict[str, list[float]]:
    """Microseconds per call of each candidate in each round; the candidates take turns of ``turn`` seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for i in range(INPUT_SETS):
            call(i)
    for _ in range(rounds):
        for name, call in calls.items():
            made, spent = 0, 0.0
            while spent < turn:
                start = time.perf_counter()
                for i in range(INPUT_SETS):
                    call(i)
                spent += time.perf_counter() - start
                made += INPUT_SETS
            times[name].append(spent / made * 1e6)
    return times


def measure_cpu(checks: Checks, rounds: int, tables: tuple[str, ...]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Times on the CPU and the ratios that matter, other over op: medians over rounds, and of both's best rounds, which
    other load on the machine changes least."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    all_threads = torch.get_num_threads()
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        for num_tokens in (512, 8192):
            for table in tables:
                case = f"cpu, {threads} threads, N={num_tokens}, {table}"
                inputs = make_inputs(num_tokens, "cpu", torch.int64, table, 0.8, seed=num_tokens + threads)
                for name in ("op", "op by ATen", "choose + index + bincount"):
                    checks.candidate(f"{case}, {name}", CPU_CANDIDATES[name], inputs)
                checks.candidate(f"{case}, off", op_switched_off, inputs, counts=False)
                times = time_in_turns({name: make(inputs) for name, make in CPU_CANDIDATES.items()}, rounds)
                row = {"device": "cpu", "threads": threads, "N": num_tokens, "table": table}
                for name, spent in times.items():
                    spent_on = {"us_median": statistics.median(spent), "us_min": min(spent)}
                    rows.append({**row, "candidate": name, **spent_on})
                for name in ("choose + index + bincount", "index + bincount", "identity + bincount", "bincount alone"):
                    of_rounds = [theirs / own for theirs, own in zip(times[name], times["op"], strict=True)]
                    ratios[f"{case}: {name} / op"] = statistics.median(of_rounds)
                    ratios[f"{case}: {name} / op, best rounds"] = min(times[name]) / min(times["op"])
    torch.set_num_threads(all_threads)
    return rows, ratios


def measure_compiled(checks: Checks, device: str, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of host time per layer of eight layers' ops, called one by one and as one compiled function.

    The compiled one contains what each call of a compiled function costs (guards), which a model pays once per step.
    """
    inputs = make_inputs(512, device, torch.int64, "weighted", 0.8, seed=5)
    counts = torch.zeros((INPUT_SETS, NUM_SLOTS), dtype=torch.int64, device=device)
    rows = list(counts)  # as the layers of a model hold them

    def layers(ids: list[torch.Tensor]) -> list[torch.Tensor]:
        arguments = inputs.table, inputs.replicas
        return [
            ops.map_and_record(batch, *arguments, row, inputs.record, inputs.num_unpadded)
            for batch, row in zip(ids, rows, strict=True)
        ]

    compiled = torch.compile(layers, fullgraph=True)
    for which, out in enumerate(compiled(inputs.ids)):
        ids, sums = expected(inputs, which)
        checks.same(f"{device}, compiled: physical ids", out, ids)
        checks.same(f"{device}, compiled: counts", counts[which], sums)
    times: dict[str, list[float]] = {"op, eager, 8 layers": [], "op, compiled, 8 layers": []}
    for _ in range(rounds):
        for name, function in zip(times, (layers, compiled), strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                function(inputs.ids)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / 100 / INPUT_SETS * 1e6)
    return [
        {"device": device, "N": 512, "table": "weighted", "candidate": name, "us_median": statistics.median(spent)}
        | {"us_min": min(spent)}
        for name, spent in times.items()
    ]


def measure_recorder(checks: Checks, device: str, rounds: int) -> list[dict[str, Any]]:
    """Microseconds that the host spends per call on what surrounds the op, for a model of 58 layers."""
    layers = 58
    placement = Placement.initial(layers, NUM_EXPERTS, 32, NUM_SLOTS - NUM_EXPERTS)
    recorder = LoadRecorder(layers, NUM_EXPERTS, NUM_SLOTS, device)
    recorder.begin_step(placement, record=True)
    recorder.counts.copy_(torch.from_numpy(np.random.default_rng(1).integers(0, 999, (layers, NUM_SLOTS))))
    want = np.zeros((layers, NUM_EXPERTS), dtype=np.int64)
    rows = np.arange(layers)[:, None]
    np.add.at(want, (rows, placement.physical_to_logical), recorder.counts.cpu().numpy())
    recorder.snapshot()
    checks.same(f"{device}, window of a recorder", torch.from_numpy(recorder.take()[0]), want)
    calls: dict[str, Callable[[], object]] = {
        "begin_step, nothing changes": lambda: recorder.begin_step(placement, record=True),
        "flush": lambda: recorder.flush(placement),
        "snapshot and take": lambda: (recorder.snapshot(placement), recorder.take()),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            times[name].append((time.perf_counter() - start) / 20 * 1e6)
    return [
        {"device": device, "layers": layers, "candidate": name, "us_median": statistics.median(spent)}
        for name, spent in times.items()
    ]


def time_captured(calls: dict[str, Call], per_graph: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds per call on the device: graphs of ``per_graph`` calls each, replayed in turns."""
    graphs, kept = {}, []
    for name, call in calls.items():
        for i in range(INPUT_SETS):
            call(i)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append([call(i % INPUT_SETS) for i in range(per_graph)])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for graph in graphs.values():
        for _ in range(3):
            graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / per_graph)
    return times


def measure_cuda(checks: Checks, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Times on the GPU, and op over the quickest Triton block size."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    candidates: dict[str, Callable[[Inputs], Call]] = {
        "op": op,
        "op, not recording": op_switched_off,
        "op by ATen": op_by_aten,
        **{f"Triton, block {block}": triton_peer(block) for block in (128, 256, 512, 1024)},
    }
    for num_tokens in (1, 64, 512, 2048, 8192, 32768):
        for table, skew in (("weighted", 0.0), ("replicas", 0.8), ("weighted", 1.5)):
            for dtype in (torch.int32, torch.int64):
                case = f"N={num_tokens}, {table}, skew {skew}, {str(dtype).removeprefix('torch.')}"
                inputs = make_inputs(num_tokens, "cuda", dtype, table, skew, seed=num_tokens)
                for name, make in candidates.items():
                    checks.candidate(f"cuda, {case}, {name}", make, inputs, counts=name != "op, not recording")
                if ops.kernel_for("cuda") == "aten":
                    continue
                calls = {name: make(inputs) for name, make in candidates.items()}
                times = {n: statistics.median(t) for n, t in time_captured(calls, 64, rounds).items()}
                row = {"device": "cuda", "N": num_tokens, "table": table, "skew": skew, "dtype": str(dtype)}
                rows += [{**row, "candidate": name, "us_median": spent} for name, spent in times.items()]
                best = min(spent for name, spent in times.items() if name.startswith("Triton"))
                ratios[f"cuda, {case}: op / best Triton"] = times["op"] / best
    return rows, ratios


def print_rows(rows: list[dict[str, Any]], ratios: dict[str, float]) -> None:
    keys = ["device", "threads", "layers", "N", "table", "skew", "dtype"]
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(key) for key in keys), {})[row["candidate"]] = row["us_median"]
    for case, times in cases.items():
        print("\n" + ", ".join(f"{k} {v}" for k, v in zip(keys, case, strict=True) if v is not None) + "  (us)")
        for name, spent in times.items():
            print(f"  {name:28s} {spent:10.2f}")
    print()
    for name, ratio in ratios.items():
        print(f"{name:80s} {ratio:6.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", metavar="PATH", help="also write everything as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled; under 50 s on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure on this one alone; default: all there are")
    arguments = parser.parse_args()
    rounds = 15 if arguments.quick else 60
    checks = Checks()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    has_cuda = torch.cuda.is_available() and arguments.device != "cpu"
    if arguments.device != "cuda":
        tables = ("weighted", "replicas") if arguments.quick else ("weighted", "replicas", "uneven")
        rows, ratios = measure_cpu(checks, rounds, tables)
        rows += measure_recorder(checks, "cpu", rounds)
        if not arguments.quick:
            rows += measure_compiled(checks, "cpu", rounds)
    if has_cuda:
        cuda_rows, cuda_ratios = measure_cuda(checks, rounds)
        rows += cuda_rows + measure_recorder(checks, "cuda", rounds)
        ratios |= cuda_ratios
        if not arguments.quick:
            rows += measure_compiled(checks, "cuda", rounds)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    machine += f", load {os.getloadavg()[0]:.1f}"
    if has_cuda:
        machine += f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    kernels = {device: ops.kernel_for(device) for device in ("cpu", *(["cuda"] if has_cuda else []))}
    print(f"{machine}\nkernels: {kernels}; K={TOP_K}, {NUM_EXPERTS} experts, {NUM_SLOTS} slots, width {WIDTH}")
    print_rows(rows, ratios)
    print(f"{checks.made} comparisons with NumPy, {len(checks.failed)} wrong")
    if arguments.json:
        report = {"benchmark": "record_op", "machine": machine, "kernels": kernels, "quick": arguments.quick}
        rows = [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
        report |= {"results": rows, "ratios": ratios, "comparisons": checks.made, "wrong": checks.failed}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
