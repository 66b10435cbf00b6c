# SPDX-License-Identifier: Apache-2.0
"""Cost of agreement on many ranks: the bytes of its messages, and the time of its collectives.

Bytes come from the real code for any number of ranks: the planner plans for a generated load of 58 layers with 256
experts, and the plan is packed as for the broadcast. Times are measured over Gloo between processes of this machine.
With more ranks than cores they show the work of all ranks together, not the latency of a network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ascend_eplb.agreement.channel import FIELDS, ControlChannel, Facts
from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.planning.message import pack_plan
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import SLOT
from vllm_ascend_eplb.values.rounds import SOURCE, rounds_to_array
from vllm_ascend_eplb.values.topology import Topology

from .loads import LoadGenerator

LAYERS, EXPERTS, BUFFER_EXPERTS, RANKS_PER_NODE = 58, 256, 16, 8
STEP_MS = 10.0
REDUNDANT = {8: 32, 16: 32, 32: 32, 64: 64, 128: 128, 320: 64}
"""Redundant experts by number of ranks, as such systems are configured."""

STATUS_BYTES = 2 * 8 * len(FIELDS)
"""Each field's value and its negative, int64."""


@dataclass
class Sizes:
    """Messages of one cycle, in bytes; ``plan_ms`` and the counts are not bytes."""

    ranks: int
    nodes: int
    slots: int
    status_bytes: int
    load_bytes: int
    cold_moves: int
    cold_plan_bytes: int
    cold_rounds: int
    drift_moves: int
    drift_plan_bytes: int
    drift_rounds: int
    plan_ms: float
    within_node: float  # part of the drift's copies whose source is on the receiver's node


@dataclass
class Times:
    """Medians over the posts, in microseconds; ``steps`` posts ``step_ms`` apart."""

    ranks: int
    steps: int
    step_ms: float
    waited_at_once_us: float
    post_us: float
    read_after_a_step_us: float
    worst_read_us: float
    reduce_load_ms: float
    broadcast_plan_ms: float


@dataclass
class Results:
    machine: dict[str, Any]
    sizes: list[Sizes] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)


