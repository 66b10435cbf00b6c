# SPDX-License-Identifier: Apache-2.0
"""A server with its own folders, so that leftovers are found however the server ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from examples.demo.server import Server, ServerError
from examples.demo.traffic import completion
from vllm_ascend_eplb.files.expert_map import ExpertMapError
from vllm_ascend_eplb.files.map_recorder import read_recorded
from vllm_ascend_eplb.files.run_folder import OWNED_FOLDER, STATS_VARIABLE
from vllm_ascend_eplb.files.traces import TraceError

from ..processes import left_semaphores, parent, semaphores, title
from .conftest import ONE_THREAD
from .offline import EAGER
from .steady_requests import STREAMS, Pairs

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
"""One cycle after another, in which every cycle moves most experts, with audits in between. Short windows, and two
rounds instead of six, give more than one cycle per second on two busy cores."""


KV_BLOCKS = 64
"""Blocks of 128 tokens: enough for all sequences, and so few that all are in memory before the first measurement."""


def planners(server: Server) -> list[int]:
    """Ids of the planner: the spawned child of a worker, or of an engine that is its own worker."""
    return [
        pid
        for pid in server.processes()
        if "spawn_main" in title(pid) and any(word in title(parent(pid)) for word in ("Worker", "EngineCore"))
    ]


def workers(server: Server) -> list[int]:
    return [pid for pid in server.processes() if "Worker" in title(pid) or "EngineCore_DP" in title(pid)]


def run_first(server: Server, folder: Path, code: str, **environment: str) -> None:
    """Let every process of a server begin with ``code``, with these variables in its environment. The code may import
    modules of this folder; it is written into a new folder in ``folder``. Call this before the server is started."""
    start = Path(tempfile.mkdtemp(dir=folder, prefix="start-"))
    (start / "sitecustomize.py").write_text(code)
    paths = [str(start), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    server.environment |= {**environment, "PYTHONPATH": os.pathsep.join(paths)}


class PrivateServer(Server):
    """A server that makes its own private folder for statistics, as it does by default. It records its map on a small
    private disk if this machine allows one.

    Args:
        parallel: "tensor" or "data".
        forked: start by front_end.py.

    Attributes:
        small_disk: True if there is a small disk.
    """

    def __init__(
        self,
        folder: Path,
        parallel: str = "tensor",
        settings: dict[str, object] = SETTINGS,
        forked: bool = False,
    ) -> None:
        self.temporary = Path(tempfile.mkdtemp(dir=folder, prefix="tmp-"))
        self.disk = self._mount_point = Path(tempfile.mkdtemp(dir=folder, prefix="disk-"))
        super().__init__(2, {**settings, "expert_map_record_path": str(self.disk / "map.json")}, folder, 16)
        self.command += ["--num-gpu-blocks-override", str(KV_BLOCKS)]
        if parallel == "data":
            self.command[self.command.index("--tensor-parallel-size")] = "--data-parallel-size"
        del self.environment[STATS_VARIABLE]
        self.environment["TMPDIR"] = str(self.temporary)
        if forked:
            self.command[:3] = [sys.executable, str(Path(__file__).parent / "front_end.py")]
            self.environment |= ONE_THREAD
        self.environment |= EAGER  # its compiler's cache would be in that folder, and new for each server
        is_root = os.geteuid() == 0
        own_mounts = ["unshare", "--mount", *([] if is_root else ["--map-root-user"])]
        self._enter_mounts = ["nsenter", "--mount", *([] if is_root else ["--user", "--preserve-credentials"])]
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(self.disk)]
        self.small_disk = (
            shutil.which("unshare") is not None
            and subprocess.run([*own_mounts, *mount], capture_output=True).returncode == 0
        )
        if self.small_disk:
            self.command = [*own_mounts, "sh", "-c", f'{shlex.join(mount)} && exec "$@"', "sh", *self.command]
        self._handle = -1

    def run_first(self, code: str, **environment: str) -> None:
        """As the function of this name."""
        run_first(self, self.temporary.parent, code, **environment)

    def start_and_wait(self) -> None:
        self.start()
        for _ in self.wait_until_ready(600):
            pass
        if self.small_disk:  # keeps the disk visible after the server and its mounts are gone
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
        """End processes that are left, and remove all that the server left in its folder except the log."""
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
                while True:  # until the disk is full
                    file.write(b"x" * 4096)
            yield
        finally:
            ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def full_statistics_disk(self) -> Iterator[None]:
        """Mount a disk that is too small over the folder of the statistics. Only the server sees it, so the statistics
        that the test reads stay unchanged."""
        assert self._process is not None
        inside = [*self._enter_mounts, "--target", str(self._process.pid)]
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
        """Send the front end a signal while it serves. Returns, in words, all that is left of us or is not whole.

        vLLM's engine and workers outlive a killed front end, with or without us. A supervisor of services then
        terminates them, and so does this function.
        """
        held = semaphores(self.processes())
        with httpx.Client(timeout=60) as client, concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            for text, _ in pairs[:STREAMS]:
                pool.submit(_ask_without_answer, client, self.url, text)
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
            read_recorded(self.disk / "map.json")  # in mid-cycle a device may hold an expert twice
        except (ExpertMapError, TraceError) as error:
            left.append(f"a recorded map that is not whole: {error}")
        return left


def _ask_without_answer(client: httpx.Client, url: str, text: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        client.post(f"{url}/v1/completions", json=completion(text, 200))
