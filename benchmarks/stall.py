# SPDX-License-Identifier: Apache-2.0
"""What balancing costs a serving loop, step by step: ``python -m benchmarks.stall --json PATH``.

Several ranks run the same decode loop of MoE layers: routing, all-to-all, grouped matrix products, all-to-all back.
On a GPU a step is one CUDA graph, so that small effects are visible; on a CPU it is eager and small. Columns:

==============  ======================================================================================================
none            no redundant experts and no mapping: no EPLB at all
off             redundant experts, mapped by the same op, nothing else
idle            the balancer is on and collects; nothing moves
cycle           cycles without a pause: everything from the snapshot of the load to the last commit, per transport
stop the world  the same rounds by the same code at once, while all ranks wait
==============  ======================================================================================================

The plan of each cycle moves a tenth of all slots, so that every cycle has the same size; everything else is the real
thing (EplbUpdator, agreement, checksums, staging, maps). ``off`` and ``idle`` alternate in short segments, and the
medians of the segments are compared, because the machine drifts by more than what is looked for.

The exit status is 1 if a check fails: wrong weights after any commit, ranks that disagree, a different result of the
forward, an allocation or a hidden synchronisation in a step. PATH may be a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.multiprocessing

from vllm_ascend_eplb import Placement, Plan
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.served_model import EplbAdaptor
from vllm_ascend_eplb.balancer.start import build_updator
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.planning.request import PlanAnswer, PlanRequest
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.values.rounds import Round, rounds_to_array
from vllm_ascend_eplb.values.topology import Topology


@dataclass(frozen=True)
class Size:
    """The model and the loop.

    Attributes:
        layers: MoE layers.
        experts, slots: logical experts of a layer, and slots of a rank.
        hidden, inner: widths of an expert.
        tokens, top_k: tokens of a rank per step, and experts per token.
        segment, segments: steps of one segment, and segments of each kind.
    """

    layers: int
    experts: int
    slots: int
    hidden: int
    inner: int
    tokens: int
    top_k: int
    segment: int
    segments: int

    def expert_bytes(self, dtype: torch.dtype) -> int:
        return 3 * self.hidden * self.inner * dtype.itemsize + 4 * 2 * self.inner


def sizes(device: str, ranks: int, quick: bool) -> Size:
    """A step of about 20 ms; experts of 44 MB on a GPU."""
    slots = 16
    experts = ranks * (slots - 2)
    if device == "cuda":
        return Size(30, experts, slots, 7168, 1024, 64, 8, *((60, 3) if quick else (100, 5)))
    return Size(4, experts, slots, 128, 64, 32, 4, *((40, 3) if quick else (150, 7)))


class Model(EplbAdaptor):
    """MoE layers whose experts know who they are, on one rank."""

    def __init__(self, size: Size, rank: int, num_ranks: int, device: torch.device, groups: dict[str, Any]) -> None:
        self.name, self.rank, self.device, self.size = "stall", rank, device, size
        self.topology, self.num_groups = Topology.even(num_ranks), 1
        self.control_group, self.transfer_group = groups["control"], groups["transfer"]
        self.device_group, self._compute_group = groups["device"], groups["compute"]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        redundant = num_ranks * size.slots - size.experts
        self.placement = spread(Placement.initial(size.layers, size.experts, num_ranks, redundant))
        shape = (size.slots, size.hidden, 2 * size.inner)
        self.w13 = [torch.empty(shape, dtype=self.dtype, device=device) for _ in range(size.layers)]
        self.w2 = [
            torch.empty((size.slots, size.inner, size.hidden), dtype=self.dtype, device=device)
            for _ in range(size.layers)
        ]
        self.scale = [torch.empty((size.slots, 2 * size.inner), device=device) for _ in range(size.layers)]
        self.maps = DispatchMaps(self.placement, device, num_ranks)
        self.fill()
        self.recorder = LoadRecorder(size.layers, size.experts, num_ranks * size.slots, device)
        rng = np.random.default_rng(rank)
        ids = np.argsort(rng.random((size.layers, size.tokens, size.experts)), axis=-1)[..., : size.top_k]
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.start = torch.randn((size.tokens, size.hidden), generator=torch.Generator().manual_seed(rank)).to(
            device, self.dtype
        )
        self.result = torch.zeros_like(self.start)
        self._ones = torch.ones_like(self.recorder.recording)

    def fill(self) -> None:
        """Weights and maps of the first placement."""
        for layer in range(self.size.layers):
            for slot in range(self.size.slots):
                pairs = zip(self._tensors(layer, slot), self.expert(layer, self._held(layer, slot)), strict=True)
                for target, value in pairs:
                    target.copy_(value)
        self.maps.prepare(self.placement, list(range(self.size.layers)))
        self.maps.commit()

    def _held(self, layer: int, slot: int) -> int:
        return int(self.placement.physical_to_logical[layer, self.rank * self.size.slots + slot])

    def _tensors(self, layer: int, slot: int) -> list[torch.Tensor]:
        return [self.w13[layer][slot], self.w2[layer][slot], self.scale[layer][slot]]

    def expert(self, layer: int, expert: int) -> list[torch.Tensor]:
        """The weights of a logical expert; the same on every rank."""
        size = self.size
        generator = torch.Generator(self.device).manual_seed(100_003 * layer + expert)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        return [
            draw(size.hidden, 2 * size.inner) * size.hidden**-0.5,
            draw(size.inner, size.hidden) * size.inner**-0.5,
            draw(2 * size.inner).float(),
        ]

    # what the balancer needs

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [[self._tensors(layer, slot) for slot in range(self.size.slots)] for layer in range(self.size.layers)]

    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        self.maps.prepare(placement, layers)

    def commit_maps(self) -> None:
        self.maps.commit()

    def forget_prepared_maps(self) -> None:
        self.maps.forget_prepared()

    # the forward

    def forward(self, mapped: bool) -> None:
        """One step. Without mapping, expert e is computed in slot e of the unreplicated layout, wherever it lies: the
        same work without redundancy."""
        x = self.start
        for layer in range(self.size.layers):
            ids = self.ids[layer]
            if mapped:
                slots = ops.map_and_record(
                    ids,
                    self.maps.logical_to_physical[layer],
                    self.maps.replica_count[layer],
                    self.recorder.counts[layer],
                    self.recorder.recording,
                )
                per_rank = self.size.slots
            else:
                slots, per_rank = ids, self.size.experts // self.topology.num_ranks
            x = x + self._experts(layer, x, slots, per_rank)
            x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        self.result.copy_(x)

    def _experts(self, layer: int, x: torch.Tensor, slots: torch.Tensor, per_rank: int) -> torch.Tensor:
        ranks, (tokens, top_k) = self.topology.num_ranks, slots.shape
        capacity = tokens * top_k  # whatever the routing, it fits: shapes must not depend on data in a graph
        flat = slots.reshape(-1).long()
        to = flat // per_rank
        nth = (torch.nn.functional.one_hot(to, ranks).cumsum(0) - 1).gather(1, to[:, None])[:, 0]
        place = to * capacity + nth
        sent = x.new_zeros((ranks * capacity, x.shape[1])).index_copy_(0, place, x.repeat_interleave(top_k, 0))
        sent_slot = torch.full((ranks * capacity,), per_rank, dtype=torch.int32, device=x.device)
        sent_slot.index_copy_(0, place, (flat % per_rank).int())
        got, got_slot = self._all_to_all(sent), self._all_to_all(sent_slot)
        order = got_slot.argsort(stable=True)
        y = self._grouped(layer, got[order], got_slot[order])
        back = self._all_to_all(torch.empty_like(y).index_copy_(0, order, y))
        return back[place].view(tokens, top_k, -1).mean(1)

    def _all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor, group=self._compute_group)
        return out

    def _grouped(self, layer: int, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Each row through the expert in its slot; rows beyond the last slot are padding."""
        count, inner = self.size.slots, self.size.inner
        ends = torch.searchsorted(slots, torch.arange(count, dtype=torch.int32, device=x.device), right=True).int()
        real = (slots < count)[:, None]
        scale = self.scale[layer][slots.clamp(max=count - 1).long()].to(x.dtype)
        if x.device.type == "cuda":
            h = torch._grouped_mm(x, self.w13[layer], offs=ends) * (1 + 1e-3 * scale)
            h = torch.where(real, torch.nn.functional.silu(h[:, :inner]) * h[:, inner:], 0)
            return torch.where(real, torch._grouped_mm(h, self.w2[layer], offs=ends), 0)
        y, first = torch.zeros_like(x), 0
        for slot, end in enumerate(ends.tolist()):
            if end > first:
                h = x[first:end] @ self.w13[layer][slot] * (1 + 1e-3 * scale[first:end])
                y[first:end] = torch.nn.functional.silu(h[:, :inner]) * h[:, inner:] @ self.w2[layer][slot]
            first = end
        return y

    # checks

    def wrong_slots(self, placement: Placement) -> int:
        """Slots of this rank that do not hold bit for bit what ``placement`` says."""
        wrong, first = 0, self.rank * self.size.slots
        for layer in range(self.size.layers):
            for slot in range(self.size.slots):
                expert = int(placement.physical_to_logical[layer, first + slot])
                pairs = zip(self._tensors(layer, slot), self.expert(layer, expert), strict=True)
                wrong += not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        return wrong