def sizes_of(ranks: int) -> tuple[Sizes, int]:
    """The messages at ``ranks`` ranks, and the bytes of the drift's plan."""
    generator = LoadGenerator(LAYERS, EXPERTS, seed=1)
    topology = Topology.even(ranks, max(1, ranks // RANKS_PER_NODE))
    placement = Placement.initial(LAYERS, EXPERTS, ranks, REDUNDANT[ranks])
    made = []
    for _ in range(2):  # from a cold start, then after a drift
        load = generator.window()
        began = time.perf_counter()
        made_plan = plan(load[None], placement.physical_to_logical, ranks, num_nodes=topology.num_nodes)
        seconds = time.perf_counter() - began
        rounds = schedule_rounds(placement, made_plan.moves, topology, BUFFER_EXPERTS)
        rows = rounds_to_array(rounds)
        copies = np.concatenate([part.moves for part in rounds])
        nodes = np.asarray(topology.node_of_rank)
        near = (
            nodes[copies[:, SLOT] // placement.slots_per_rank] == nodes[copies[:, SOURCE] // placement.slots_per_rank]
        )
        message = pack_plan(1, made_plan.physical_to_logical, rows)
        made.append((made_plan.num_moves, len(message), len(rounds), seconds, float(near.mean())))
        placement = Placement(made_plan.physical_to_logical, EXPERTS, ranks)
        generator.drift("medium")
    cold, drift = made
    return (
        Sizes(
            ranks=ranks,
            nodes=topology.num_nodes,
            slots=placement.num_slots,
            status_bytes=STATUS_BYTES,
            load_bytes=8 * LAYERS * EXPERTS,
            cold_moves=cold[0],
            cold_plan_bytes=cold[1],
            cold_rounds=cold[2],
            drift_moves=drift[0],
            drift_plan_bytes=drift[1],
            drift_rounds=drift[2],
            plan_ms=1e3 * drift[3],
            within_node=drift[4],
        ),
        drift[1],
    )


def _rank(pipe: Any, rank: int, ranks: int, port: int, steps: int, step_ms: float, plan_bytes: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, ranks), rank=rank, world_size=ranks)
    group = dist.new_group(list(range(ranks)), backend="gloo")
    channel = ControlChannel(group, rank, ranks)
    at_once, posts = [], []
    vector = torch.zeros(2 * len(FIELDS), dtype=torch.int64)
    for _ in range(steps):
        began = time.perf_counter()
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=group)
        at_once.append(time.perf_counter() - began)
    for step in range(steps):
        began = channel.waiting.post_total
        channel.post(Facts(step=step))
        posts.append(channel.waiting.post_total - began)
        channel.read()
        time.sleep(step_ms / 1e3)
    reads = list(channel.waiting.recent)
    load = np.ones((1, LAYERS, EXPERTS), dtype=np.int64)
    bulk = []
    for start in (
        lambda: channel.reduce_load(load),
        lambda: channel.broadcast(bytes(plan_bytes) if rank == 0 else None, plan_bytes),
    ):
        dist.barrier()
        began = time.perf_counter()
        work = start()
        while not work.done():
            time.sleep(0.0002)
        work.result()
        bulk.append(time.perf_counter() - began)
    dist.barrier()
    median = statistics.median
    pipe.send((median(at_once), median(posts), median(reads), max(reads), *bulk))


def times_of(ranks: int, steps: int, plan_bytes: int) -> Times:
    """The collectives between ``ranks`` processes; the slowest rank's figures."""
    from torch.distributed import TCPStore

    step_ms = STEP_MS * max(1.0, 2 * ranks / cores())  # longer where ranks share cores
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "vllm_ascend_eplb.agreement.channel"])
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, rank, ranks, store.port, steps, step_ms, plan_bytes)
        process = context.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    columns = zip(*(pipe.recv() for pipe in pipes), strict=True)
    once, post, read, worst, reduce, broadcast = (max(column) for column in columns)
    for process in processes:
        process.join()
    return Times(ranks, steps, step_ms, 1e6 * once, 1e6 * post, 1e6 * read, 1e6 * worst, 1e3 * reduce, 1e3 * broadcast)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="fewer ranks and steps")
    parser.add_argument("--ranks", type=int, nargs="+", help="processes to measure the collectives between")
    arguments = parser.parse_args()
    results = Results({"machine": platform.machine(), "cores": cores(), "python": platform.python_version()})
    plan_bytes = 1 << 20
    print(f"status vector: {STATUS_BYTES} bytes; load: {8 * LAYERS * EXPERTS:,} bytes on any number of ranks")
    print("ranks nodes slots | cold: moves plan bytes rounds | drift: moves plan bytes rounds  within node  planned in")
    for ranks in (8, 320) if arguments.quick else REDUNDANT:
        row, plan_bytes = sizes_of(ranks)
        results.sizes.append(row)
        print(
            f"{row.ranks:5} {row.nodes:5} {row.slots:5} | {row.cold_moves:11,} {row.cold_plan_bytes:10,} "
            f"{row.cold_rounds:6} | {row.drift_moves:12,} {row.drift_plan_bytes:10,} {row.drift_rounds:6} "
            f"{row.within_node:11.0%} {row.plan_ms:8.1f} ms"
        )
    print("\nranks | at once  post  read after a step  worst read (us) | load reduce  plan broadcast (ms)")
    for ranks in arguments.ranks or ((2, 4) if arguments.quick else (2, 4, 8, 16)):
        times = times_of(ranks, 50 if arguments.quick else 200, plan_bytes)
        results.times.append(times)
        print(
            f"{ranks:5} | {times.waited_at_once_us:7.0f} {times.post_us:5.0f} {times.read_after_a_step_us:18.0f} "
            f"{times.worst_read_us:16.0f} | {times.reduce_load_ms:11.2f} {times.broadcast_plan_ms:15.2f}",
            flush=True,
        )
        arguments.json.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
