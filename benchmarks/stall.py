# SPDX-License-Identifier: Apache-2.0
"""Cost of balancing in a serving loop, step by step: ``python -m benchmarks.stall --json PATH``.

Several ranks run the same decode loop of MoE layers: routing, all-to-all, grouped matrix products, all-to-all back.
On a GPU a step is one CUDA graph, so that small effects are visible; on a CPU it is eager and small. Columns:

==============  ======================================================================================================
none            no redundant experts and no mapping: no EPLB at all
off             redundant experts, mapped by the same op, nothing else
idle            the balancer is on and collects; nothing moves
cycle           cycles without a pause: everything from the snapshot of the load to the last commit, per transport
stop the world  the same rounds with the same code in one step, while all ranks wait
==============  ======================================================================================================

The plan of each cycle is fixed and moves a tenth of all slots, so that every cycle has the same size. Everything else
is real: EplbUpdator, agreement, checksums, staging, maps. ``off`` and ``idle`` alternate in short segments, and the
medians of the segments are compared, because the machine drifts by more than the difference to measure.

The exit status is 1 if a check fails: weights are wrong after a commit, ranks disagree, the result of the forward
differs, or a step has an allocation or a hidden synchronisation. PATH may be a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.stall_bench import Bench
from examples.demo.port import free_port


def rank_main(rank: int, ranks: int, port: int, args: argparse.Namespace, pipe: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    with torch.no_grad():
        report = Bench(rank, ranks, args).run()
    if rank == 0:
        pipe.put(report)
    dist.barrier()
    os._exit(0) if args.device == "cuda" else dist.destroy_process_group()


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':34}{'steps':>7}{'median':>9}{'p99':>9}{'longest':>9}  ms", ""]
    for name, column in report["columns"].items():
        if column["steps"]:
            lines.append(
                f"{name:34}{column['steps']:7}{column['median_ms']:9.3f}{column['p99_ms']:9.3f}{column['longest_ms']:9.3f}"
            )
    lines.append("")
    lines.append(
        f"idle over off: median {report['idle_over_off_median']:.4f}, p99 {report['idle_over_off_p99']:.4f}; "
        f"plain send/recv {report['plain'].get('send_recv_gb_per_s', 0):.1f} GB/s"
    )
    for name, facts in report.get("cycles", {}).items():
        lines.append(
            f"{name}: {facts['cycles']} cycles of {facts['rounds_per_cycle']:.0f} rounds in "
            f"{facts['move_steps_per_cycle']:.1f} steps, {facts['gb_per_cycle_and_rank']:.2f} GB each; "
            f"{facts['gb_per_s_on_device']:.1f} GB/s event to event, {facts['gb_per_s_in_flight']:.3f} from issue to "
            f"arrival; waited for agreement {facts['control_wait_us_mean']:.0f} us a step, "
            f"{facts['control_wait_us_longest']:.0f} at worst"
        )
    failed = [name for name, good in report["checks"].items() if not good]
    lines.append(f"{len(report['checks'])} checks, failed: {', '.join(failed) or 'none'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what balancing costs a serving loop, step by step.")
    parser.add_argument("--json", type=Path, help="where to write the results; may be a pipe")
    parser.add_argument("--quick", action="store_true", help="under 50 seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="processes; default all GPUs, or 2 on a CPU")
    parser.add_argument("--transports", nargs="+", help="default: auto, on a GPU also gloo and nccl")
    parser.add_argument("--buffer", type=int, help="experts per staging buffer")
    parser.add_argument("--budget-mb", type=float, help="also cycles with this budget per step")
    parser.add_argument("--without-checksums", action="store_true", help="also cycles that verify nothing")
    args = parser.parse_args()
    args.ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    args.transports = args.transports or (["auto", "nccl", "gloo"] if args.device == "cuda" else ["auto"])
    port = free_port()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the ranks are ended, too
    context = torch.multiprocessing.get_context("spawn")
    pipe = context.SimpleQueue()
    processes = [
        context.Process(target=rank_main, args=(rank, args.ranks, port, args, pipe), daemon=True)
        for rank in range(args.ranks)
    ]
    for process in processes:
        process.start()
    try:
        while pipe.empty() and all(process.exitcode in (None, 0) for process in processes):
            time.sleep(0.05)
        if pipe.empty():
            print("a rank failed", file=sys.stderr)
            return 1
        report = pipe.get()
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    report["machine"] = f"{args.ranks} ranks on {args.device}, torch {torch.__version__}, {platform.platform()}"
    if args.device == "cuda":
        report["machine"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, " + report["machine"]
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