def spread(placement: Placement) -> Placement:
    """The same experts laid out so that redundant copies are on another rank than the originals."""
    slots, ranks, size = placement.physical_to_logical, placement.num_ranks, placement.slots_per_rank
    out = np.empty_like(slots)
    own = placement.num_experts // ranks
    for layer, row in enumerate(slots):
        extra = np.roll(np.sort(row[placement.num_experts :]), layer)
        for rank in range(ranks):
            out[layer, rank * size : rank * size + own] = np.arange(rank * own, (rank + 1) * own)
            spare = size - own
            out[layer, rank * size + own : (rank + 1) * size] = extra[rank * spare : (rank + 1) * spare]
    return Placement(out, placement.num_experts, ranks)


@dataclass(frozen=True)
class Exchange:
    """A change of placement and the way back, both as swaps of two slots on different ranks, each a group of its own.

    Attributes:
        start, target: the two placements.
        there, back: int32 [M, 4], moves as in a plan.
    """

    start: Placement
    target: Placement
    there: npt.NDArray[np.int32]
    back: npt.NDArray[np.int32]

    @classmethod
    def of(cls, start: Placement, share: float, layers: int, seed: int) -> Exchange:
        """Moves about ``share`` of all slots of the first ``layers`` layers."""
        rng, size, ranks = np.random.default_rng(seed), start.slots_per_rank, start.num_ranks
        there, back = [], []
        for layer in range(layers):
            free = [list(rng.permutation(size) + rank * size) for rank in range(ranks)]
            for _ in range(max(1, round(share * start.num_slots / 2))):
                first, second = rng.permutation([rank for rank in range(ranks) if free[rank]])[:2]
                a, b = int(free[first].pop()), int(free[second].pop())
                held_a, held_b = (int(start.physical_to_logical[layer, slot]) for slot in (a, b))
                group = len(there) // 2
                there += [(layer, a, held_b, group), (layer, b, held_a, group)]
                back += [(layer, a, held_a, group), (layer, b, held_b, group)]
        moves = np.array(there, dtype=np.int32)
        return cls(start, start.with_moves(moves), moves, np.array(back, dtype=np.int32))

    def rounds(self, begin: Placement, topology: Topology, buffer: int) -> list[Round]:
        moves = self.there if begin == self.start else self.back
        return schedule_rounds(begin, moves, topology, buffer)

    def plan(self, begin: Placement) -> Plan:
        """A plan that promises much, so that it is carried out."""
        after, moves = (self.target, self.there) if begin == self.start else (self.start, self.back)
        layers = begin.num_layers
        return Plan(after.physical_to_logical, moves, np.full(layers, 2.0), np.full(layers, 1.0), "fixed")


