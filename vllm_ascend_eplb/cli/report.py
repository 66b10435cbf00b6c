# SPDX-License-Identifier: Apache-2.0
"""``report``: one self-contained page about a run, a simulation, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import read_bounded, write_atomic
from ..report import make_page
from ..simulate import MAX_SIMULATION_BYTES, Simulation, SimulationError
from ..stats import EplbStats, StatsError
from .output import CommandError, JsonOption, console, print_json, show_bytes, user_errors


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Statistics file of a run, result of `simulate`, or both.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Expert load balancing",
    as_json: JsonOption = False,
) -> None:
    """Draw a run as one HTML page that needs no network."""
    with user_errors(as_json):
        stats: EplbStats | None = None
        simulation: Simulation | None = None
        for path in runs:
            found = read_run(path)
            if isinstance(found, EplbStats):
                if stats is not None:
                    raise CommandError(f"{path} is a second statistics file; give one, and one simulation at most")
                stats = found
            else:
                if simulation is not None:
                    raise CommandError(f"{path} is a second simulation; give one, and one statistics file at most")
                simulation = found
        page = make_page(stats, simulation, title).encode()
        write_atomic(output, page)
    if as_json:
        print_json(
            {"output": str(output), "bytes": len(page), "run": stats is not None, "simulation": simulation is not None}
        )
    else:
        console().print(f"written: {output} ({show_bytes(len(page))})", markup=False)


def read_run(path: Path) -> EplbStats | Simulation:
    """What a file holds.

    Raises:
        CommandError: neither statistics nor a simulation.
    """
    data = read_bounded(path, MAX_SIMULATION_BYTES, "statistics or simulation file")
    try:
        return EplbStats.from_json(data)
    except StatsError as error:
        as_stats = error
    try:
        return Simulation.from_json(data)
    except SimulationError as error:
        reason = error if b'"vllm-ascend-eplb simulation"' in data[:200] else as_stats
        raise CommandError(f"{path} is neither statistics of a run nor a simulation ({reason})") from None
