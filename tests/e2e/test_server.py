# SPDX-License-Identifier: Apache-2.0
"""The real OpenAI server: the same answers while experts move, metrics and log, the planner killed, an orderly end."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from examples.demo.server import Server
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.files.map_recorder import load_path
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.values.placement import Placement

from ..processes import left_semaphores, semaphores
from .conftest import BUSY, START_SECONDS, prompts, wait_until

TOKENS = 48


def complete(server: Server, texts: list[str], tokens: int = TOKENS) -> list[list[int]]:
    """Greedy answers to all texts, asked at the same time."""

    def ask(text: str) -> list[int]:
        request = {"model": "tiny-moe", "prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        response = httpx.post(f"{server.url}/v1/completions", json={**request, "return_token_ids": True}, timeout=300)
        response.raise_for_status()
        return response.json()["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(ask, texts))


def start(server: Server) -> Server:
    server.start()
    for _ in server.wait_until_ready(START_SECONDS):
        pass
    return server


@pytest.fixture(scope="module")
def map_file(tmp_path_factory) -> Path:
    """Where the server records its placement."""
    return tmp_path_factory.mktemp("map") / "map.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory, map_file):
    settings = {**BUSY, "policy": "incremental", "target_par": 1.0, "expert_map_record_path": str(map_file)}
    server = Server(2, settings, tmp_path_factory.mktemp("server"), 16)
    server._environment["VLLM_PLUGINS"] = "eplb,eplb_page"  # the page is off unless it is named
    start(server)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for batch in prompts(6) for text in batch]


def done_cycles(server: Server) -> int:
    stats = server.stats()
    return stats.cycles_done if stats else 0


def planned_cycles(server: Server) -> int:
    """Cycles in which the planner answered."""
    stats = server.stats()
    return stats.cycles_done + stats.cycles_skipped if stats else 0


def test_answers_are_those_of_one_process_while_experts_move(server, texts, reference):
    before = done_cycles(server)
    for _ in range(20):
        assert complete(server, texts) == reference
        if done_cycles(server) >= before + 10:
            break
    assert done_cycles(server) >= before + 10
    assert server.stats().cycles_failed == 0


def test_metrics_show_what_happened(server, texts):
    complete(server, texts)
    stats = server.stats()
    # the page follows the statistics within a second or two
    wait_until(lambda: server.metrics().get("vllm_eplb_cycles", 0) is not None and server.metrics(), 10, "metrics")
    metrics = server.metrics()
    names = {re.sub(r"\{.*", "", name) for name in metrics}
    for word in ("par", "moved", "cycles", "planner", "control_wait", "transfer", "commit", "phase"):
        assert any(word in name for name in names), f"no metric about {word} in {sorted(names)}"
    assert all(value == value for value in metrics.values())
    assert stats.cycles_done > 0
    assert len(metrics) < 60  # low cardinality


def test_the_live_page_shows_all_ranks(server, tmp_path):
    answer = httpx.get(f"{server.url}/eplb/stats", timeout=30)
    assert answer.status_code == 200
    shown, kept = EplbStats.from_json(answer.text), server.stats()
    assert shown.cycles_done <= kept.cycles_done
    assert [each.rank for each in shown.ranks] == [0, 1]
    assert sum(each.load for each in shown.ranks) == pytest.approx(2, abs=1e-3)
    assert all(each.longest_step_seconds > 0 for each in shown.ranks)
    assert httpx.post(f"{server.url}/eplb/stats", timeout=30).status_code == 405
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium here (Debian package chromium); the answers are as they should be")
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", f"--screenshot={tmp_path / 'shot.png'}"]
    command += ["--window-size=1100,1800", "--dump-dom", f"{server.url}/eplb"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert "PAR over time" in done.stdout
    assert "waited for agreement" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_every_cycle_has_one_line_in_the_log(server):
    log = server.log_path.read_text(errors="replace")
    lines = [line for line in log.splitlines() if re.search(r"EPLB cycle \d+: PAR \d", line)]
    numbers = [int(re.search(r"EPLB cycle (\d+)", line).group(1)) for line in lines]
    assert len(numbers) >= 10
    assert len(set(numbers)) == len(numbers)
    assert "experts moved in" in lines[0]
    assert log.count("EPLB is on: ") == 1


def order(server: Server, *arguments: str) -> dict[str, object]:
    """Gives an order with the command line tool, while requests keep the server's steps going."""
    command = [sys.executable, "-m", "vllm_ascend_eplb.cli", "control", *arguments, "--json", "--timeout", "120"]
    process = subprocess.Popen([*command, "--stats-file", str(server._stats_path)], stdout=subprocess.PIPE, text=True)
    texts = [text for batch in prompts(1) for text in batch]
    while process.poll() is None:
        complete(server, texts, 16)
    said = json.loads(process.stdout.read())
    assert process.returncode == 0, said
    return said