class FixedPlanner:
    """Answers at once with a plan made beforehand: there and back again, ``allowed`` times; then nothing moves."""

    def __init__(self, exchange: Exchange, topology: Topology, buffer: int) -> None:
        self._answers = {
            begin.digest: (exchange.plan(begin), rounds_to_array(exchange.rounds(begin, topology, buffer)))
            for begin in (exchange.start, exchange.target)
        }
        layers = exchange.start.num_layers
        even = np.ones(layers)
        nothing = Plan(exchange.start.physical_to_logical, np.zeros((0, 4), dtype=np.int32), even, even, "fixed")
        self._nothing = nothing, np.zeros((0, 7), dtype=np.int32)
        self._request: PlanRequest | None = None
        self.allowed = 0
        self.starts = 1

    def submit(self, request: PlanRequest) -> None:
        self._request = request

    def answer(self, number: int) -> PlanAnswer | None:
        request = self._request
        if request is None or request.number != number:
            return None
        self._request = None
        if not self.allowed:
            return PlanAnswer(number, *self._nothing)
        self.allowed -= 1
        return PlanAnswer(number, *self._answers[request.placement.digest])

    def close(self, wait: float | None = None) -> None:
        pass


@dataclass
class Column:
    """Step times of one kind, in ms."""

    name: str
    steps: list[float] = field(default_factory=list)
    segments: list[list[float]] = field(default_factory=list)

    def add(self, steps: list[float]) -> None:
        self.steps += steps
        self.segments.append(steps)

    @property
    def summary(self) -> dict[str, Any]:
        steps = sorted(self.steps)
        if not steps:
            return {"name": self.name, "steps": 0}
        return {
            "name": self.name,
            "steps": len(steps),
            "median_ms": statistics.median(steps),
            "p99_ms": steps[min(len(steps) - 1, int(0.99 * len(steps)))],
            "longest_ms": steps[-1],
            "segment_medians_ms": [statistics.median(segment) for segment in self.segments if segment],
        }


