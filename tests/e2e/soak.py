# SPDX-License-Identifier: Apache-2.0
"""A served model under steady requests and random faults, for a given time: ``python -m tests.e2e.soak``.

Every few seconds something goes wrong on purpose; all the while each answer is compared, token by token, with those of
one process without expert parallelism, and the server's memory, threads, files and sockets are measured. What was done
and what came of it goes to soak.json and soak.md in the report folder. The exit status is 0 if no request failed, no
token was wrong and nothing grew.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from examples.demo.reference import reference_tokens
from examples.demo.server import REPOSITORY, Server, ServerError
from examples.tiny_moe.expert_load import read_prompts
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map
from vllm_ascend_eplb.files.run_folder import OWNED_FOLDER, STATS_VARIABLE

from ..processes import left_semaphores, parent, semaphores, title

DOMAINS = ("english", "python")
PROMPTS = 12
TOKENS = 48
STREAMS = 3
SAMPLE_SECONDS = 5.0
SETTINGS: dict[str, object] = {
    "dynamic_eplb": True,
    "num_redundant_experts": 4,
    "expert_heat_collection_interval": 3,
    "algorithm_execution_interval": 1,
    "transfer_buffer_experts": 128,
    "policy": "random",
    "min_gain": 0.0,
    "calibrate": False,
    "max_failures": 1_000_000,
    "audit_interval": 100,
    "audit_action": "repair",
}
"""A cycle follows a cycle, every one moves most experts, and audits come in between. Few steps of load, and two rounds
rather than six, make it more than one a second on two busy cores."""

KV_BLOCKS = 64
"""Of 128 tokens each: enough for all sequences, and so few that all are in memory before it is first measured."""

MOST_GROWTH = {"memory_mib": 48.0, "threads": 3, "files": 6, "sockets": 4, "shared_memory": 6}
"""What the last quarter of the samples may have more than the first, by the median. A planner that is just being
replaced has no semaphores."""

VLLM_GROWTH_MIB = ((500, 0.7), (1_000_000, 0.15))
"""By at most so much vLLM 0.32's two workers on a CPU grow with each of the first 500 requests of this kind (0.54 to
0.6 measured without this plugin), and with each one after them (0.13 measured). The memory that they may have more is
this for the requests in between, and MOST_GROWTH."""


Pairs = list[tuple[str, list[int]]]
"""Prompts and the tokens that answer them."""


@dataclass
class Answers:
    """What the requests got."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    aborted: int = 0
    tokens: int = 0
    wrong: int = 0
    first_wrong: str = ""


