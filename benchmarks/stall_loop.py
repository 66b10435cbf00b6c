# SPDX-License-Identifier: Apache-2.0
"""The decode loop of benchmarks/stall.py: its steps, their times, and kernels that may disturb them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

from benchmarks.stall_model import Model


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
