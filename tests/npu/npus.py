# SPDX-License-Identifier: Apache-2.0
"""Run functions of the programs in ``programs/`` in child processes, one per NPU.

The children run with the Python of .venv-npu on the emulated CANN libraries of build/emulated_cann (both made by
scripts/setup_npu_env.sh), or, with NPU_TEST_REAL=1, with this Python on real NPUs. pytest itself needs neither.
NPU_TEST_TORCH_NPU names another torch_npu that scripts/setup_npu_env.sh has installed.

On emulated NPUs the children are forked from a process that has imported torch_npu, which takes seconds. That process
uses no device, and the emulated CANN reads its settings at the first call. On real NPUs every child is a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.port import free_port

from ..e2e.nursery import Nursery

ROOT = Path(__file__).resolve().parents[2]
TORCH_NPU = os.environ.get("NPU_TEST_TORCH_NPU", "")
REAL = os.environ.get("NPU_TEST_REAL") == "1"
PYTHON = Path(sys.executable) if REAL else ROOT / f".venv-npu-{TORCH_NPU}".rstrip("-") / "bin" / "python"
LIBRARIES = ROOT / "build" / f"emulated_cann-{TORCH_NPU}".rstrip("-") / "lib"


def missing() -> str:
    """The reason why the tests cannot run; empty if they can."""
    if REAL:
        return _real_npus_missing()
    if not PYTHON.exists() or not (LIBRARIES / "libopapi.so").exists():
        return f"no emulated NPU: run scripts/setup_npu_env.sh {TORCH_NPU}".rstrip() + f" (no {PYTHON} or {LIBRARIES})"
    return ""


def _real_npus_missing() -> str:
    probe = "import torch, torch_npu; print(torch.npu.device_count())"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return f"no NPU: {sys.executable} cannot import torch_npu ({last}); set PYTHON to one that can"
    count = int(result.stdout.split()[-1])
    return "" if count >= 2 else f"{count} NPUs here; these tests need 2 or more"


def environment(**settings: str) -> dict[str, str]:
    """The environment of a child; ``settings`` override the defaults."""
    values = dict(os.environ)
    values.update(
        TASK_QUEUE_ENABLE="0",  # errors are raised at the line that causes them
        OMP_NUM_THREADS="1",
        HCCL_EXEC_TIMEOUT="120",
        HCCL_CONNECT_TIMEOUT="120",
        TORCH_NPU_WARNING_DISABLE="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), values.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        PYTHONFAULTHANDLER="1",
    )
    if not REAL:
        values.pop("ASCEND_HOME_PATH", None)
        values.update(
            LD_LIBRARY_PATH=os.pathsep.join([str(LIBRARIES), values.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep),
            ASCEND_GLOBAL_LOG_LEVEL="2",  # lets the emulator name operators that it lacks
            EMULATED_NPU_DEVICES="8",
            EMULATED_NPU_MEMORY_MB="1024",
            EMULATED_NPU_RACE="error",
            EMULATED_NPU_COMM_ORDER="error",
        )
    values.update(settings)
    return values


@dataclass
class Outcome:
    """The results of the children, by rank."""

    results: list[Any]
    codes: list[int]
    outputs: list[str]
    reports: list[list[str]] = field(default_factory=list)
    """Races and order violations by rank."""

    def text(self) -> str:
        return "\n".join(
            f"--- rank {rank}, exit code {code}\n{output[-6000:]}"
            for rank, (code, output) in enumerate(zip(self.codes, self.outputs, strict=True))
        )


PRELOADED = (
    "torch_npu",
    "torch.distributed",
    "tests.distributed.model",
    "tests.distributed.ranks",
    "vllm_ascend_eplb.adaptors.engine_adaptor",
    "vllm_ascend_eplb.balancer.start",
)
_NURSERIES: dict[tuple[str, tuple[str, ...]], Nursery] = {}


def nursery(path: str, preloaded: tuple[str, ...]) -> Nursery:
    """The process that has imported these modules with this PYTHONPATH."""
    if (path, preloaded) not in _NURSERIES:
        log = Path(tempfile.gettempdir()) / f"nursery-{len(_NURSERIES)}.log"
        _NURSERIES[path, preloaded] = Nursery(environment(PYTHONPATH=path), log, str(PYTHON), preloaded)
    return _NURSERIES[path, preloaded]


def close_nurseries() -> None:
    while _NURSERIES:
        _NURSERIES.popitem()[1].close()


def _start(arguments: list[str], values: dict[str, str], output: Path, preloaded: tuple[str, ...]) -> Any:
    """Start child.py with these arguments; returns a subprocess.Popen or what looks like it."""
    if not REAL:
        path = values["PYTHONPATH"]
        return nursery(path, preloaded).fork("nursery:run_module", ["tests.npu.child", *arguments], values, output)
    with open(output, "w") as file:
        return subprocess.Popen(
            [str(PYTHON), "-m", "tests.npu.child", *arguments],
            cwd=ROOT, env=values, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def run(
    program: str,
    function: str,
    ranks: int = 1,
    timeout: float = 240,
    check: bool = True,
    args: Any = None,
    allow: tuple[str, ...] = (),
    preloaded: tuple[str, ...] = PRELOADED,
    **settings: str,
) -> Outcome:
    """Call ``function(*args)`` of ``tests.npu.programs.PROGRAM`` on every rank.

    Args:
        program, function: what to call. The function's result must be JSON.
        ranks: processes; rank r uses device r and has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
        timeout: seconds until the children are killed.
        check: raise AssertionError with all output unless every child exits with 0 and there are no reports.
        args: list of JSON arguments, the same on all ranks.
        allow: reports that contain one of these words do not count; needs EMULATED_NPU_RACE="report".
        preloaded: modules that the process imports from which the children are forked.
        settings: environment variables.
    """
    outcome = Ranks(program, function, ranks, args, preloaded, **settings).finish(timeout, allow)
    if check:
        assert all(code == 0 for code in outcome.codes), outcome.text()
        assert not any(outcome.reports), outcome.reports
    return outcome


class Ranks:
    """The children of a :func:`run` that has begun."""

    def __init__(
        self,
        program: str,
        function: str,
        ranks: int,
        args: Any = None,
        preloaded: tuple[str, ...] = PRELOADED,
        **settings: str,
    ) -> None:
        port = str(free_port())
        self._folder = tempfile.TemporaryDirectory(prefix="npus-")
        self._children = []
        for rank in range(ranks):
            values = environment(
                **{
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "EMULATED_NPU_SEED": settings.get("EMULATED_NPU_SEED", str(rank + 1)),
                    "EMULATED_NPU_REPORT": str(self._file("report", rank)),
                    **settings,
                }
            )
            arguments = [program, function, str(self._file("answer", rank)), json.dumps(args or [])]
            self._children.append(_start(arguments, values, self._file("output", rank), preloaded))

    def _file(self, kind: str, rank: int) -> Path:
        return Path(self._folder.name) / f"{kind}-{rank}"

    def finish(self, timeout: float, allow: tuple[str, ...] = ()) -> Outcome:
        """Wait for all children; after ``timeout`` seconds they are killed."""
        outcome = Outcome([], [], [])
        with self._folder:
            try:
                for process in self._children:
                    try:
                        process.wait(timeout)
                    except subprocess.TimeoutExpired:
                        timeout = 1
            finally:
                for process in self._children:  # every child leads a session, which includes its own children
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            for rank, process in enumerate(self._children):
                outcome.codes.append(process.wait())
                outcome.outputs.append(self._file("output", rank).read_text(errors="replace"))
                answer, report = self._file("answer", rank), self._file("report", rank)
                outcome.results.append(json.loads(answer.read_text()) if answer.exists() else None)
                text = report.read_text() if report.exists() else ""
                found = [part for part in text.split("\n[") if part]
                outcome.reports.append([part for part in found if not any(word in part for word in allow)])
        return outcome
