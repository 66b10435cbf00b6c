# SPDX-License-Identifier: Apache-2.0
"""A server that ends in any phase of a cycle, in order or not, leaves none of our processes, files and semaphores.

A process acts as vLLM's front end: it makes the run's folder and starts the ranks as children. They treat signals and
the death of their parent as vLLM's workers do. Every rank stays in the wanted phase until it is ended.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.files.run_folder import OWNED_FOLDER, STATS_VARIABLE
from vllm_ascend_eplb.observe.stats_file import provide_stats_path
from vllm_ascend_eplb.planning.request import plan_request
from vllm_ascend_eplb.settings.config import EplbConfig

from ..processes import left_semaphores, semaphores, session_members, title
from . import policies
from . import ranks as ranks_module
from .pace import make_planners_patient, settle, wait_for
from .ranks import Ranks, run_ranks
from .routing_model import REDUNDANT, RoutingModel

pytestmark = pytest.mark.distributed

PHASES = (Phase.SNAPSHOT, Phase.REDUCE, Phase.PLAN, Phase.BROADCAST, Phase.MOVE, Phase.COLLECT)
CYCLE = 2
"""The cycle in which the ranks end. By then there are statistics, a recorded map and moved experts."""


def exit_once(number: int, _: Any) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(128 + number)


def serve(ranks: Ranks, phase_name: str, folder: str, in_order: bool) -> None:
    """Step until the phase is reached in cycle 2, write a file that says so, and stay in the phase."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_once)

    def watch_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch_parent, daemon=True).start()
    config = EplbConfig(
        dynamic_eplb=True,
        num_redundant_experts=REDUNDANT,
        expert_heat_collection_interval=6,
        algorithm_execution_interval=1,
        policy="random",
        min_gain=0.0,
        transfer_buffer_experts=2,
        expert_map_record_path=str(Path(folder, "map.json")),
    )
    model = RoutingModel(ranks)
    # in the phase PLAN the planner is still planning when the server ends
    make_planners_patient(policies.answer_once if phase_name == "PLAN" else plan_request)
    updator = start_balancer(model, config)
    try:
        while updator.state.cycle < CYCLE or updator.state.phase is not Phase[phase_name]:
            settle(updator)
            updator.forward_before()
            model.forward()
            updator.forward_end()
            dist.barrier()
        if ranks.rank == 0:  # the threads have written the files of cycle 1
            for name in ("map.json", "map.load.npz"):
                wait_for(Path(folder, name).exists, name)
        Path(folder, f"rank{ranks.rank}").write_text(str(os.getpid()))
        if not in_order:
            time.sleep(600)
    finally:
        updator.close()


def content(path: Path) -> str:
    """The text of a file, once it has any."""
    wait_for(lambda: text(path), str(path))
    return text(path)


def front_ends(way: str, folder: str) -> None:
    """Start one server per phase, each in its own session and folder, and write the exit status of each."""
    os.environ.pop(STATS_VARIABLE, None)
    ranks_module.context = multiprocessing.get_context("fork")
    phase_of = {}
    for phase in PHASES:
        own = Path(folder, phase.name)
        (own / "tmp").mkdir(parents=True)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            tempfile.tempdir = os.environ["TMPDIR"] = str(own / "tmp")
            os.dup2(os.open(own / "said", os.O_WRONLY | os.O_CREAT), 2)
            signal.signal(signal.SIGTERM, exit_once)  # as vLLM's server, which ends in order
            provide_stats_path()
            run_ranks(2, serve, phase.name, str(own), way == "in order")
            return  # so that the process ends as any program does
        (own / "session").write_text(str(pid))
        phase_of[pid] = phase.name
    statuses = {phase_of[pid]: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in PHASES)}
    Path(folder, "statuses").write_text(json.dumps(statuses))


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


WAYS = ("in order", "Ctrl-C", "terminated", "front end killed", "first rank killed")


def end(way: str, session: int, first_rank: int) -> None:
    if way == "front end killed":
        os.kill(session, signal.SIGKILL)
    elif way == "first rank killed":
        os.kill(first_rank, signal.SIGKILL)
    elif way != "in order":
        os.killpg(session, signal.SIGINT if way == "Ctrl-C" else signal.SIGTERM)


@pytest.mark.parametrize("way", WAYS)
def test_server_ended_in_any_phase_leaves_nothing_of_ours(way: str, tmp_path: Path) -> None:
    code = f"from {__name__} import front_ends; front_ends({way!r}, {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    sessions: dict[Phase, int] = {}
    held: dict[Phase, set[int]] = {}
    try:
        for phase in PHASES:
            own = tmp_path / phase.name
            sessions[phase] = session = int(content(own / "session"))
            content(own / "rank1")
            first_rank = int(content(own / "rank0"))
            if way != "in order":
                wait_for(lambda own=own: list(own.glob(f"tmp/{OWNED_FOLDER}*/stats.json")), "the statistics")
                living = [session, *session_members(session)]
                held[phase] = semaphores(living)
                titles = [title(pid) for pid in living]
                assert sum("spawn_main" in title for title in titles) == 1, titles  # the planner
                assert held[phase]
                assert len(list(own.glob(f"tmp/{OWNED_FOLDER}*/stats.json"))) == 1
                end(way, session, first_rank)
        process.wait(60)
        statuses = json.loads((tmp_path / "statuses").read_text())
        for phase in PHASES:
            own = tmp_path / phase.name
            assert (statuses[phase.name] == 0) == (way == "in order"), (own / "said").read_text()
            wait_for(lambda phase=phase: not session_members(sessions[phase]), f"the end of {phase.name}")
            assert list((own / "tmp").glob(f"{OWNED_FOLDER}*")) == [], phase
            assert left_semaphores(held.get(phase, set())) == [], phase
            kept = {path.name for path in own.iterdir()} - {"tmp", "said", "session", "rank0", "rank1"}
            assert kept == {"map.json", "map.load.npz"}, phase
    finally:
        process.kill()
        for session in sessions.values():
            for pid in [session, *session_members(session)]:  # started by this test
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
