# SPDX-License-Identifier: Apache-2.0
"""``report``: writes one self-contained page about a run, its recorded map, a simulation, or all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files.disk import read_bounded, write_atomic
from ..files.map_recorder import RecordedMap, read_recorded
from ..observe.stats import EplbStats, StatsError
from ..report import make_page
from ..simulate.result import MAX_SIMULATION_BYTES, Simulation, SimulationError
from .output import CommandError, JsonOption, console, print_json, show_bytes, user_errors

NAMES: dict[type, str] = {EplbStats: "statistics file", Simulation: "simulation", RecordedMap: "map"}


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Statistics file of a run, its recorded map, or a result of `simulate`."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Expert load balancing",
    as_json: JsonOption = False,
) -> None:
    """Draw a run or a simulation as one self-contained HTML page."""
    with user_errors(as_json):
        found: dict[type, EplbStats | Simulation | RecordedMap] = {}
        for path in runs:
            run = read_run(path)
            if type(run) in found:
                raise CommandError(f"{path} is a second {NAMES[type(run)]}; give one of each kind at most")
            found[type(run)] = run
        stats, simulation, recorded = (found.get(kind) for kind in NAMES)
        page = make_page(stats, simulation, title, recorded).encode()  # type: ignore[arg-type]
        write_atomic(output, page)
    if as_json:
        print_json(
            {
                "output": str(output),
                "bytes": len(page),
                "run": stats is not None,
                "simulation": simulation is not None,
                "map": recorded is not None,
            }
        )
    else:
        console().print(f"written: {output} ({show_bytes(len(page))})", markup=False)


def read_run(path: Path) -> EplbStats | Simulation | RecordedMap:
    """Reads a file of any of the three kinds.

    Raises:
        CommandError: the file holds neither statistics nor a simulation nor a map.
        ExpertMapError, TraceError: the map, or the load beside it, cannot be used.
    """
    data = read_bounded(path, MAX_SIMULATION_BYTES, "statistics, map or simulation file")
    if data.startswith((b"PK", b"\x93NUMPY")) or b'"layer_list"' in data[:200]:
        return read_recorded(path)
    try:
        return EplbStats.from_json(data)
    except StatsError as error:
        as_stats = error
    try:
        return Simulation.from_json(data)
    except SimulationError as error:
        reason = error if b'"vllm-ascend-eplb simulation"' in data[:200] else as_stats
        raise CommandError(f"{path} is neither statistics of a run nor a map nor a simulation ({reason})") from None
