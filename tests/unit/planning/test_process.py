# SPDX-License-Identifier: Apache-2.0
"""The planner's process answers, raises, dies, hangs or is stopped, and the caller never waits for it."""

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_ascend_eplb.files.run_folder import has_ended
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.planning.request import PlanAnswer, PlanRequest
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import Plan

PLACEMENT = Placement.initial(num_layers=2, num_experts=8, num_ranks=2, num_redundant=2)


SIGNAL = "EPLB_TEST_SIGNAL"
"""Variable with the path of the file that a policy waits for."""


def reverse(request: PlanRequest) -> Plan:
    """A policy for tests; the first number of the load selects a fault."""
    order = int(request.load[0, 0, 0])
    if order == 1:
        raise ArithmeticError("cannot plan this")
    if order == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if order == 3:
        time.sleep(3600)
    if order == 5:
        path = Path(os.environ[SIGNAL])
        while not path.exists():
            time.sleep(0.001)
    if order == 4:
        assert "torch" not in sys.modules
        assert "vllm" not in sys.modules
    return Plan.between(request.placement, request.physical_to_logical[:, ::-1], request.load.sum(axis=0), "reverse")


def request(number: int, order: int = 0) -> PlanRequest:
    load = np.ones((1, 2, 8), dtype=np.int64)
    load[0, 0, 0] = order
    return PlanRequest(number, load, PLACEMENT.physical_to_logical, 8, (0, 0))


def wait_for_answer(process: EplbProcess, number: int, seconds: float = 120) -> PlanAnswer:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = process.answer(number)
        if answer is not None:
            return answer
        time.sleep(0.002)
    raise AssertionError(f"no answer to request {number} within {seconds} s")


@pytest.fixture
def process():
    process = EplbProcess(reverse)
    yield process
    process.close()
    assert process.pid is None


def test_answers_carry_the_plan_and_the_number(process):
    process.submit(request(7))
    answer = wait_for_answer(process, 7)
    assert answer.plan is not None
    answer.plan.check(PLACEMENT)
    assert answer.plan.num_moves > 0
    assert answer.plan.seconds > 0
    assert process.answer(6) is None


def test_child_imports_neither_torch_nor_vllm(process):
    import torch  # noqa: F401  (a forked child, or one that imports the parent's main, would have it, too)

    process.submit(request(1, order=4))
    assert wait_for_answer(process, 1).error == ""


def test_exception_of_the_policy_is_an_answer(process):
    process.submit(request(1, order=1))
    answer = wait_for_answer(process, 1)
    assert answer.plan is None
    assert answer.error == "ArithmeticError: cannot plan this"
    process.submit(request(2))
    assert wait_for_answer(process, 2).plan is not None
    assert process.starts == 1


def test_killed_child_is_replaced(process, monkeypatch):
    monkeypatch.setattr("vllm_ascend_eplb.planning.process.RESTART_SECONDS", (0.0,))
    for number in (1, 3):
        process.submit(request(number, order=2))
        answer = wait_for_answer(process, number)
        assert answer.died
        assert "exit code -9" in answer.error
        process.submit(request(number + 1))
        assert wait_for_answer(process, number + 1).plan is not None


def test_child_killed_while_idle_is_replaced(process):
    process.submit(request(1))
    wait_for_answer(process, 1)
    killed = process.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: process.pid not in (None, killed))
    process.submit(request(2))
    assert wait_for_answer(process, 2).plan is not None


class Clock:
    """Replaces the module ``time`` in the child's supervision; it can be put forward."""

    ahead = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("vllm_ascend_eplb.planning.process.time", clock)
    return clock


def put_forward_until_ended(clock: Clock, pid: int) -> None:
    """Put the parent's clock forward by hours until the child has ended, so that every request times out."""

    def ended() -> bool:
        clock.ahead += 3600.0
        return has_ended(pid)

    wait_until(ended)


def test_newer_request_overtakes_one_that_hangs(process, clock):
    process.submit(request(1, order=3))
    wait_until(lambda: process.request is None and process.pid is not None)  # the child has it
    hanging = process.pid
    process.submit(request(2))
    put_forward_until_ended(clock, hanging)
    assert wait_for_answer(process, 2).plan is not None
    assert process.answer(1) is None


def test_newer_request_overtakes_a_slow_one_in_one_child(monkeypatch, tmp_path):
    monkeypatch.setenv(SIGNAL, str(tmp_path / "go"))
    monkeypatch.setattr("vllm_ascend_eplb.planning.process.PATIENCE_SECONDS", 3600.0)
    process = EplbProcess(reverse)
    try:
        process.submit(request(1, order=5))
        wait_until(lambda: process.request is None)  # the child has it
        process.submit(request(2))
        (tmp_path / "go").touch()
        assert wait_for_answer(process, 2).plan is not None
        assert process.answer(1) is None
        assert process.starts == 1
    finally:
        process.close()


