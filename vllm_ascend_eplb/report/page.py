# SPDX-License-Identifier: Apache-2.0
"""The page: one document with the parts of a run, a recorded map and a simulation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..files.map_recorder import RecordedMap
from ..observe.stats import EplbStats
from ..simulate.result import Simulation
from .pieces import escape
from .recorded import recorded_parts
from .run import run_parts
from .simulation import simulation_parts


def make_page(
    stats: EplbStats | None,
    simulation: Simulation | None,
    title: str = "Expert load balancing",
    recorded: RecordedMap | None = None,
) -> str:
    """The whole page.

    Args:
        stats: statistics of a run, or None.
        simulation: a simulation, or None.
        title: heading of the page.
        recorded: the map that a run recorded, with its load, or None. At least one of the three is given.
    """
    parts = [f"<h1>{escape(title)}</h1>", subtitle(stats, simulation)]
    if stats is not None:
        parts += run_parts(stats)
    if recorded is not None:
        parts += recorded_parts(recorded)
    if simulation is not None:
        parts += simulation_parts(simulation)
    parts.append(
        '<p class="soft">PAR: peak-to-average ratio of the ranks&rsquo; load in a layer. 1.00 is perfect; at '
        "1.25 the busiest rank has a quarter more than the mean. A replica is a copy of an expert.</p>"
    )
    return document(title, parts)


def document(title: str, parts: Sequence[str], allowed: str = "") -> str:
    """A whole document.

    Args:
        title: of the window.
        parts: contents, as HTML.
        allowed: further directives of the content security policy.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    more = f"; {allowed}" if allowed else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the policy keeps the page from loading anything; the empty icon keeps browsers from asking for one
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'{more}\">"
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>\n{style}</style></head>'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def subtitle(stats: EplbStats | None, simulation: Simulation | None = None) -> str:
    """A line with run, simulation and versions, as HTML."""
    parts = []
    if stats is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(stats.updated_at, 4e9)))
        parts.append(f"run as of {when}, version {stats.version or 'unknown'}, policy {stats.policy or '-'}")
    if simulation is not None:
        parts.append(f"simulation of {simulation.trace or 'a trace'}, version {simulation.version or 'unknown'}")
    return f'<p class="soft">{escape("; ".join(parts))}; page made by version {escape(__version__)}</p>'