class Requests:
    """Keeps some requests under way; each answer is compared."""

    def __init__(self, url: str, pairs: Pairs) -> None:
        self.answers = Answers()
        self.pause = asyncio.Event()
        self.pause.set()
        self._luck = random.Random(0)
        self._pairs = pairs
        # A connection for each request: the server closes idle ones, perhaps just when the next request is sent.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(240.0), limits=limits)

    async def stream(self, luck: random.Random, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            await self.pause.wait()
            text, expected = luck.choice(self._pairs)
            try:
                response = await self._client.post("/v1/completions", json=self.completion(text))
                response.raise_for_status()
                got = response.json()["choices"][0]["token_ids"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.answers.failed.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(1)
                continue
            self.answers.requests += 1
            self.answers.tokens += max(len(got), len(expected))
            wrong = max(len(got), len(expected)) - sum(a == b for a, b in zip(got, expected, strict=False))
            self.answers.wrong += wrong
            if wrong and not self.answers.first_wrong:
                self.answers.first_wrong = f"{text[:60]!r}: expected {expected}, got {got}"

    async def abort(self) -> None:
        """Begins a request and goes away in the middle of its answer."""
        luck = self._luck
        request = self.completion(luck.choice(self._pairs)[0]) | {"stream": True, "max_tokens": 200}
        with contextlib.suppress(httpx.HTTPError):
            async with self._client.stream("POST", "/v1/completions", json=request) as response:
                count = luck.randint(1, 20)
                async for _ in response.aiter_lines():
                    count -= 1
                    if not count:
                        break
        self.answers.aborted += 1

    async def close(self) -> None:
        await self._client.aclose()

    @staticmethod
    def completion(text: str) -> dict[str, Any]:
        return {
            "model": "tiny-moe",
            "prompt": text,
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


# --- the server's processes -------------------------------------------------------------------------------------------


def planners(server: Server) -> list[int]:
    """The planner is the spawned child of a worker, or of an engine that is its own worker."""
    return [
        pid
        for pid in server.processes()
        if "spawn_main" in title(pid) and any(word in title(parent(pid)) for word in ("Worker", "EngineCore"))
    ]


def workers(server: Server) -> list[int]:
    return [pid for pid in server.processes() if "Worker" in title(pid) or "EngineCore_DP" in title(pid)]


def measure(server: Server) -> dict[str, float]:
    """What all processes of the server hold, the planner left out: it is another one every few seconds."""
    total: Counter[str] = Counter()
    left_out = set(planners(server))
    for pid in set(server.processes()) - left_out:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        total["memory_mib"] += int(fields.get("RssAnon", "0 kB").split()[0]) / 1024
        total["threads"] += int(fields.get("Threads", "0"))
        total["files"] += len(links)
        total["sockets"] += sum(link.startswith("socket:") for link in links)
        total["processes"] += 1
    total["shared_memory"] = len(server.shared_memory())
    return dict(total)


# --- faults -----------------------------------------------------------------------------------------------------------


class Faults:
    """One fault after the other, each undone before the next."""

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
            if not names:  # all in turn, in another order each time
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
    """Keeps requests under way until ``go(requests)`` is over; what they got."""
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
    """Random faults for so long."""
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
        except asyncio.CancelledError:  # Ctrl-C ends the run early, with a report of what there was
            print(f"interrupted after {time.monotonic() - began:.0f} seconds", flush=True)
        stopping.set()
        await trouble
        result.update(faults=faults.done, seconds=round(time.monotonic() - began, 1))
        for _ in range(100):  # the statistics come back by themselves after the last fault
            with contextlib.suppress(ServerError):
                result["stats"] = server.stats()
            if result["stats"] is not None and result["stats"].cycles_done:
                break
            await asyncio.sleep(0.2)

    result["answers"] = await under_load(server, seed, pairs, go)
    return result


def growth(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of the first and the last quarter of the samples, by resource."""
    quarter = max(1, len(samples) // 4)
    table = {}
    for name in (*MOST_GROWTH, "processes", "requests"):
        first = statistics.median(sample[name] for sample in samples[:quarter])
        last = statistics.median(sample[name] for sample in samples[-quarter:])
        table[name] = {"first": round(first, 1), "last": round(last, 1)}
    return table


def vllm_growth(requests: float) -> float:
    """Most MiB by which vLLM's workers have grown after so many requests."""
    total = 0.0
    for count, mib in VLLM_GROWTH_MIB:
        total += mib * min(requests, count)
        requests = max(0.0, requests - count)
    return total


def judge(result: dict[str, Any], left: list[str], log: str) -> list[str]:
    """What went wrong; empty if nothing did."""
    answers, stats, said = result["answers"], result["stats"], []
    mended_before = result["before"].audit_mended if result["before"] is not None else 0
    if answers.failed:
        said.append(f"{len(answers.failed)} requests failed: {answers.failed[0]}")
    if answers.wrong:
        said.append(f"{answers.wrong} of {answers.tokens} tokens are wrong: {answers.first_wrong}")
    if not answers.requests:
        said.append("no request was answered")
    for name, most in MOST_GROWTH.items() if "growth" in result else ():
        median = result["growth"][name]
        if name == "memory_mib":
            answered = result["growth"]["requests"]
            most += vllm_growth(answered["last"]) - vllm_growth(answered["first"])
        if median["last"] - median["first"] > most:
            said.append(f"{name} grew from {median['first']} to {median['last']}; at most {most:.0f} more are allowed")
    if stats is None or not stats.cycles_done:
        said.append("no cycle was done")
    elif stats.phase == "off":
        said.append(f"balancing went off: {stats.off_reason}")
    elif stats.audit_damaged or stats.audit_mended > mended_before:
        said.append(f"an audit found {stats.audit_damaged} damaged slots and mended {stats.audit_mended}")
    if re.search(r'File "[^"]*vllm_ascend_eplb/', log):
        said.append("there is a traceback with our code in the log")
    return said + left


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    answers, stats = result["answers"], result["stats"] or {}
    lines = [
        "# Soak",
        "",
        f"{result['seconds']:.0f} seconds on {result['machine']}, {result['parallel']} 2, seed {result['seed']}, "
        f"ended by {result['end']}: " + ("**passed**" if not result["failures"] else "**failed**"),
        "",
        *(f"- {line}" for line in [*result["failures"], ""] if result["failures"]),
        "| what | count |",
        "| --- | --- |",
        f"| requests answered | {answers['requests']} |",
        f"| requests failed | {len(answers['failed'])} |",
        f"| requests aborted on purpose | {answers['aborted']} |",
        f"| tokens compared | {answers['tokens']} |",
        f"| tokens wrong | {answers['wrong']} |",
        f"| cycles done / skipped / failed | {stats.get('cycles_done')} / {stats.get('cycles_skipped')} / "
        f"{stats.get('cycles_failed')} |",
        f"| experts moved | {stats.get('experts_moved')} |",
        f"| audits of all slots, damaged slots found | {stats.get('audits')}, {stats.get('audit_damaged')} |",
        f"| planner starts | {stats.get('planner_starts')} |",
        "",
        "| fault | times |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in sorted(result["faults"].items())),
        "",
        "| resource, median of | first quarter | last quarter |",
        "| --- | --- | --- |",
        *(f"| {name} | {median['first']} | {median['last']} |" for name, median in result["growth"].items()),
    ]
    return "\n".join(lines) + "\n"


def reference(folder: Path) -> Pairs:
    """Prompts and their answers, which are kept in the folder for the next run."""
    kept = folder / "reference.json"
    if not kept.exists():
        kept.write_text(json.dumps(reference_tokens(list(DOMAINS), TOKENS, 16)))
    answers = json.loads(kept.read_text())
    return [
        (text, tokens)
        for name in DOMAINS
        for text, tokens in list(zip(read_prompts(name), answers[name], strict=True))[:PROMPTS]
    ]


class PrivateServer(Server):
    """A server that makes its own private folder for statistics, as it does for a user who sets nothing, and records
    its map on a small disk, which nobody else sees, where this machine allows one.

    Attributes:
        small_disk: whether there is one.
    """

    def __init__(self, folder: Path, parallel: str = "tensor", settings: dict[str, object] = SETTINGS) -> None:
        self.temporary = Path(tempfile.mkdtemp(dir=folder, prefix="tmp-"))
        self.disk = self._mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="disk-"))
        super().__init__(2, {**settings, "expert_map_record_path": str(self.disk / "map.json")}, folder, 16)
        self.command += ["--num-gpu-blocks-override", str(KV_BLOCKS)]
        if parallel == "data":
            self.command[self.command.index("--tensor-parallel-size")] = "--data-parallel-size"
        del self.environment[STATS_VARIABLE]
        self.environment["TMPDIR"] = str(self.temporary)
        is_root = os.geteuid() == 0
        own_mounts = ["unshare", "--mount", *([] if is_root else ["--map-root-user"])]
        self._its_mounts = ["nsenter", "--mount", *([] if is_root else ["--user", "--preserve-credentials"])]
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(self.disk)]
        self.small_disk = (
            shutil.which("unshare") is not None
            and subprocess.run([*own_mounts, *mount], capture_output=True).returncode == 0
        )
        if self.small_disk:
            self.command = [*own_mounts, "sh", "-c", f'{shlex.join(mount)} && exec "$@"', "sh", *self.command]
        self._handle = -1

    def run_first(self, code: str, **environment: str) -> None:
        """Before it is started: every process of it begins with ``code``, which may import what stands beside this
        file, and has these variables in its environment."""
        start = Path(tempfile.mkdtemp(dir=self.temporary.parent, prefix="start-"))
        (start / "sitecustomize.py").write_text(code)
        paths = [str(start), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.environment |= {**environment, "PYTHONPATH": os.pathsep.join(paths)}

    def start_and_wait(self) -> None:
        self.start()
        for _ in self.wait_until_ready(600):
            pass
        if self.small_disk:  # to be seen also when the server, and its mounts with it, are gone
            assert self._process is not None
            self._handle = os.open(f"/proc/{self._process.pid}/root{self._mount_point}", os.O_PATH | os.O_DIRECTORY)
            self.disk = Path(f"/proc/{os.getpid()}/fd/{self._handle}")
        deadline = time.monotonic() + 60
        while not (found := list(self.temporary.glob(f"{OWNED_FOLDER}*"))):
            if time.monotonic() > deadline:
                raise ServerError("the server made no folder for its statistics")
            time.sleep(0.2)
        self.stats_path = found[0] / "stats.json"

    def remove(self) -> None:
        """Ends what is still there, and removes what a server leaves in its folder but the log."""
        self.stop(1.0)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        for folder in (self.temporary, self._mount_point):
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        ballast = self.disk / "ballast"
        try:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:  # to the last byte
                    file.write(b"x" * 4096)
            yield
        finally:
            ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def full_statistics_disk(self) -> Iterator[None]:
        """Lays a disk that is too small over the folder of the statistics. Only the server sees it: read from here, the
        statistics stand still."""
        assert self._process is not None
        inside = [*self._its_mounts, "--target", str(self._process.pid)]
        folder = str(self.stats_path.parent)
        subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", folder], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", "--lazy", folder], check=True)

    def open_to_others(self) -> list[str]:
        """Files of the balancer that users other than the owner may read or write."""
        folder = self.stats_path.parent
        return [str(path) for path in [folder, *folder.iterdir()] if path.stat().st_mode & 0o077]

    def end_by(self, number: int, pairs: Pairs) -> list[str]:
        """Sends the front end a signal while it serves; what stays behind of us, or is not whole, in words.

        vLLM's engine and workers outlive a front end that is killed, with or without us. Whoever supervises a service
        terminates what is left of it then, and so does this.
        """
        held = semaphores(self.processes())
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            for text, _ in pairs[:STREAMS]:
                pool.submit(_ask_in_vain, self.url, text)
            time.sleep(1.0)
            assert self._process is not None
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()
                time.sleep(2.0)
                for pid in self.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and (self._process.poll() is None or self.processes()):
                time.sleep(0.2)
        left = self.stop(1.0)
        left += [f"file {path}" for path in self.temporary.glob(f"{OWNED_FOLDER}*") if "flight" not in path.name]
        left += left_semaphores(held)
        try:
            read_expert_map(self.disk / "map.json")
        except ExpertMapError as error:
            left.append(f"a recorded map that is not whole: {error}")
        return left


def _ask_in_vain(url: str, text: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/completions", json=Requests.completion(text) | {"max_tokens": 200}, timeout=60)


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
