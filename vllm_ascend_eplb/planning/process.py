# SPDX-License-Identifier: Apache-2.0
"""EplbProcess: the planner in a child process of EP rank 0, fed through two queues.

The step thread touches no queue, because a child that is stopped or killed in the middle of a message leaves queues on
which every call can block for ever. A daemon thread of the parent owns the child and both queues; the step thread
leaves a request in a variable and picks up the newest answer from another. Every start of a child makes new queues.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..files.run_folder import STATS_VARIABLE, remove_orphaned_folder
from ..values.plan import Plan
from .request import PlanAnswer, PlanRequest, plan_request, serve

logger = logging.getLogger("vllm.eplb")  # only loggers under vllm have handlers in a server


POLL_SECONDS = 0.05
"""How often the parent's thread looks for a new request, a dead child or an answer."""


ORPHAN_SECONDS = 3.0
"""How long the child outlives a parent that ended without ending it."""


PATIENCE_SECONDS = 1.0
"""How long a child may go on with a plan that was superseded. A new child takes as long to start."""


KEPT_ANSWERS = 4
"""Answers of one child that are kept until they are asked for; a correct child needs one."""


RESTART_SECONDS = (0.0, 1.0, 5.0, 30.0)
"""Pauses before the first, second, ... start in a row that brought no answer; the last value is used from then on."""


def _child(requests: Any, answers: Any, policy: Callable[[PlanRequest], Plan], parent: int) -> None:
    # The planner must not outlive the server, compete with it for cores, or react to its Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    with contextlib.suppress(OSError):
        os.nice(10)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the parent may be bound to the cores it computes on
    serve(requests, answers, policy)


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent ended, even if the parent was killed while this process is stopped.

    It waits a moment: an engine lists its processes before it kills them one by one, and vLLM's shutdown breaks off if
    one of them has ended before its turn.
    """
    if sys.platform == "linux":
        set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_pdeathsig, signal.SIGCONT, 0, 0, 0)  # wakes a stopped process

    def watch() -> None:
        process = multiprocessing.parent_process()
        if process is not None and os.getppid() == parent:
            process.join()
        time.sleep(ORPHAN_SECONDS)
        remove_orphaned_folder(os.environ.get(STATS_VARIABLE, ""))
        os._exit(0)

    threading.Thread(target=watch, name="eplb-parent-watch", daemon=True).start()


@contextlib.contextmanager
def _startable() -> Iterator[None]:
    """Lets a daemonic process have a child, and keeps the child from importing the parent's ``__main__``.

    vLLM's workers are daemonic, and a spawned child imports the parent's main module: torch and vllm with it.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.get("daemon")
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__",) if name in main.__dict__}
    spec = getattr(main, "__spec__", None)
    config["daemon"] = False
    main.__spec__ = None
    try:
        yield
    finally:
        config["daemon"] = daemon
        main.__spec__ = spec
        main.__dict__.update(hidden)


