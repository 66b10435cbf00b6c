# SPDX-License-Identifier: Apache-2.0
"""One rank's part of benchmarks/stall.py: all columns and checks."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.stall_loop import Column, Loop, cooperative_kernel, device_allocations, no_hidden_synchronisation
from benchmarks.stall_model import Model, sizes
from benchmarks.stall_plans import Exchange, FixedPlanner, bound_of, rounds_of
from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.start import build_updator
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.values.rounds import Round


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
        """End a part. A part that failed leaves nothing behind for the next part."""
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