class Loop:
    """Runs steps and times them on the device."""

    def __init__(self, model: Model, barrier: Callable[[], None]) -> None:
        self.model, self.barrier = model, barrier
        self.cuda = model.device.type == "cuda"
        self.graphs = {mapped: self._capture(mapped) for mapped in (True, False)}

    def _capture(self, mapped: bool) -> Callable[[], None]:
        if not self.cuda:
            return lambda: self.model.forward(mapped)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.model.forward(mapped)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.model.forward(mapped)
        torch.cuda.synchronize()
        return graph.replay

    def run(
        self,
        count: int,
        mapped: bool = True,
        before: Callable[[], Any] | None = None,
        after: Callable[[], Any] | None = None,
        extra: Callable[[], None] | None = None,
    ) -> tuple[list[float], list[Any]]:
        """Step times in ms, and what ``before`` returned at each step.

        The host runs one step ahead of the device, as an engine with asynchronous scheduling does.
        """
        self.barrier()
        step, marks, results = self.graphs[mapped], [], []
        for number in range(count + 1):
            if number and before is not None:
                results.append(before())
            step()
            if extra is not None:
                extra()
            if number and after is not None:
                after()
            marks.append(self.mark())
            if number > 1 and self.cuda:
                marks[number - 1].synchronize()
        if self.cuda:
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        else:
            times = [1e3 * (b - a) for a, b in pairwise(marks)]
        return times, results

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event


def settings(transport: str, interval: int, buffer: int | None, budget_mb: float | None) -> EplbConfig:
    return EplbConfig(
        dynamic_eplb=True,
        expert_heat_collection_interval=interval,
        algorithm_execution_interval=1,
        transport=transport,
        transfer_buffer_experts=buffer,
        transfer_budget_mb_per_step=budget_mb,
    )