class _Child:
    """One planner process, with queues of its own and a thread that reads its answers."""

    def __init__(self, policy: Callable[[PlanRequest], Plan], on_answer: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.answers: tuple[PlanAnswer, ...] = ()
        self.gone = False
        self._on_answer = on_answer
        self._requests = context.Queue()
        self._answers = context.Queue()
        self._process = context.Process(
            target=_child,
            args=(self._requests, self._answers, policy, os.getpid()),
            name="eplb-planner",
            daemon=True,
        )
        with _startable():
            self._process.start()
        self.pid = self._process.pid
        # With the child's ends closed here, readers and writers see an end of file when the child dies.
        self._answers._writer.close()  # type: ignore[attr-defined]
        self._requests._reader.close()  # type: ignore[attr-defined]
        self._requests._ignore_epipe = True  # type: ignore[attr-defined]
        threading.Thread(target=self._read, name="eplb-planner-answers", daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                answer = self._answers.get()
            except (EOFError, OSError, ValueError):  # the child is gone, or the queue was closed under us
                break
            except Exception:  # bytes that are not a message: what follows cannot be read either
                self._process.kill()
                break
            if isinstance(answer, PlanAnswer) and type(getattr(answer, "number", None)) is int:
                self.answers = (*self.answers, answer)[-KEPT_ANSWERS:]
            self._on_answer()
        self.gone = True  # set before the exit code is known
        self._on_answer()

    def ask(self, request: PlanRequest) -> None:
        self._requests.put(request)

    def kill(self) -> int | None:
        """Ends the child and returns its exit code."""
        self._process.kill()
        self._process.join(5.0)
        self._requests.cancel_join_thread()
        self._requests.close()
        return self._process.exitcode


class EplbProcess:
    """The planner of EP rank 0, as its step thread sees it: calls that never block.

    Args:
        policy: answers a request in the child; must be importable by name.
        timeout: seconds after which an unanswered request counts as failed and the child is replaced.
    """

    def __init__(self, policy: Callable[[PlanRequest], Plan] = plan_request, *, timeout: float = 120.0) -> None:
        self._policy = policy
        self._timeout = timeout
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self.request: PlanRequest | None = None
        self._answer: PlanAnswer | None = None
        self._stopping = False
        self.child: _Child | None = None
        self._starts_in_vain = 0
        self.starts = 0
        self._thread = threading.Thread(target=self._run, name="eplb-planner", daemon=True)
        self._thread.start()

    def submit(self, request: PlanRequest) -> None:
        """Asks for a plan. An earlier request without an answer is dropped."""
        with self._lock:
            self.request = request
            self._answer = None
        self._wake.set()

    def answer(self, number: int) -> PlanAnswer | None:
        """The answer to the request with this number, or None as long as there is none."""
        with self._lock:
            answer = self._answer
        return answer if answer is not None and answer.number == number else None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        child = self.child
        return child.pid if child is not None else None

    def close(self, wait: float = 5.0) -> None:
        """Ends the child and the thread; safe to call twice."""
        self._stopping = True
        self._wake.set()
        self._thread.join(wait)

    def _run(self) -> None:
        self._start_child()
        while not self._stopping:
            with self._lock:
                request, self.request = self.request, None
            if request is not None:
                self._handle(request)
            elif self.child is not None and self.child.gone:
                self._bury_child()
            if self.child is None:
                self._start_child()
            if request is None:  # otherwise a newer request may be there, whose wake-up _ask took for an answer's
                self._wake.wait()
                self._wake.clear()
        self._end_child()

    def _handle(self, request: PlanRequest) -> None:
        try:
            answer = self._ask(request)
        except Exception as error:  # whatever it is, this thread must live for the next request
            self._end_child()
            answer = PlanAnswer(request.number, error=f"{type(error).__name__}: {error}", died=True)
        with self._lock:
            if self.request is None:  # a newer request makes this answer worthless
                self._answer = answer

    def _ask(self, request: PlanRequest) -> PlanAnswer | None:
        """Has the child answer. Replaces a child that died, hangs, or is busy with a superseded request.

        If a child from before this request dies, the request may not be the cause: a new child is asked. If a new child
        dies, the request is the cause.
        """
        if self.child is not None and self.child.gone:
            self._bury_child()
        is_new = self.child is None
        if self.child is None:
            self._start_child()
        child = self.child
        if child is None:
            return PlanAnswer(request.number, error="the planner process cannot be started", died=True)
        child.ask(request)
        asked = time.monotonic()
        while not self._stopping:
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
            died = child.gone  # looked at before the answers: the last one may be there
            for answer in child.answers:
                if answer.number == request.number:
                    child.answers = ()
                    self._starts_in_vain = 0
                    return answer
            with self._lock:
                overtaken = self.request is not None
            if overtaken and time.monotonic() > asked + PATIENCE_SECONDS:  # it hangs, or is too slow
                self._end_child()
                return None
            if died:
                code = self._bury_child()
                if not is_new and not self._stopping:
                    return self._ask(request)
                return PlanAnswer(request.number, error=f"the planner process died (exit code {code})", died=True)
            if time.monotonic() > asked + self._timeout:
                self._end_child()
                logger.warning("EPLB: the planner process did not answer within %g s; it is replaced", self._timeout)
                return PlanAnswer(request.number, error=f"the planner did not answer within {self._timeout:g} s")
        return None

    def _bury_child(self) -> int | None:
        """Reaps a child that ended by itself, and logs it."""
        code = self._end_child()
        if not self._stopping:
            logger.warning("EPLB: the planner process ended (exit code %s); it is started again", code)
        return code

    def _end_child(self) -> int | None:
        child, self.child = self.child, None
        return child.kill() if child is not None else None

    def _start_child(self) -> None:
        pause = RESTART_SECONDS[min(self._starts_in_vain, len(RESTART_SECONDS) - 1)]
        not_before = time.monotonic() + pause
        while time.monotonic() < not_before and not self._stopping:
            time.sleep(POLL_SECONDS)
        if self._stopping:
            return
        self.starts += 1
        self._starts_in_vain += 1
        with contextlib.suppress(Exception):  # no memory, threads or processes left; the next request tries again
            self.child = _Child(self._policy, self._wake.set)
