# SPDX-License-Identifier: Apache-2.0
"""A process that imports vLLM once and forks offline engines, so that their processes need not import it again.

vLLM on a CPU spawns its processes, and every process imports vLLM, which takes ten seconds of a core. Offline runs in
these tests are forked instead. Servers are started as users start them, except those of front_end.py.

``python nursery.py MODULE...`` imports the modules, and reads jobs from standard input, one line of JSON per job: the
function to run, its arguments, the environment, more paths to import from, and the file for its output. It answers with
lines of JSON: the id of a forked process, and the exit status of an ended one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

FOLDER = Path(__file__).parent

PRELOADED = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.models.glm4_moe_mtp",
)
"""Modules that an engine's processes import, but none of our package: if it is off, no adaptor may be loaded."""


class Nursery:
    """The tests' handle of the process, which starts with the first job.

    Args:
        environment: the whole environment in which modules are imported.
        log: file for what they print.
        python, preloaded: the interpreter, and the modules that it imports.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        python: str = sys.executable,
        preloaded: Sequence[str] = PRELOADED,
    ) -> None:
        self._environment, self._log = dict(environment), log
        self._command = [python, str(FOLDER / "nursery.py"), *preloaded]
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._ended: dict[int, int] = {}

    def start(
        self,
        function: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        paths: Sequence[str] = (),
    ) -> int:
        """Fork a process that leads a new session and calls ``module:name`` with the arguments.

        Args:
            environment: the whole environment of the process.
            output: file for standard output and standard error.
            paths: folders to import from. A sitecustomize.py in them runs first.

        Returns:
            The id of the process.
        """
        if self._process is None:
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
        job = {"function": function, "arguments": list(arguments), "environment": dict(environment)}
        job |= {"output": str(output), "paths": list(paths)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._answer("pid"))

    def wait(self, pid: int, timeout: float | None = None) -> int:
        """Wait for a process and return its exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it has not ended after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self._ended:
            self._answer("ended", deadline)
        return self._ended.pop(pid)

    def fork(self, function: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Forked:
        """As :meth:`start`; returns a handle of the process."""
        return Forked(self, self.start(function, arguments, environment, output))

    def _answer(self, kind: str, deadline: float | None = None) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        while True:
            while b"\n" not in self._read:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([self._process.stdout], [], [], left)[0]:
                    raise subprocess.TimeoutExpired(self._command, left or 0.0)
                some = os.read(self._process.stdout.fileno(), 65536)
                assert some, f"the process that forks engines has ended: {self._log.read_text()[-3000:]}"
                self._read += some
            line, _, self._read = self._read.partition(b"\n")
            answer = json.loads(line)
            if "ended" in answer:
                self._ended[answer["ended"]] = answer["status"]
            if kind in answer:
                return answer[kind]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


class Forked:
    """A forked process, with what tests use of subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._nursery.wait(self.pid, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # modules may print as they are imported
    import_all(sys.argv[1:])
    children: set[int] = set()
    try:
        _serve(answers, children)
    finally:  # the tests have ended or were killed
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os._exit(0)  # at once, without the modules' exit handlers


def import_all(modules: Sequence[str]) -> None:
    for name in modules:
        with contextlib.suppress(ImportError):  # other versions of vLLM lack some
            importlib.import_module(name)


def _serve(answers: TextIO, children: set[int]) -> None:
    """Fork a process for every job until standard input ends."""
    while True:
        readable, _, _ = select.select([0], [], [], 0.1 if children else None)
        if readable:
            line = _line()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                _run(json.loads(line))
            children.add(pid)
            answers.write(json.dumps({"pid": pid}) + "\n")
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                answers.write(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}) + "\n")


def _line() -> bytes:
    """Read a line of standard input without a buffer, because a child would inherit a copy of the buffer."""
    read = bytearray()
    while not read.endswith(b"\n"):
        some = os.read(0, 1)
        if not some:
            break
        read += some
    return bytes(read)


def _run(job: dict[str, Any]) -> None:
    """Run a job in the forked process; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        os.environ.clear()
        os.environ.update(job["environment"])
        tempfile.tempdir = None
        sys.path[:0] = job["paths"]
        for path in job["paths"]:
            first = Path(path, "sitecustomize.py")
            if first.exists():
                exec(compile(first.read_text(), str(first), "exec"), {"__name__": "sitecustomize"})
        fork_everything()
        importlib.import_module("sockets").wait_at_sockets()
        module, _, name = job["function"].partition(":")
        getattr(importlib.import_module(module), name)(*job["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_code(path: str, *arguments: str) -> None:
    """Job function: run a script as ``python path arguments`` does."""
    sys.argv = [path, *arguments]
    exec(compile(Path(path).read_text(), path, "exec"), {"__name__": "__main__"})


def run_module(name: str, *arguments: str) -> None:
    """Job function: run a module as ``python -m name arguments`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def fork_everything() -> None:
    """Make vLLM fork: on a CPU it sets "spawn" and ignores the environment."""
    import multiprocessing

    def get_mp_context() -> Any:
        return multiprocessing.get_context("fork")

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = get_mp_context  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
