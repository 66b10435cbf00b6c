# SPDX-License-Identifier: Apache-2.0
"""The real OpenAI server: answers while experts move, metrics, live page, log, orders, a killed planner, shutdown."""

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
from examples.demo.traffic import ONE_EACH, completion
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.files.map_recorder import load_path
from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.values.placement import Placement

from ..processes import left_semaphores, semaphores
from .conftest import BUSY, START_SECONDS, prompts, wait_until

TOKENS = 48


def complete(server: Server, texts: list[str], tokens: int = TOKENS) -> list[list[int]]:
    """Greedy answers to all texts, asked at the same time by one client: a new one takes longer than many steps."""

    def ask(text: str) -> list[int]:
        response = client.post(f"{server.url}/v1/completions", json=completion(text, tokens))
        response.raise_for_status()
        return response.json()["choices"][0]["token_ids"]

    with (
        httpx.Client(timeout=300, limits=ONE_EACH, trust_env=False) as client,
        concurrent.futures.ThreadPoolExecutor(len(texts)) as pool,
    ):
        return list(pool.map(ask, texts))


@pytest.fixture(scope="module")
def map_file(tmp_path_factory) -> Path:
    """The file to which the server records its placement."""
    return tmp_path_factory.mktemp("map") / "map.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory, map_file):
    settings = {**BUSY, "policy": "incremental", "target_par": 1.0, "expert_map_record_path": str(map_file)}
    server = Server(2, settings, tmp_path_factory.mktemp("server"), 16)
    server.environment["VLLM_PLUGINS"] = "eplb,eplb_page"  # the page is off unless it is named
    server.start()
    try:
        for _ in server.wait_until_ready(START_SECONDS):
            pass
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for batch in prompts(6) for text in batch]


def done_cycles(server: Server) -> int:
    stats = server.stats()
    return stats.cycles_done if stats else 0


def planned_cycles(server: Server) -> int:
    """The number of cycles in which the planner answered."""
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


def as_metrics(stats: EplbStats) -> dict[str, float]:
    """The samples of /metrics that follow from the statistics."""
    expected: dict[str, float] = {
        f'vllm_eplb_cycles{{result="{result}"}}': getattr(stats, f"cycles_{result}")
        for result in ("done", "skipped", "failed")
    }
    expected |= {
        "vllm_eplb_steps": stats.step,
        "vllm_eplb_experts_moved": stats.experts_moved,
        "vllm_eplb_experts_moved_last_cycle": stats.experts_moved_last,
        "vllm_eplb_planner_starts": stats.planner_starts,
        "vllm_eplb_planner_seconds": stats.planner_seconds,
        "vllm_eplb_moves_planned": stats.moves_planned,
        "vllm_eplb_control_wait_seconds": stats.control_wait_seconds,
        "vllm_eplb_transfer_wait_seconds": stats.transfer_wait_seconds,
        "vllm_eplb_commit_seconds": stats.commit_seconds,
        "vllm_eplb_longest_step_seconds": stats.longest_step_seconds,
        f'vllm_eplb_phase{{phase="{stats.phase}"}}': 1,
        f'vllm_eplb_info{{mode="{stats.mode}",policy="{stats.policy}",version="{stats.version}"}}': 1,
    }
    for name, par in (
        ("par_before", stats.par_before),
        ("par_planned", stats.par_planned),
        ("par_window", stats.window.par),
        ("par_window_start_placement", stats.window.par_start),
    ):
        expected[f'vllm_eplb_{name}{{layers="mean"}}'] = par.mean
        expected[f'vllm_eplb_{name}{{layers="worst"}}'] = par.worst
    return expected


def differences(server: Server) -> dict[str, tuple[float, float | None]]:
    """Metrics that differ from the statistics. Both stay constant without requests."""
    shown = server.metrics()
    return {
        name: (value, shown.get(name))
        for name, value in as_metrics(server.stats()).items()
        if shown.get(name) != pytest.approx(value)
    }


def test_metrics_are_the_statistics(server, texts):
    earlier = as_metrics(server.stats())
    complete(server, texts)
    wait_until(lambda: not differences(server), 60, "metrics that follow the statistics")
    stats, metrics = server.stats(), server.metrics()
    assert differences(server) == {}
    assert stats.cycles_done > 0
    assert stats.experts_moved > 0
    assert stats.control_wait_seconds > 0
    assert metrics["vllm_eplb_steps"] > earlier["vllm_eplb_steps"]  # so that old values cannot pass
    assert sum(value for name, value in metrics.items() if name.startswith("vllm_eplb_phase")) == 1
    assert len(metrics) < 60  # low cardinality


