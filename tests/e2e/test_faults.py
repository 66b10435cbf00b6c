# SPDX-License-Identifier: Apache-2.0
"""Faults on the real server under requests: none is lost, none is answered wrongly, and nothing stays behind.

What needs no engine is in tests/distributed/test_faults.py; the long run with random faults is soak.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples.demo.server import Server
from vllm_ascend_eplb.stats import STATS_VARIABLE

from .conftest import BUSY, prompts, wait_until
from .soak import planners, workers
from .test_server import complete, leftovers, planned_cycles, start

FAULTY = {**BUSY, "audit_interval": 50, "audit_action": "repair"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for batch in prompts(6) for text in batch]


@contextlib.contextmanager
def under_load(server: Server, texts: list[str], expected: list[list[int]]) -> Iterator[list[str]]:
    """Asks all the while; yields what went wrong, as it happens."""
    wrong: list[str] = []
    over = threading.Event()

    def ask(first: int) -> None:
        number = first
        while not over.is_set():
            try:
                if complete(server, [texts[number % len(texts)]]) != [expected[number % len(texts)]]:
                    wrong.append(f"another answer to prompt {number % len(texts)}")
            except (httpx.HTTPError, OSError) as error:
                wrong.append(f"{type(error).__name__}: {error}")
                over.wait(0.2)
            number += 5

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        over.set()
        for thread in threads:
            thread.join(300)


def stop_for(pids: list[int], seconds: float) -> None:
    assert pids
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pids[0], signal.SIGCONT)


def abort_all(server: Server, texts: list[str], count: int = 8) -> None:
    """Begins requests and goes away in the middle of their answers."""

    def begin(text: str) -> None:
        request = {"model": "tiny-moe", "prompt": text, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=120) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > 6:
                    return

    threads = [threading.Thread(target=begin, args=(texts[number % len(texts)],)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_faults_under_load_cost_no_request_and_sigterm_leaves_nothing(tmp_path_factory, texts, reference):
    before = leftovers()
    server = start(Server(2, FAULTY, tmp_path_factory.mktemp("server"), 16))
    try:
        with under_load(server, texts, reference) as wrong:
            for pause in (0.0, 0.3, 0.7, 1.1):  # four kills, whatever phase it is in
                time.sleep(pause)
                for pid in wait_until(lambda: planners(server), 60, "a planner"):
                    os.kill(pid, signal.SIGKILL)
            stop_for(wait_until(lambda: planners(server), 60, "a planner"), 4.0)
            stop_for(workers(server), 2.0)
            planned = planned_cycles(server)
            wait_until(lambda: planned_cycles(server) > planned + 2, 120, "cycles after the faults")
        assert wrong == []
        abort_all(server, texts)  # nothing is left to do for a moment
        assert complete(server, texts) == reference
        stats = wait_until(server.stats, 30, "statistics")
        assert stats.phase != "off"
        assert stats.planner_starts >= 5
        assert stats.audits >= 1
        assert stats.audit_damaged == 0
        wait_until(lambda: server.metrics().get("vllm_eplb_planner_starts", 0) >= 5, 30, "metrics")
        log = server.log_path.read_text(errors="replace")
        assert "EPLB: the planner process ended (exit code -9); it is started again" in log
        assert "EPLB is off" not in log
        with under_load(server, texts, reference):  # these are cut off
            time.sleep(1.0)
            server._process.send_signal(signal.SIGTERM)
            wait_until(lambda: server._process.poll() is not None and not server.processes(), 90, "the end")
    finally:
        left = server.stop()
    assert left == []
    assert leftovers() <= before
    log = server.log_path.read_text(errors="replace")
    assert not re.search(r'File "[^"]*vllm_ascend_eplb', log)


def test_a_crash_of_the_front_end_leaves_no_process_and_no_file(tmp_path, texts, reference):
    server = Server(2, FAULTY, tmp_path, 16)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    del server._environment[STATS_VARIABLE]  # the folder for the statistics is the package's own
    server._environment["TMPDIR"] = str(temporary)
    semaphores = {path.name for path in Path("/dev/shm").glob("sem.mp-*")}
    start(server)
    try:
        assert [path.name for path in temporary.glob("vllm-eplb-*/*")] or complete(server, texts[:4])
        folders = wait_until(lambda: list(temporary.glob("vllm-eplb-*/stats.json")), 60, "statistics")
        assert all(path.stat().st_mode & 0o077 == 0 for path in [*folders, *(path.parent for path in folders)])
        assert planners(server)
        with under_load(server, texts, reference):
            time.sleep(1.0)
            server._process.kill()
            server._process.wait()
            wait_until(lambda: not server.processes(), 90, "the end of all processes")
        assert list(temporary.glob("vllm-eplb-*")) == []
        assert {path.name for path in Path("/dev/shm").glob("sem.mp-*")} <= semaphores
    finally:
        server.stop()
