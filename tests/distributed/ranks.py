# SPDX-License-Identifier: Apache-2.0
"""Run a function on several ranks over Gloo, in one process per rank.

The processes are forked from a server that has already imported what ranks need, so eight ranks start in about a
second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SIGNALS = "EPLB_TEST_SIGNALS"
"""Variable with a folder of these ranks; files in it are events between the ranks and their planner's process."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "pytest",  # the modules of tests, which ranks import, do
        "prometheus_client",
        "vllm_ascend_eplb.balancer.start",
    ]
)


@dataclass
class Ranks:
    """First argument of a rank's function."""

    rank: int
    num_ranks: int
    control: Any
    transfer: Any


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    survive: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """Run ``function(Ranks, *args)`` on every rank and return the results in rank order. If a rank fails, the other
    ranks continue until ``survive()`` is true, for at most 20 seconds.

    Raises:
        RuntimeError: a rank raised, died or did not end in time. All ranks are killed then.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(theirs, rank, num_ranks, str(Path(folder, "store")), function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        except RuntimeError:
            end = time.monotonic() + 20
            while not survive() and time.monotonic() < end:
                time.sleep(0.02)
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if not good:  # maybe because another rank died: its sockets close before its pipe does
                silent = [number for number in range(len(pipes)) if number != rank and _died(pipes[number])]
                died = [f"rank {number} died" for number in silent]
                raise RuntimeError("; ".join([*died, f"rank {rank} failed:\n{value}"]))
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _died(pipe: Any) -> bool:
    """Whether the process at the other end of a pipe ends within a second without a result."""
    try:
        if pipe.poll(1.0):
            pipe.recv()
    except EOFError:
        return True
    return False


def _main(
    pipe: Any, rank: int, num_ranks: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    tempfile.tempdir = os.environ[SIGNALS] = str(Path(store).parent)  # flight records are removed with the folder
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
        everyone = list(range(num_ranks))
        ranks = Ranks(
            rank, num_ranks, dist.new_group(everyone, backend="gloo"), dist.new_group(everyone, backend="gloo")
        )
        value = function(ranks, *args)
        dist.barrier()  # no rank closes its sockets while another rank still uses them
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