class Bench:
    """One rank's part of the whole benchmark."""

    def __init__(self, rank: int, ranks: int, args: argparse.Namespace) -> None:
        self.rank, self.ranks, self.args, self.began = rank, ranks, args, time.monotonic()
        self.device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        everyone = list(range(ranks))
        gloo = {name: dist.new_group(everyone, backend="gloo") for name in ("barrier", "control", "transfer")}
        compute, device = gloo["barrier"], None
        if self.device.type == "cuda":
            from vllm_ascend_eplb.transfer.collective import bounded_nccl_options

            compute = dist.new_group(everyone, backend="nccl")
            device = dist.new_group(everyone, backend="nccl", pg_options=bounded_nccl_options())
        self.groups = {**gloo, "compute": compute, "device": device}
        self.size = sizes(self.device.type, ranks, args.quick)
        self.report: dict[str, Any] = {"checks": {}}
        self.columns: dict[str, Column] = {}
        self.say(f"{ranks} ranks on {self.machine()}, torch {torch.__version__}; building the model")
        self.model = Model(self.size, rank, ranks, self.device, self.groups)
        self.loop = Loop(self.model, self.barrier)
        self.tenth = Exchange.of(self.model.placement, 0.1, self.size.layers, 7)
        self.few = Exchange.of(self.model.placement, 0.1, max(1, self.size.layers // 10), 7)
        self.patience = 20.0 if args.quick else 60.0
        """Seconds for one part of the benchmark; what takes longer is a failed check."""

    def machine(self) -> str:
        if self.device.type == "cuda":
            return f"{self.ranks} x {torch.cuda.get_device_name(self.device)}"
        return f"{platform.machine()} CPU, {os.cpu_count()} cores"

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.monotonic() - self.began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.groups["barrier"])

    def everywhere(self, value: float, op: Any = dist.ReduceOp.MAX) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.groups["barrier"])
        return float(tensor)

    def check(self, name: str, good: bool) -> None:
        good = self.everywhere(float(not good)) == 0
        self.report["checks"][name] = self.report["checks"].get(name, True) and good
        if not good:
            self.say(f"CHECK FAILED: {name}")

    def column(self, name: str) -> Column:
        return self.columns.setdefault(name, Column(name))

    # ---- parts

    def run(self) -> dict[str, Any]:
        self.loop.run(20)
        reference = self.model.result.clone()
        start = self.model.placement
        self.report["loop"] = {
            **asdict(self.size),
            "expert_mb": self.size.expert_bytes(self.model.dtype) / 1e6,
            "ranks": self.ranks,
        }
        self.report["plain"] = self.plain_rates()
        self.quiet()
        self.cycles(self.args.transports[0], self.tenth)
        if self.args.without_checksums:
            self.cycles(self.args.transports[0], self.tenth, checksums=False)
        self.stop_the_world()
        if self.args.budget_mb:
            self.cycles(self.args.transports[0], self.few, budget_mb=self.args.budget_mb)
        if self.device.type == "cuda":
            self.beside_cooperative_kernels()
        for transport in self.args.transports[1:]:
            self.cycles(transport, self.few if transport == "gloo" else self.tenth)
        self.loop.run(3)
        self.check("the forward gives the same result after all cycles", self.same(reference))
        self.check("slots hold what the maps say", self.model.wrong_slots(self.model.placement) == 0)
        self.check("the balancer came back to the first placement", self.model.placement == start)
        self.report["columns"] = {name: column.summary for name, column in self.columns.items()}
        self.compare()
        return self.report

    def same(self, reference: torch.Tensor) -> bool:
        error = (self.model.result.float() - reference.float()).norm() / reference.float().norm()
        return bool(error < (2e-2 if self.model.dtype is torch.bfloat16 else 1e-4))

    def plain_rates(self) -> dict[str, float]:
        """GB/s of plain send/recv of experts (NCCL, unbounded; Gloo on a CPU), with nothing else going on."""
        if self.ranks < 2:
            return {}
        count, size = 4, self.size.expert_bytes(self.model.dtype)
        mine = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(count)]
        theirs = [torch.zeros_like(tensor) for tensor in mine]
        to, source = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        times = []
        for _ in range(6):
            self.barrier()
            marks = [self.loop.mark()]
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, tensor, to, self.groups["compute"], tag=i) for i, tensor in enumerate(mine)]
                + [
                    dist.P2POp(dist.irecv, tensor, source, self.groups["compute"], tag=i)
                    for i, tensor in enumerate(theirs)
                ]
            )
            for work in works:
                work.wait()
            marks.append(self.loop.mark())
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                times.append(marks[0].elapsed_time(marks[1]) / 1e3)
            else:
                times.append(marks[1] - marks[0])
        return {"send_recv_gb_per_s": count * size / statistics.median(times[1:]) / 1e9}

    def updator(self, transport: str, interval: int, exchange: Exchange, budget_mb: float | None = None) -> EplbUpdator:
        updator = build_updator(self.model, settings(transport, interval, self.args.buffer, budget_mb))
        if self.rank == 0:
            planner = FixedPlanner(exchange, self.model.topology, updator.parts.loader.buffer_experts)
            updator.parts.planner = planner  # type: ignore[assignment]
        return updator

    def quiet(self) -> None:
        """none, off and idle, in turns."""
        updator = self.updator(self.args.transports[0], 10_000_000, self.tenth)
        self.say(updator.parts.loader.describe())
        self.report["staging"] = updator.parts.loader.describe()
        for _ in range(self.size.segments):
            self.column("none").add(self.loop.run(self.size.segment, mapped=False)[0])
            updator.pause_recording()
            self.column("off").add(self.loop.run(self.size.segment)[0])
            times, _ = self.loop.run(self.size.segment, before=updator.forward_before, after=updator.forward_end)
            self.column("idle").add(times)
            self.say(" | ".join(f"{name} {self.column(name).summary['median_ms']:.3f}" for name in self.columns))
        updator.pause_recording()
        updator.close()

    def cycles(
        self, transport: str, exchange: Exchange, budget_mb: float | None = None, checksums: bool = True
    ) -> None:
        """Cycles there and back again; the steps of the pauses between them are left out."""
        updator = self.updator(transport, 4, exchange, budget_mb)
        loader = updator.parts.loader
        name = f"cycle, {loader.transport}" + (f", {budget_mb:g} MB per step" if budget_mb else "")
        if not checksums:
            loader.checksums, name = None, f"{name}, no checksums"
        self.say(f"{name}: {loader.describe()}")
        self.move(updator, exchange, 2, updator.forward_before)  # a warm-up
        self.loop.run(2)
        memory, wanted = device_allocations(self.device), 2 if self.args.quick else 10
        first = (loader.bytes_received, loader.seconds_in_flight, loader.seconds_on_device)
        end = loader.commits + wanted // 2 * sum(rounds_of(exchange, loader))
        phases: list[Phase] = []  # COLLECT once all has moved
        hidden: list[str] = []

        def before() -> None:
            going = loader.commits < end
            try:
                with no_hidden_synchronisation(self.device):
                    updator.forward_before()
            except RuntimeError as error:
                hidden.append(str(error))
                raise
            phases.append(updator.state.phase if going else Phase.COLLECT)

        times, complete = self.move(updator, exchange, wanted, before)
        self.check(f"{name}: completes its cycles", complete)
        self.check(f"{name}: no hidden synchronisation", not hidden)
        self.check(f"{name}: no device memory is allocated", device_allocations(self.device) == memory)
        self.check(f"{name}: slots hold what the maps say", self.model.wrong_slots(updator.placement) == 0)
        busy = [ms for ms, phase in zip(times, phases, strict=True) if phase is not Phase.COLLECT]
        self.column(name).add(busy)
        moved, waiting = loader.bytes_received - first[0], updator.parts.control.waiting
        self.report.setdefault("cycles", {})[name] = {
            "transport": loader.transport,
            "cycles": wanted,
            "rounds_per_cycle": statistics.mean(rounds_of(exchange, loader)),
            "fewest_rounds": bound_of(exchange, loader),
            "move_steps_per_cycle": sum(phase is Phase.MOVE for phase in phases) / wanted,
            "gb_per_cycle_and_rank": moved / 1e9 / wanted,
            "gb_per_s_in_flight": rate(moved, loader.seconds_in_flight - first[1]),
            "gb_per_s_on_device": rate(moved, loader.seconds_on_device - first[2]),
            "control_wait_us_mean": 1e6 * waiting.total / max(1, waiting.reads),
            "control_wait_us_longest": 1e6 * waiting.longest,
        }
        self.say(f"{self.column(name).summary} {self.report['cycles'][name]}")
        self.leave(updator)

    def move(
        self,
        updator: EplbUpdator,
        exchange: Exchange,
        cycles: int,
        before: Callable[[], None],
        extra: Callable[[], None] | None = None,
    ) -> tuple[list[float], bool]:
        """Runs steps until so many cycles (an even number) have moved weights; whether they did in time."""
        if self.rank == 0:
            updator.parts.planner.allowed += cycles  # type: ignore[union-attr]
        end = updator.parts.loader.commits + cycles // 2 * sum(rounds_of(exchange, updator.parts.loader))
        times: list[float] = []
        began = time.monotonic()
        while updator.parts.loader.commits < end and self.everywhere(time.monotonic() - began) < self.patience:
            times += self.loop.run(20, before=before, after=updator.forward_end, extra=extra)[0]
        return times, updator.parts.loader.commits == end and updator.placement == self.model.placement

    def leave(self, updator: EplbUpdator) -> None:
        """Ends a part; one that failed leaves nothing behind for the next."""
        updator.pause_recording()
        updator.close()
        if self.everywhere(float(updator.placement != self.model.placement)):
            self.model.fill()
        self.barrier()

    def beside_cooperative_kernels(self) -> None:
        """A kernel that needs every core at once in every step, hosts skewed by several steps: nothing may hang."""
        kernel = cooperative_kernel(self.device)
        updator = self.updator(self.args.transports[0], 4, self.few)
        skew = np.random.default_rng(self.rank)

        def before() -> None:
            if skew.random() < 0.05:
                time.sleep(0.1)
            updator.forward_before()

        _, complete = self.move(updator, self.few, 6, before, kernel)
        good = complete and self.model.wrong_slots(updator.placement) == 0
        self.check("cycles beside kernels that need all cores, with skewed hosts", good)
        self.say(f"beside cooperative kernels: {updator.state.cycle} cycles, phase {updator.state.phase.name}")
        self.leave(updator)

    def stop_the_world(self) -> None:
        """The same rounds by the same loader, all ranks waiting, as a single step."""
        loader = D2DExpertWeightLoader(
            self.model.expert_tensors(),
            self.model.transfer_group,
            self.rank,
            self.args.buffer,
            self.args.transports[0],
            topology=self.model.topology,
            device_group=self.model.device_group,
        )
        for turn in range(2 * (1 if self.args.quick else 5)):
            a = self.tenth.target if turn % 2 else self.tenth.start
            rounds = self.tenth.rounds(a, self.model.topology, loader.buffer_experts)

            def stop(a: Placement = a, rounds: list[Round] = rounds) -> None:
                self.barrier()
                now = a
                for round_ in rounds:
                    loader.prepare(round_)
                    loader.issue(round_.number)
                    while loader.rounds_done <= round_.number and not loader.poisoned:
                        time.sleep(20e-6)
                    self.barrier()
                    loader.commit(round_.number)
                    now = now.with_moves(round_.moves)
                loader.forget()
                self.model.maps.prepare(now, list(range(self.size.layers)))
                self.model.maps.commit()
                self.barrier()

            once = iter([stop])
            times, _ = self.loop.run(3, before=lambda once=once: next(once, lambda: None)())
            self.column("stop the world").add([times[0]])
        self.say(f"{self.column('stop the world').summary}")
        loader.close()

    def compare(self) -> None:
        """Ratios to ``off``, of medians of segments taken in turns."""
        columns = self.report["columns"]
        off = columns["off"]
        ratios = [
            statistics.median(b) / statistics.median(a)
            for a, b in zip(self.columns["off"].segments, self.columns["idle"].segments, strict=True)
        ]
        self.report["idle_over_off_median"] = statistics.median(ratios)
        self.report["idle_over_off_p99"] = columns["idle"]["p99_ms"] / off["p99_ms"]
        for name, column in columns.items():
            if column["steps"] and name.startswith("cycle"):
                column["over_off_median"] = column["median_ms"] / off["median_ms"]
                column["over_off_p99"] = column["p99_ms"] / off["p99_ms"]
                column["longest_over_off_p99_ms"] = column["longest_ms"] - off["p99_ms"]


