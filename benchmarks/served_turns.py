# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own that stay in memory and are asked in turns, times of their steps, and what comes of
that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.served import describe_ratio, ratios

OFF = "off"
"""The engine without balancing, with which others are compared."""

FIGURES = {
    "over_off": ("", "tokens_per_s"),
    "median_over_off": ("median step, ", "median_tokens_per_s"),
    "undisturbed_over_off": ("undisturbed step, ", "undisturbed_tokens_per_s"),
}
"""Ratios of a report by name: how their lines begin, and the figure of :func:`rates`."""

CLOSE = ("close",)

Turn = dict[str, dict[str, dict[str, Any]]]
"""Figures by kind of step and engine."""

START_SECONDS, TURN_SECONDS = 400.0, 120.0
"""Longest start of an engine, and longest turn."""


class Served:
    """An engine in a process of its own."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, *arguments))
        self._process.start()
        there.close()

    def start(self) -> None:
        self._connection.send("start")

    def wait(self) -> None:
        """Until it can be asked.

        Raises:
            OSError, EOFError: the engine ended, or does not start; its log says why.
        """
        assert self._answer(START_SECONDS) == "ready"

    def ask(self, *what: Any) -> Any:
        """What a method of the engine returns.

        Raises:
            OSError, EOFError: the engine ended, or does not answer; its log says why.
        """
        self._connection.send(what)
        return self._answer(TURN_SECONDS)

    def _answer(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return self._connection.recv()

    def end(self) -> None:
        """Ends the process with those that it started, also one that was not asked to close."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it does not lead a group yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()


class Engines:
    """Several engines; one that fails is left out.

    Args:
        starts: names of engines, in groups that start together.
        serve: what a process runs: with a connection, the name, and ``arguments``. It waits for a message, starts the
            engine, sends "ready", and answers tuples of a method and its arguments.
    """

    def __init__(self, starts: Sequence[Sequence[str]], serve: Callable[..., None], *arguments: Any) -> None:
        self.left_out: dict[str, str] = {}
        self._starts = starts
        self._served = {mode: Served(serve, mode, *arguments) for together in starts for mode in together}

    @property
    def modes(self) -> list[str]:
        return [mode for mode in self._served if mode not in self.left_out]

    def start(self, say: Callable[[str], None]) -> None:
        """Starts one group after another.

        Raises:
            SystemExit: the first engine, with which others are compared, does not start.
        """
        for together in self._starts:
            for mode in together:
                self._or_leave_out(mode, self._served[mode].start)
            for mode in together:
                self._or_leave_out(mode, self._served[mode].wait)
                say(f"{mode}: {self.left_out.get(mode, 'serves')}")
            if self._starts[0][0] in self.left_out:
                raise SystemExit(f"there is nothing to compare with: {self.left_out}")

    def ask(self, mode: str, *what: Any) -> Any:
        """The answer; None from an engine that is left out."""
        return self._or_leave_out(mode, lambda: self._served[mode].ask(*what))

    def turn(self, kinds: dict[str, tuple[Any, ...]], number: int) -> Turn:
        """Asks each engine for every kind of step, in every second turn in the other order. Engines that are left out
        have no figures."""
        order = self.modes if number % 2 == 0 else self.modes[::-1]
        answers = {kind: {mode: self.ask(mode, *call) for mode in order} for kind, call in kinds.items()}
        return {kind: {mode: found for mode, found in of.items() if found} for kind, of in answers.items()}

    def end(self) -> None:
        for served in self._served.values():
            served.end()

    def _or_leave_out(self, mode: str, act: Callable[[], Any]) -> Any:
        if mode in self.left_out:
            return None
        try:
            return act()
        except (OSError, EOFError) as error:
            self.left_out[mode] = repr(error)
            self._served[mode].end()
            return None


def answer(connection: Connection, make: Callable[[], Any]) -> None:
    """Makes an engine when ``connection`` asks, and calls its methods as it asks, until it asks to close or is gone."""
    if _asked(connection) == CLOSE:
        return
    engine = make()
    try:
        connection.send("ready")
        while (asked := _asked(connection)) != CLOSE:
            name, *arguments = asked
            connection.send(getattr(engine, name)(*arguments))
    finally:
        engine.close()  # else this process would wait for the engine's when it ends
    with contextlib.suppress(BrokenPipeError):
        connection.send(None)


def _asked(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:  # the other end is gone
        return CLOSE


def all_over_off(rounds: Sequence[Turn]) -> dict[str, dict[str, dict[str, Any]]]:
    """The ratios of a report; see FIGURES and :func:`over_off`."""
    return {name: over_off(rounds, figure) for name, (_, figure) in FIGURES.items()}


def describe(report: dict[str, Any], begin: str = "") -> None:
    """Prints a line for each ratio of a report, or nothing if it has none yet."""
    for figure, (title, _) in FIGURES.items():
        for name, ratio in report.get(figure, {}).items():
            print(describe_ratio(f"{begin}{title}{name}", ratio), flush=True)


def over_off(rounds: Sequence[Turn], figure: str) -> dict[str, dict[str, Any]]:
    """By kind of step and engine: a figure over that of no balancing, round by round."""
    found = {}
    pairs = ((kind, mode) for turn in rounds for kind, modes in turn.items() for mode in modes if mode != OFF)
    for kind, mode in dict.fromkeys(pairs):
        both = [turn[kind] for turn in rounds if mode in turn[kind]]
        found[f"{kind}, {mode}"] = ratios(*([modes[name][figure] for modes in both] for name in (OFF, mode)))
    return found


def timed(engine: Any, prompts: list[list[int]], tokens: int) -> Iterator[tuple[float, int]]:
    """Steps of the engine until all prompts are answered: seconds since the step before, and requests that got a
    token."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", TokensPrompt(prompt_token_ids=prompt), sampling)
    before = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if outputs:
            yield now - before, len(outputs)
            before = now


def rates(times: list[float], tokens: int) -> dict[str, float]:
    """Tokens a second of steps with ``tokens`` each, of the median step, and of a step that nothing disturbs, which is
    taken to be the one that one in ten is shorter than; and the longest step."""
    longest = max(range(len(times)), key=times.__getitem__)
    return {
        "tokens_per_s": tokens * len(times) / sum(times),
        "median_tokens_per_s": tokens / statistics.median(times),
        "undisturbed_tokens_per_s": tokens / sorted(times)[len(times) // 10],
        "longest_ms": 1e3 * times[longest],
        "longest_at": longest,
    }
