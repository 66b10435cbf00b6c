# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server of vLLM as a child process: start, readiness, orderly end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe.stats import EplbStats, StatsError
from vllm_ascend_eplb.observe.stats_file import read_stats

from .port import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "examples" / "tiny_moe"
MAX_TOKENS_PER_REQUEST = 512
"""Context length that the demo serves; its prompts have at most 230 tokens."""


class ServerError(RuntimeError):
    """The server failed; the message says how, and ends with the last lines of the server's log."""


def cpu_environment(ranks: int) -> dict[str, str]:
    """Environment variables for vLLM on CPUs: one core per rank; ranks share cores if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    return environment | {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Server:
    """vLLM's OpenAI server with the balancer on.

    Args:
        ranks: tensor-parallel and expert-parallel size.
        eplb_config: the balancer's settings.
        folder: an empty folder for its log and statistics.
        max_num_seqs: requests that are served at a time.
    """

    def __init__(self, ranks: int, eplb_config: dict[str, object], folder: Path, max_num_seqs: int) -> None:
        self.log_path = folder / "server.log"
        self.stats_path = folder / "stats.json"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(MODEL), "--served-model-name", "tiny-moe", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning"),
            *("--tensor-parallel-size", str(ranks), "--enable-expert-parallel", "--enforce-eager"),
            *("--max-model-len", str(MAX_TOKENS_PER_REQUEST), "--max-num-seqs", str(max_num_seqs)),
            *("--shutdown-timeout", "30"),  # without it vLLM kills its processes at once, and may hang in doing so
            "--no-enable-prefix-caching",  # prompts repeat, and every repetition must be computed
            *("--additional-config", json.dumps({"eplb_config": eplb_config})),
        ]
        # vLLM does not remove the sockets of its processes, so they lie in a folder that stop() removes.
        self._sockets = Path(tempfile.mkdtemp(prefix="vllm-"))
        self.environment = cpu_environment(ranks) | {
            STATS_VARIABLE: str(self.stats_path),
            "VLLM_RPC_BASE_PATH": str(self._sockets),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.stats_path.unlink(missing_ok=True)  # of an earlier run in the same folder
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is for the demo, which then ends the server in order
            )

    def wait_until_ready(self, timeout: float) -> Iterator[float]:
        """Yields the seconds waited, twice a second, and returns when the server answers.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        begin = time.monotonic()
        while True:
            self.check_alive()
            try:
                if httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            waited = time.monotonic() - begin
            if waited > timeout:
                raise ServerError(f"the server was not ready after {timeout:.0f} s{self._last_lines()}")
            yield waited
            time.sleep(0.5)

    def check_alive(self) -> None:
        """Raises:
        ServerError: the server has ended.
        """
        if self._process is None or self._process.poll() is not None:
            status = "was not started" if self._process is None else f"ended with status {self._process.returncode}"
            raise ServerError(f"the server {status}{self._last_lines()}")

    def stats(self) -> EplbStats | None:
        """The balancer's last report; None before the first."""
        try:
            return read_stats(self.stats_path)
        except StatsError as error:
            raise ServerError(str(error)) from error

    def metrics(self) -> dict[str, float]:
        """The balancer's lines of the server's /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=10.0, trust_env=False).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm_eplb_"))
        return {name: float(value) for name, value in lines}

    def processes(self) -> list[int]:
        """Ids of all living processes that descend from the server: those of its session, and those that left the
        session but have its environment (a process may overwrite its environment with its title)."""
        if self._process is None:
            return []
        mark = f"{STATS_VARIABLE}={self.stats_path}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    state, session = fields[0], int(fields[3])
                    if state != "Z" and (
                        session == self._process.pid or mark in (entry / "environ").read_bytes().split(b"\0")
                    ):
                        found.append(int(entry.name))
                except OSError:
                    continue  # it has just ended, or belongs to somebody else
        return found

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that processes of the server have mapped."""
        found = set()
        for process in self.processes():
            try:
                maps = Path(f"/proc/{process}/maps").read_text().splitlines()
            except OSError:
                continue
            found |= {Path(line.split(None, 5)[5]) for line in maps if "/dev/shm/" in line}
        return found

    def stop(self, timeout: float = 90.0) -> list[str]:
        """Interrupts the server, as Ctrl-C does, and waits until all its processes are gone.

        Returns:
            Processes that were still there after ``timeout`` seconds, in words; they have been killed.
        """
        shared_memory = self.shared_memory()
        left = self._end_processes(timeout)
        for path in shared_memory:
            path.unlink(missing_ok=True)  # vLLM's communicator for CPUs leaves its files behind
        shutil.rmtree(self._sockets, ignore_errors=True)
        return left

    def _end_processes(self, timeout: float) -> list[str]:
        if self._process is None:
            return []
        deadline = time.monotonic() + timeout
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        while time.monotonic() < deadline:
            if self._process.poll() is not None and not self.processes():
                return []
            time.sleep(0.2)
        left = []
        for process in self.processes():
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue  # it has just ended
            left.append(f"process {process} ({command.strip()[:100]})")
        self._process.wait()
        return left

    def _last_lines(self, count: int = 30) -> str:
        if not self.log_path.exists():
            return ""
        lines = self.log_path.read_text(errors="replace").splitlines()[-count:]
        return "\n".join([f"; its log ({self.log_path}) ends with:", *lines])