def rate(nbytes: int, seconds: float) -> float:
    """GB/s; 0 where nothing was timed."""
    return nbytes / 1e9 / seconds if seconds > 0 else 0.0


def rounds_of(exchange: Exchange, loader: D2DExpertWeightLoader) -> tuple[int, int]:
    """Rounds there and back."""
    there, back = (
        len(exchange.rounds(begin, loader.topology, loader.buffer_experts))
        for begin in (exchange.start, exchange.target)
    )
    return there, back


def bound_of(exchange: Exchange, loader: D2DExpertWeightLoader) -> int:
    """Rounds that the busiest rank's receives need at least."""
    receives = np.bincount(exchange.there[:, 1] // loader.slots_per_rank)
    return -(-int(receives.max()) // loader.buffer_experts)


def device_allocations(device: torch.device) -> tuple[int, ...]:
    """What the allocator took from the device so far, and how often."""
    if device.type != "cuda":
        return ()
    stats = torch.cuda.memory_stats(device)
    return (stats["segment.all.allocated"], stats["reserved_bytes.all.current"])


@contextlib.contextmanager
def no_hidden_synchronisation(device: torch.device) -> Any:
    """Raises where work of the step thread waits for the device without saying so."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cooperative_kernel(device: torch.device) -> Callable[[], None]:
    """A kernel whose blocks fill the device and wait for each other, launched cooperatively."""
    import cupy

    source = """
    extern "C" __global__ void meet(unsigned int* arrived) {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned int all = (atomicAdd(arrived, 1u) / gridDim.x + 1) * gridDim.x;
            while (*(volatile unsigned int*)arrived < all) {}
        }
        __syncthreads();
    }"""
    kernel = cupy.RawKernel(source, "meet", enable_cooperative_groups=True)
    shared = 200 * 1024  # no other block fits beside it on a core
    kernel.max_dynamic_shared_size_bytes = shared
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def launch() -> None:
        with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel((cores,), (1024,), (np.uint64(arrived.data_ptr()),), shared_mem=shared)

    launch()
    torch.cuda.synchronize()
    return launch


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
