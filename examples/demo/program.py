# SPDX-License-Identifier: Apache-2.0
"""What the demos share as programs: the folder of a run, how a run ends, and whether a balancer works."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console

from vllm_ascend_eplb.observe.stats import EplbStats

from .server import ServerError


def run_in_folder(
    run: Callable[[argparse.Namespace, Console, Path], int], arguments: argparse.Namespace, logs: str, where: str
) -> int:
    """The exit status of ``run``; 2 if a server could not be run, 130 after Ctrl-C.

    Args:
        run: the demo; takes the arguments, a console and a folder for logs and statistics.
        arguments: ``keep`` names the folder, which is kept then. Another folder is kept if the demo fails.
        logs, where: what the logs are called, and where they lie in the folder.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that servers are stopped
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own; the summary's table needs 100
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="eplb-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    status = 2
    try:
        status = run(arguments, console, folder)
    except (ServerError, RuntimeError, httpx.HTTPError) as error:
        console.print(f"FAILED: {type(error).__name__}: {error}", style="bold red", markup=False, highlight=False)
    except KeyboardInterrupt:
        status = 130
    if status == 0 and not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"{logs}: {folder / where}", markup=False, highlight=False)
    return status


def last_cycle(stats: EplbStats) -> int:
    """The number of the last cycle that has ended; 0 before the first."""
    return stats.cycles[-1].cycle if stats.cycles else 0


def require_balancing(stats: EplbStats, server: str = "") -> None:
    """Raises:
    ServerError: three cycles failed and none was done; says at which server, and why.
    """
    if stats.cycles_failed >= 3 and not stats.cycles_done:
        raise ServerError(f"{server}balancing does not work: {stats.cycles[-1].reason}")
