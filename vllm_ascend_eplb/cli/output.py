# SPDX-License-Identifier: Apache-2.0
"""Output of commands: tables for people, one JSON value with ``--json``, one line for an error."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..balancer.orders import OrderError
from ..files.disk import FileError
from ..files.expert_map import ExpertMapError
from ..files.traces import TraceError
from ..observe.stats import StatsError
from ..planning import PlanInputError
from ..settings.messages import EplbConfigError
from ..simulate.advice import AdviceError
from ..simulate.result import SimulationError
from ..values.placement import PlacementError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]

USER_ERRORS = (
    AdviceError,
    EplbConfigError,
    ExpertMapError,
    FileError,
    OrderError,
    PlacementError,
    PlanInputError,
    SimulationError,
    StatsError,
    TraceError,
)
"""Errors of wrong input; their message is shown as it is. Any other error is a bug, and shows a traceback."""


class CommandError(Exception):
    """A command cannot be carried out; the message is one line."""


def console() -> Console:
    """The console for text; 120 columns if it is not a terminal."""
    made = Console(highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 120
    return made


def table(*columns: str, title: str | None = None) -> Table:
    """A table with text in the first column and numbers in the others."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", no_wrap=number > 0)
    return made


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, allow_nan=False))


@contextlib.contextmanager
def user_errors(as_json: bool) -> Iterator[None]:
    """Ends the command with one line and status 2 on wrong input."""
    try:
        yield
    except (*USER_ERRORS, CommandError) as error:
        fail(str(error), as_json)


def fail(message: str, as_json: bool, status: int = 2) -> NoReturn:
    if as_json:
        print_json({"error": message})
    else:
        print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(status)


def warn(lines: Iterable[str]) -> None:
    """Prints warnings on standard error, apart from JSON."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def show_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: 0-2, 7."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ", ".join(parts)


def show_bytes(count: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def show_seconds(seconds: float) -> str:
    """A time with a fitting unit."""
    size = abs(seconds)
    if size >= 120:
        return f"{seconds / 60:.1f} min"
    if size >= 1 or size == 0:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.2f} ms" if size >= 1e-3 else f"{seconds * 1e6:.1f} us"