def test_request_made_as_an_answer_arrives_is_answered(process, monkeypatch):
    wait_until(lambda: process.child is not None)
    child, ask = process.child, process.child.ask

    def ask_and_overtake(first: PlanRequest) -> None:
        monkeypatch.setattr(child, "ask", ask)
        ask(first)
        wait_until(lambda: child.answers)
        process.submit(request(2))  # before this thread has read the answer

    monkeypatch.setattr(child, "ask", ask_and_overtake)
    process.submit(request(1))
    assert wait_for_answer(process, 2).plan is not None
    assert process.starts == 1


def test_hanging_child_is_replaced_after_the_timeout(process, clock):
    process.submit(request(1))
    wait_for_answer(process, 1)
    hanging = process.pid
    process.submit(request(2, order=3))
    wait_until(lambda: process.request is None)
    put_forward_until_ended(clock, hanging)
    assert "within 120 s" in wait_for_answer(process, 2).error


def test_stopped_child_neither_blocks_nor_survives(process, clock):
    process.submit(request(1))
    wait_for_answer(process, 1)
    stopped = process.pid
    os.kill(stopped, signal.SIGSTOP)
    big = PlanRequest(2, np.ones((64, 2, 8000), dtype=np.int64), PLACEMENT.physical_to_logical, 8, (0, 0))
    caller = threading.Thread(target=process.submit, args=(big,), daemon=True)
    caller.start()
    caller.join(120)  # the request is larger than a pipe that is not read, so a direct write would block for ever
    assert not caller.is_alive()
    wait_until(lambda: process.request is None)  # it is being sent; otherwise the next request would replace it
    process.submit(request(3))
    put_forward_until_ended(clock, stopped)
    assert wait_for_answer(process, 3).plan is not None


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.002)


PARENT = f"""
import multiprocessing, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
multiprocessing.current_process()._config["daemon"] = True  # as vLLM's workers are
from vllm_ascend_eplb.observe.stats_file import provide_stats_path
from test_process import EplbProcess, request, reverse, wait_for_answer
path = provide_stats_path()
path.write_text("{{}}")
process = EplbProcess(reverse)
process.submit(request(1))
wait_for_answer(process, 1)
print(process.pid, path, flush=True)
time.sleep(600)
"""


def test_child_ends_with_a_killed_parent():
    """The front end is killed. Its child, the planner, ends soon after, also if it is stopped; the last process removes
    the run's folder."""
    environment = {key: value for key, value in os.environ.items() if key != "EPLB_STATS_FILE"}
    command = [sys.executable, "-c", PARENT]
    parents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [parent.stdout.readline().split() for parent in parents]
    children, paths = [int(pid) for pid, _ in said], [Path(path) for _, path in said]
    assert not any(map(has_ended, children))
    assert [path.name for path in paths] == ["stats.json"] * 2
    os.kill(children[1], signal.SIGSTOP)
    for parent in parents:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    for child, path in zip(children, paths, strict=True):
        wait_until(lambda child=child: has_ended(child))
        wait_until(lambda path=path: not path.parent.exists())


def descriptors() -> dict[str, str]:
    folder = Path("/proc/self/fd")
    found = {}
    for entry in folder.iterdir():
        try:
            found[entry.name] = os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


def test_replaced_children_leave_nothing_behind(process, monkeypatch):
    monkeypatch.setattr("vllm_ascend_eplb.planning.process.RESTART_SECONDS", (0.0,))
    held: list[tuple[int, int, int]] = []
    for number in range(1, 9):
        process.submit(request(number))
        assert wait_for_answer(process, number).plan is not None
        if number in (3, 8):
            wait_until(lambda: len([t for t in threading.enumerate() if t.name == "eplb-planner-answers"]) == 1)
            gc.collect()
            maps = Path("/proc/self/maps").read_text().splitlines()
            semaphores = sum("/dev/shm/sem." in line for line in maps)  # mapped under the names they were made with
            assert semaphores > 0
            held.append((len(descriptors()), threading.active_count(), semaphores))
        killed = process.pid
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda killed=killed: process.pid not in (None, killed))
    assert held[1] == held[0]


def test_other_users_cannot_read_the_planners_queues(process):
    process.submit(request(1))
    wait_for_answer(process, 1)
    pid = process.pid
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    named = [link for link in links if link.startswith("/") and not link.endswith(" (deleted)")]
    assert sum(link.startswith("pipe:") for link in links) >= 2  # the queues: pipes without a name
    for link in named:
        assert not stat.S_ISFIFO(os.stat(link).st_mode)
        assert not stat.S_ISSOCK(os.stat(link).st_mode)
    for path in Path("/dev/shm").glob("sem.mp-*"):
        assert path.stat().st_mode & 0o077 == 0