def test_an_operator_pauses_restores_and_resumes_while_it_serves(server, texts, reference):
    assert order(server, "pause")["paused"] is True
    before = server.stats()
    assert complete(server, texts) == reference
    paused = server.stats()
    assert paused.step > before.step
    assert planned_cycles(server) == paused.cycles_done + paused.cycles_skipped
    assert paused.cycles_done + paused.cycles_skipped == before.cycles_done + before.cycles_skipped
    start = Placement.initial(6, 64, 2, 4).digest
    assert paused.placement_digest != start
    order(server, "restore")
    wait_until(lambda: complete(server, texts) == reference and server.stats().placement_digest == start, 60, "restore")
    assert server.stats().paused
    assert order(server, "intervals", "--collect-steps", "8")["collect_steps"] == 8
    assert order(server, "resume")["paused"] is False
    planned = planned_cycles(server)
    wait_until(lambda: complete(server, texts) == reference and planned_cycles(server) > planned, 60, "a new cycle")
    assert server.stats().cycles_failed == 0


def test_a_killed_planner_costs_no_request(server, texts, reference):
    for _ in range(2):
        planners = [pid for pid in server.processes() if "eplb-planner" in thread_names(pid)]
        assert len(planners) <= 1
        for pid in planners:
            os.kill(pid, signal.SIGKILL)
        assert complete(server, texts) == reference
    planned = planned_cycles(server)
    wait_until(lambda: complete(server, texts[:8]) and planned_cycles(server) > planned, 120, "a plan after the kill")
    assert server.stats().phase != "off"


def thread_names(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return command if "spawn_main" not in command else command + parent_mark(pid)
    except OSError:
        return ""


def parent_mark(pid: int) -> str:
    """The planner is the spawned child of a worker."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    title = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
    return " eplb-planner" if "Worker" in title else ""


def test_the_server_ends_in_order_and_starts_again_from_its_recorded_map(server, texts, reference, tmp_path, map_file):
    assert server.stop() == []
    assert server.processes() == []
    recorded = read_expert_map(map_file, num_layers=6, num_experts=64, num_ranks=2)
    assert recorded.digest == server.stats().placement_digest
    assert recorded != Placement.initial(6, 64, 2, 4)
    with np.load(load_path(map_file)) as archive:
        assert archive["load"][-1].sum() == server.stats().window.tokens
        assert int(archive["digest"]) == recorded.digest
    again = start(Server(2, {"expert_map_path": str(map_file)}, tmp_path, 16))
    try:
        assert complete(again, texts) == reference
        assert again.stats() is None  # nothing is counted, and nothing moves
        shared, counted = again.shared_memory(), semaphores(again.processes())
        assert httpx.get(f"{again.url}/eplb", timeout=30).status_code == 404  # not named
    finally:
        assert again.stop() == []
    assert read_expert_map(map_file) == recorded
    log = again.log_path.read_text(errors="replace")
    assert f"EPLB is on: static placement, 4 redundant experts, starting from {map_file}" in log
    # vLLM's own shutdown may log that its engine is gone; nothing of ours may be in a traceback
    assert not re.search(r'File "[^"]*vllm_ascend_eplb', log)
    # other programs' come and go; vLLM's own sockets and shared memory the demo's Server removes
    assert [path for path in shared if path.exists()] + left_semaphores(counted) == []


def test_a_bad_setting_ends_the_server_before_any_worker_starts(tmp_path):
    server = Server(2, {"dynamic_eplb": True, "num_redundant_experts": 3}, tmp_path, 16)
    server.start()
    process = server._process
    assert process.wait(START_SECONDS) != 0
    log = server.log_path.read_text(errors="replace")
    assert "eplb_config.num_redundant_experts = 3: 64 experts + 3 cannot be shared evenly by 2 ranks" in log
    assert "EngineCore" not in log
    assert server.processes() == []
