# SPDX-License-Identifier: Apache-2.0
"""Serve a model under steady requests and random faults for a given time: ``python -m tests.e2e.soak``.

Every few seconds a fault is injected. Every answer is compared, token by token, with that of one process without expert
parallelism. The server's memory, threads, files and sockets are measured. The faults and results are written to
soak.json and soak.md in the report folder. The exit status is 0 if no request failed, no token was wrong and nothing
grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from examples.demo.reference import reference_tokens
from examples.demo.server import REPOSITORY, Server, ServerError
from examples.tiny_moe.expert_load import read_prompts

from .private_server import SETTINGS, PrivateServer, planners, workers
from .resources import measure as measured
from .soak_judge import growth, judge, report
from .steady_requests import STREAMS, TOKENS, Answers, Pairs, Requests

DOMAINS = ("english", "python")
PROMPTS = 12
SAMPLE_SECONDS = 5.0


# --- the server's resources -------------------------------------------------------------------------------------------


def measure(server: Server) -> dict[str, float]:
    """The resources of all processes of the server except the planner, which is replaced every few seconds."""
    found = measured(set(server.processes()) - set(planners(server)))
    return {**found, "shared_memory": len(server.shared_memory())}


# --- faults -----------------------------------------------------------------------------------------------------------


class Faults:
    """Injects one fault after another; every fault is undone before the next."""

    def __init__(self, server: PrivateServer, requests: Requests, luck: random.Random) -> None:
        self._server, self._requests, self._stats, self._luck = server, requests, server.stats_path, luck
        self.done: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], Any]] = {
            "planner killed (SIGKILL)": lambda: self._signal(planners, signal.SIGKILL),
            "planner crashed (SIGSEGV)": lambda: self._signal(planners, signal.SIGSEGV),
            "planner killed three times in a row": self._kill_thrice,
            "planner stopped for 1 to 5 s": lambda: self._pause(planners, 1, 5),
            "one rank stopped for 0.2 to 3 s": lambda: self._pause(workers, 0.2, 3),
            "six requests aborted at once": self._abort,
            "no requests for 1 to 3 s": self._idle,
            "statistics file deleted": self._delete_stats,
            "statistics file full of zeros": self._zero_stats,
        }
        if server.small_disk:
            self.kinds["disk of the recorded map full for 0.5 to 2 s"] = lambda: self._while(server.full_disk)
            self.kinds["disk of the statistics full for 0.5 to 2 s"] = lambda: self._while(server.full_statistics_disk)

    async def run(self, stopping: asyncio.Event) -> None:
        names: list[str] = []
        while not stopping.is_set():
            if not names:  # all faults in turn, in a new order every time
                names = self._luck.sample(sorted(self.kinds), len(self.kinds))
            name = names.pop()
            if await self.kinds[name]() is not False:
                self.done[name] += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._luck.uniform(2.0, 5.0))

    async def _signal(self, find: Callable[[Server], list[int]], number: int) -> bool:
        found = find(self._server)
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._luck.choice(found), number)
        return True

    async def _kill_thrice(self) -> bool:
        hit = 0
        for _ in range(3):
            hit += await self._signal(planners, signal.SIGKILL)
            await asyncio.sleep(self._luck.uniform(0.2, 1.5))
        return hit > 0

    async def _pause(self, find: Callable[[Server], list[int]], low: float, high: float) -> bool:
        found = find(self._server)
        if not found:
            return False
        pid = self._luck.choice(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._luck.uniform(low, high))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return True

    async def _abort(self) -> None:
        await asyncio.gather(*(self._requests.abort() for _ in range(6)))

    async def _idle(self) -> None:
        self._requests.pause.clear()
        try:
            await asyncio.sleep(self._luck.uniform(1, 3))
        finally:
            self._requests.pause.set()

    async def _while(self, fault: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        with fault():
            await asyncio.sleep(self._luck.uniform(0.5, 2))

    async def _delete_stats(self) -> None:
        self._stats.unlink(missing_ok=True)

    async def _zero_stats(self) -> None:
        self._stats.write_bytes(b"\0" * (8 << 20))


# --- the run ----------------------------------------------------------------------------------------------------------


async def under_load(server: Server, seed: int, pairs: Pairs, go: Callable[[Requests], Awaitable[object]]) -> Answers:
    """Send requests until ``go(requests)`` is over, and return their results."""
    luck, stopping, requests = random.Random(seed), asyncio.Event(), Requests(server.url, pairs)
    streams = [asyncio.create_task(requests.stream(random.Random(luck.random()), stopping)) for _ in range(STREAMS)]
    try:
        await go(requests)
    finally:
        stopping.set()
        requests.pause.set()
        await asyncio.gather(*streams)
        await requests.close()
    return requests.answers


async def soak(server: PrivateServer, minutes: float, seed: int, pairs: Pairs) -> dict[str, Any]:
    """Inject random faults for ``minutes``."""
    samples: list[dict[str, float]] = []
    result: dict[str, Any] = {"samples": samples, "stats": None}

    async def go(requests: Requests) -> None:
        await asyncio.sleep(5)  # the first requests warm everything up
        began, stopping = time.monotonic(), asyncio.Event()
        faults = Faults(server, requests, random.Random(seed + 1))
        result["before"] = server.stats()
        trouble = asyncio.create_task(faults.run(stopping))
        try:
            while time.monotonic() - began < 60 * minutes:
                await asyncio.sleep(min(SAMPLE_SECONDS, 6 * minutes))
                server.check_alive()
                samples.append(await asyncio.to_thread(measure, server) | {"requests": requests.answers.requests})
        except asyncio.CancelledError:  # Ctrl-C ends the run early, with a report
            print(f"interrupted after {time.monotonic() - began:.0f} seconds", flush=True)
        stopping.set()
        await trouble
        result.update(faults=faults.done, seconds=round(time.monotonic() - began, 1))
        for _ in range(100):  # the statistics come back after the last fault
            with contextlib.suppress(ServerError):
                result["stats"] = server.stats()
            if result["stats"] is not None and result["stats"].cycles_done:
                break
            await asyncio.sleep(0.2)

    result["answers"] = await under_load(server, seed, pairs, go)
    return result


def reference(folder: Path) -> Pairs:
    """Prompts and their answers; the answers are kept in the folder for the next run."""
    kept = folder / "reference.json"
    if not kept.exists():
        kept.write_text(json.dumps(reference_tokens(list(DOMAINS), TOKENS, 16)))
    answers = json.loads(kept.read_text())
    return [
        (text, tokens)
        for name in DOMAINS
        for text, tokens in list(zip(read_prompts(name), answers[name], strict=True))[:PROMPTS]
    ]


ENDS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "crash": signal.SIGKILL}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "30")))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--parallel", choices=("tensor", "data"), default="tensor")
    parser.add_argument("--end", choices=sorted(ENDS), default="interrupt", help="how the server is ended")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "soak")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    pairs = reference(folder)
    server = PrivateServer(folder, arguments.parallel)
    try:
        server.start_and_wait()
        open_to_others = server.open_to_others()
        result = asyncio.run(soak(server, arguments.minutes, arguments.seed, pairs))
        log = server.log_path.read_text(errors="replace")
        left = [f"{path} is open to other users" for path in open_to_others]
        left += server.end_by(ENDS[arguments.end], pairs)
    finally:
        server.remove()
    result.update(
        growth=growth(result["samples"]),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        seed=arguments.seed,
        parallel=f"{arguments.parallel}-parallel size",
        end=arguments.end,
        settings=SETTINGS,
    )
    result["failures"] = judge(result, left, log)
    result["answers"] = vars(result["answers"])
    result["stats"] = json.loads(result["stats"].to_json()) if result["stats"] is not None else None
    del result["before"]
    (folder / "soak.json").write_text(json.dumps(result, indent=1))
    text = report(result)
    (folder / "soak.md").write_text(text)
    print(text)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