def test_live_page_shows_all_ranks(server, tmp_path):
    answer = httpx.get(f"{server.url}/eplb/stats", timeout=30)
    assert answer.status_code == 200
    shown, kept = EplbStats.from_json(answer.text), server.stats()
    assert shown.cycles_done <= kept.cycles_done
    assert [rank.rank for rank in shown.ranks] == [0, 1]
    assert sum(rank.load for rank in shown.ranks) == pytest.approx(2, abs=1e-3)
    assert all(rank.longest_step_seconds > 0 for rank in shown.ranks)
    assert httpx.post(f"{server.url}/eplb/stats", timeout=30).status_code == 405
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium here (Debian package chromium); the routes were tested")
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
    """Give an order with the command line tool, while requests keep the server stepping."""
    command = [sys.executable, "-m", "vllm_ascend_eplb.cli", "control", *arguments, "--json", "--timeout", "120"]
    process = subprocess.Popen([*command, "--stats-file", str(server.stats_path)], stdout=subprocess.PIPE, text=True)
    text = prompts(1)[0][0]
    while True:
        try:
            process.wait(0.5)  # a busy server would leave the tool no core
            break
        except subprocess.TimeoutExpired:
            complete(server, [text], 16)
    said = json.loads(process.stdout.read())
    assert process.returncode == 0, said
    return said


def test_operator_pauses_restores_and_resumes_under_load(server, texts, reference):
    assert order(server, "pause")["paused"] is True
    before = server.stats()
    assert complete(server, texts) == reference
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200  # a paused server is healthy for probes
    paused = server.stats()
    assert paused.step > before.step
    assert planned_cycles(server) == paused.cycles_done + paused.cycles_skipped
    assert paused.cycles_done + paused.cycles_skipped == before.cycles_done + before.cycles_skipped
    start = Placement.initial(6, 64, 2, 4).digest
    assert paused.placement_digest != start
    order(server, "restore")
    few, expected = texts[::6], [tokens[:16] for tokens in reference[::6]]
    wait_until(
        lambda: complete(server, few, 16) == expected and server.stats().placement_digest == start, 300, "restore"
    )
    order(server, "reapply")
    there = paused.placement_digest
    wait_until(
        lambda: complete(server, few, 16) == expected and server.stats().placement_digest == there, 300, "reapply"
    )
    assert server.stats().paused
    assert order(server, "intervals", "--collect-steps", "8")["collect_steps"] == 8
    assert order(server, "resume")["paused"] is False
    planned = planned_cycles(server)
    wait_until(lambda: complete(server, few, 16) == expected and planned_cycles(server) > planned, 300, "a new cycle")
    assert server.stats().cycles_failed == 0


def test_killed_planner_costs_no_request(server, texts, reference):
    for _ in range(2):
        planners = [pid for pid in server.processes() if "eplb-planner" in thread_names(pid)]
        assert len(planners) <= 1
        for pid in planners:
            os.kill(pid, signal.SIGKILL)
        assert complete(server, texts) == reference
    planned = planned_cycles(server)
    wait_until(lambda: complete(server, texts[:8]) and planned_cycles(server) > planned, 300, "a plan after the kill")
    assert server.stats().phase != "off"


def thread_names(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return command if "spawn_main" not in command else command + parent_mark(pid)
    except OSError:
        return ""


def parent_mark(pid: int) -> str:
    """Name the planner, which is the spawned child of a worker; empty for other processes."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    title = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
    return " eplb-planner" if "Worker" in title else ""


def test_server_ends_in_order_and_its_map_can_be_loaded(server, runs, reference, map_file, tmp_path):
    """An offline engine then starts from the map; its placement is static, and nothing is counted."""
    shared, counted = server.shared_memory(), semaphores(server.processes())
    assert server.stop() == []
    assert server.processes() == []
    recorded = read_expert_map(map_file, num_layers=6, num_experts=64, num_ranks=2, allow_duplicates=True)
    assert recorded.digest == server.stats().placement_digest
    assert recorded != Placement.initial(6, 64, 2, 4)
    with np.load(load_path(map_file)) as archive:
        assert archive["load"][-1].sum() == server.stats().window.tokens
        assert int(archive["digest"]) == recorded.digest
    # vLLM's own shutdown may log that its engine is gone; no traceback may contain our code
    assert not re.search(r'File "[^"]*vllm_ascend_eplb', server.log_path.read_text(errors="replace"))
    # only files and semaphores of this server count; the demo's Server removes those that vLLM leaves
    assert [path for path in shared if path.exists()] + left_semaphores(counted) == []
    run = runs(
        "restarted",
        ranks=2,
        eplb={"expert_map_path": str(map_file)},
        variables={STATS_VARIABLE: str(tmp_path / "stats.json")},
        prompts=prompts(6)[:1],
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-4000:]
    assert run.result["tokens"] == reference[:6]
    assert run.result["ranks"] == [{}, {}]  # no balancer
    assert not (tmp_path / "stats.json").exists()
    assert read_expert_map(map_file, allow_duplicates=True) == recorded
    assert f"EPLB is on: static placement, 4 redundant experts, starting from {map_file}" in run.log
    assert not re.search(r'File "[^"]*vllm_ascend_eplb', run.log)
