# SPDX-License-Identifier: Apache-2.0
"""``control``: gives an order to the balancer of a running server on this host."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..balancer.orders import MAX_INTERVAL, Order, orders_path, write_order
from ..files.disk import expand_user, unexpanded
from ..observe.stats import EplbStats
from ..observe.stats_file import read_stats, stats_path
from .output import CommandError, JsonOption, print_json, user_errors


class Verb(str, Enum):
    PAUSE = "pause"
    RESUME = "resume"
    CYCLE = "cycle"
    RESTORE = "restore"
    REAPPLY = "reapply"
    INTERVALS = "intervals"


def control(
    command: Annotated[
        Verb,
        typer.Argument(
            help="pause: begin no further cycle. resume: begin cycles again. cycle: one cycle now, paused or not. "
            "restore: move every expert back to its start placement, and pause. reapply: return to the placement "
            "before the last restore or new weights. intervals: set new intervals."
        ),
    ],
    collect_steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_INTERVAL, help="New expert_heat_collection_interval.")
    ] = None,
    execution_steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_INTERVAL, help="New algorithm_execution_interval.")
    ] = None,
    stats_file: Annotated[
        Path | None,
        typer.Option(help="The server's statistics file; default: the file of this user's only server on this host."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.0, max=86400.0, help="Seconds to wait until the order takes effect.")
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Pause, resume or steer the balancer of a running server; run it as the server's user, on its first rank's host.

    The exit status is 1 if the order does not take effect in time: an idle server makes no steps, and takes the order
    with its next requests.
    """
    given = collect_steps is not None or execution_steps is not None
    with user_errors(as_json):
        if given != (command is Verb.INTERVALS):
            raise CommandError("--collect-steps and --execution-steps go with intervals, which needs one of them")
        paths = parts_of(Path(expand_user(stats_file)) if stats_file else find_stats_file())
        for path in paths:
            stats = _stats(path)
            if stats.phase == "off":
                raise CommandError(
                    f"balancing was switched off in this server ({stats.off_reason}); restart it to balance again"
                )
        order = Order(command=command.value, collect_steps=collect_steps, execution_steps=execution_steps)
        for path in paths:
            try:
                write_order(orders_path(path), order)
            except OSError as error:
                raise CommandError(f"the order cannot be written beside {path} ({error.strerror})") from None
        end = time.monotonic() + timeout
        taken = {path: _wait(path, order, end) for path in paths}
    if as_json:
        fields = ("order_step", "paused", "collect_steps", "execution_steps", "phase", "step")
        answer = {"order": order.id, "taken": None not in taken.values()} | _pick(taken[paths[0]], fields)
        parts = {path.stem: _pick(stats, fields) for path, stats in taken.items()} if len(paths) > 1 else {}
        print_json(answer | ({"parts": parts} if parts else {}))
    else:
        for path, effect in taken.items():
            prefix = f"{path.stem}: " if len(paths) > 1 else ""
            typer.echo(prefix + (_effect(command, effect) if effect is not None else _no_effect(command, timeout)))
    if None in taken.values():
        raise typer.Exit(1)


def _effect(command: Verb, stats: EplbStats) -> str:
    return (
        f"{command.value} took effect on all ranks at step {stats.order_step}; "
        f"{'paused' if stats.paused else 'balancing'}, a cycle every {stats.collect_steps} steps, "
        f"transfers at the earliest {stats.execution_steps} steps after the load was gathered"
    )


def _no_effect(command: Verb, timeout: float) -> str:
    return f"{command.value} is pending: no effect after {timeout:g} s; an idle server takes it with its next requests"


def parts_of(path: Path) -> list[Path]:
    """The statistics files of a server, one for each of its balancers (such as pipeline stages).

    Raises:
        CommandError: there is no such file.
    """
    further = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*{glob.escape(path.suffix)}"))
    found = [file for file in (path, *further) if file.exists()]
    if not found:
        because = unexpanded(path) or ": no server writes it, or its server has served nothing yet"
        raise CommandError(f"{path} does not exist{because}")
    return found


def find_stats_file() -> Path:
    """The statistics file of this user's only server on this host.

    Raises:
        CommandError: there is no server, or there are several.
    """
    named = stats_path()
    if named is not None:
        return named
    files = Path(tempfile.gettempdir()).glob("vllm-eplb-*/stats*.json")
    found = sorted({path.with_name("stats.json") for path in files if path.stat().st_uid == os.geteuid()})
    if len(found) != 1:
        what = "no server of this user" if not found else f"{len(found)} servers"
        raise CommandError(
            f"{what} found on this host{': ' if found else ''}{', '.join(map(str, found))}; "
            "name the statistics file with --stats-file (the server's variable EPLB_STATS_FILE)"
        )
    return found[0]


def _stats(path: Path) -> EplbStats:
    try:
        stats = read_stats(path)
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror}); run this as the user of the server") from None
    if stats is None:
        because = unexpanded(path) or ": no server writes it, or its server has served nothing yet"
        raise CommandError(f"{path} does not exist{because}")
    return stats


def _wait(path: Path, order: Order, end: float) -> EplbStats | None:
    """Waits until the statistics have the order's id; None if they do not by ``end`` (of the monotonic clock)."""
    while True:
        stats = _stats(path)
        if stats.order == order.id:
            return stats
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)


def _pick(stats: EplbStats | None, fields: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(stats, name) for name in fields} if stats is not None else {}
