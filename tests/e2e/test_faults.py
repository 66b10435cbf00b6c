# SPDX-License-Identifier: Apache-2.0
"""Faults in the real server under requests: no request is lost, no answer is wrong, and nothing is left.

Faults that need no engine are in tests/distributed/test_faults.py. ``make soak`` injects random faults for longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_ascend_eplb.balancer.orders import Order, orders_path, write_order
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.observe.stats import EplbStats

from .conftest import prompts
from .damage import DAMAGE, NO_ISSUE, NO_MEMORY, REQUESTS, kill_in
from .private_server import SETTINGS, PrivateServer, planners, workers
from .soak import soak, under_load
from .soak_judge import judge
from .steady_requests import Answers, Pairs, Requests


@pytest.fixture(scope="module")
def pairs(reference) -> Pairs:
    texts = [text for batch in prompts(6) for text in batch]
    return list(zip(texts, reference, strict=True))


@pytest.fixture(scope="module")
def english(pairs) -> Pairs:
    return pairs[:6]


@pytest.fixture(scope="module")
def python(pairs) -> Pairs:
    return pairs[12:18]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[PrivateServer]:
    """A server that takes requests for faults (damage.py)."""
    settings = {**SETTINGS, "policy": "incremental", "target_par": 1.0, "expert_heat_collection_interval": 30}
    own, requests = folder / "server", folder / "requests"
    own.mkdir()
    requests.mkdir()
    server = PrivateServer(own, settings=settings, forked=True)
    first = "import damage, sockets\ndamage.damage_on_request()\nsockets.wait_at_sockets()\n"
    server.run_first(first, **{REQUESTS: str(requests)})
    try:
        server.start_and_wait()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def server(tmp_path_factory, pairs):
    with served(tmp_path_factory.mktemp("served")) as server:
        # Every test needs statistics, and any test may be the first.
        run(server, pairs, lambda _: until(lambda: server.stats() is not None, "the first statistics"))
        yield server


def stats(server: PrivateServer) -> EplbStats:
    found = server.stats()
    assert found is not None
    return found


def planned(server: PrivateServer) -> int:
    """The number of cycles in which the planner answered."""
    return stats(server).cycles_done + stats(server).cycles_skipped


def failures(server: PrivateServer) -> int:
    """The number of cycles that failed because of the planner."""
    return sum(count for kind, count in stats(server).failures.items() if kind.startswith("planner"))


async def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.2)


async def until_balanced(server: PrivateServer) -> None:
    """Wait until the planner has answered again and a later window is better balanced than at the start placement."""
    before = planned(server)
    await until(lambda: planned(server) > before, "an answer of the planner")
    planned_at = stats(server).step

    def balanced() -> bool:
        window = stats(server).window
        return window.step > planned_at and window.par.mean < 1 + (window.par_start.mean - 1) / 2

    await until(balanced, "a balanced window")


async def obey(server: PrivateServer, command: str) -> None:
    order = Order(command=command)
    write_order(orders_path(server.stats_path), order)
    await until(lambda: stats(server).order == order.id, f"the effect of {command}")


def ask(server: PrivateServer, fault: str) -> Path:
    """Request a fault of damage.py; the returned file is removed when the fault is made."""
    request = Path(server.environment[REQUESTS], fault)
    request.touch()
    return request


def run(server: PrivateServer, pairs: Pairs, go: Callable[[Requests], Any]) -> Answers:
    answers = asyncio.run(under_load(server, 1, pairs, go))
    assert answers.failed == []
    assert answers.wrong == 0, answers.first_wrong
    assert answers.requests > 0
    return answers


def lines(server: PrivateServer, part: str) -> int:
    return sum(part in line for line in server.log_path.read_text(errors="replace").splitlines())


def test_other_users_cannot_read_files_of_the_server(server):
    assert server.open_to_others() == []


def test_live_page_is_served_only_if_it_is_named(server):
    assert httpx.get(f"{server.url}/eplb", timeout=30).status_code == 404
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def test_stopped_planner_is_replaced_and_balancing_resumes(server, english, python):
    async def stop_it(_: Requests) -> None:
        await until_balanced(server)
        (stopped,) = planners(server)
        before = failures(server)
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: failures(server) > before, "the cycle is given up")
        await until(lambda: planners(server) not in ([], [stopped]), "another planner")

    async def recover(_: Requests) -> None:
        await until_balanced(server)
        await until(lambda: server.metrics().get("vllm_eplb_planner_starts", 0) >= 2, "the metric")

    run(server, english, stop_it)
    assert lines(server, "dropped on all ranks") == stats(server).cycles_failed
    run(server, python, recover)


def test_planner_killed_in_any_phase_is_replaced(server, pairs):
    killed = "the planner process ended (exit code -9); it is started again"

    async def kill(_: Requests) -> None:
        for phase in ("SNAPSHOT", "REDUCE", "PLAN", "BROADCAST", "MOVE", "COLLECT"):
            before, answered = lines(server, killed), planned(server)
            request = ask(server, kill_in(phase))
            await until(lambda request=request: not request.exists(), f"a planner to kill in {phase}")
            await until(lambda before=before: lines(server, killed) > before, "the line")
            await until(lambda answered=answered: planned(server) > answered, "an answer of the planner")

    starts = stats(server).planner_starts
    run(server, pairs, kill)
    run(server, pairs, lambda _: until_balanced(server))
    assert stats(server).planner_starts >= starts + 6
    assert stats(server).phase != "off"


def test_rank_without_memory_for_a_round_costs_one_cycle(server, pairs):
    async def fail(_: Requests) -> None:
        failed = stats(server).failures.get("prepare", 0)
        request = ask(server, NO_MEMORY)
        await until(lambda: not request.exists(), "a round to prepare")
        await until(lambda: stats(server).failures.get("prepare", 0) == failed + 1, "the failed cycle")
        done = stats(server).cycles_done
        await until(lambda: stats(server).cycles_done > done, "the next cycle")

    run(server, pairs, fail)
    assert lines(server, "planted before the gate") >= 1
    run(server, pairs, lambda _: until_balanced(server))


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.soak)])
def test_stopped_rank_costs_no_cycle(server, english, seconds):
    async def pause(_: Requests) -> None:
        failed = stats(server).cycles_failed
        worker = workers(server)[1]
        os.kill(worker, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(worker, signal.SIGCONT)
        await until_balanced(server)
        assert stats(server).cycles_failed == failed

    run(server, english, pause)


def test_all_requests_may_be_aborted_at_once(server, python):
    async def abort(requests: Requests) -> None:
        requests.pause.clear()
        for _ in range(3):
            await asyncio.gather(*(requests.abort() for _ in range(8)))
            await asyncio.sleep(1)  # no requests
        requests.pause.set()
        await until_balanced(server)

    assert run(server, python, abort).aborted == 24


def test_full_disk_is_logged_and_stops_nothing(server, english, python):
    if not server.small_disk:
        pytest.skip("a small disk cannot be mounted on this machine")
    path = server.disk / "map.json"

    async def fill(_: Requests) -> None:
        with server.full_disk():
            await until(lambda: lines(server, "EPLB: the expert map is not recorded to"), "the line")
            before = path.stat().st_mtime_ns
            await until_balanced(server)
            assert path.stat().st_mtime_ns == before
        await until(lambda: path.stat().st_mtime_ns > before, "a map after the disk was full")

    run(server, english, lambda _: until_balanced(server))
    run(server, python, fill)
    read_expert_map(path, num_layers=6, num_experts=64, num_ranks=2, allow_duplicates=True)


def test_full_disk_for_statistics_is_logged_stops_nothing(server, pairs):
    if not server.small_disk:
        pytest.skip("a small disk cannot be mounted on this machine")

    async def fill(_: Requests) -> None:
        with server.full_statistics_disk():
            await until(lambda: lines(server, "EPLB statistics cannot be written to"), "the line")
            step, cycles = stats(server).step, lines(server, "EPLB cycle")
            await until(lambda: lines(server, "EPLB cycle") >= cycles + 2, "two cycles")
            assert stats(server).step == step
        await until(lambda: stats(server).step > step, "statistics after the disk was full")

    run(server, pairs, fill)
    assert lines(server, "EPLB statistics cannot be written to") == 1
    run(server, pairs, lambda _: until_balanced(server))
    assert server.open_to_others() == []


def test_damaged_weight_is_found_and_repaired(server, english):
    async def damage(_: Requests) -> None:
        # Otherwise a plan could overwrite the only good copy before the audit finds the damage.
        await obey(server, "pause")
        ask(server, DAMAGE)
        await until(lambda: stats(server).audit_mended, "the repair", 60)
        await obey(server, "resume")

    assert stats(server).audits > 0
    assert stats(server).audit_mended == 0
    answers = asyncio.run(under_load(server, 1, english, damage))
    assert answers.failed == []  # answers may be wrong while the weight is damaged
    assert lines(server, "slots do not hold the weights of their expert") == 1
    assert lines(server, "EPLB audit: 1 of 1 damaged slots were repaired") == 1
    run(server, english, lambda _: until_balanced(server))


def test_random_faults_and_a_crash_leave_nothing(server, pairs):
    """The last test on this server, because it ends the server."""
    result = asyncio.run(soak(server, 0.4, 7, pairs))
    assert sum(result["faults"].values()) >= 3
    log = server.log_path.read_text(errors="replace")
    left = server.end_by(signal.SIGKILL, pairs)
    assert judge(result, left, log) == []


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_ended_under_requests_leaves_nothing(tmp_path, pairs, number):
    """Tensor-parallel ranks; test_data_parallel.py does the same with two data-parallel engines."""
    server = PrivateServer(tmp_path)
    try:
        server.start_and_wait()
        run(
            server, pairs, lambda _: until(lambda: (found := server.stats()) and found.cycles_done >= 3, "three cycles")
        )
        assert server.end_by(number, pairs) == []
    finally:
        server.remove()


@pytest.mark.soak
def test_failed_transfer_ends_balancing_but_not_serving(tmp_path, pairs):
    async def fail(_: Requests) -> None:
        await until(lambda: (found := server.stats()) and found.cycles_done >= 3, "three cycles")
        ask(server, NO_ISSUE)
        await until(lambda: stats(server).phase == "off", "the end of balancing")

    with served(tmp_path) as server:
        run(server, pairs, fail)
        assert stats(server).failures["transfer"] == 1
        assert lines(server, "is off from step") == 1
        assert lines(server, "a transfer failed or did not end") >= 1
        run(server, pairs, lambda _: asyncio.sleep(5))
        assert server.end_by(signal.SIGTERM, pairs) == []
