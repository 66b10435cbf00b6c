# SPDX-License-Identifier: Apache-2.0
"""The output of a demo while it runs: a live panel in a terminal, otherwise plain lines. And the times of its parts."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_ascend_eplb.observe.stats import CycleRecord, EplbStats, Par, Window

BAR_WIDTH = 24
BAR_FULL = 1.6
"""Rank load over the mean at which a bar is full."""


class View:
    """Shows the progress. Use it as a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._began = time.monotonic()
        self._shown_cycle = 0
        self._last_sample = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the live panel."""
        self.console.print(f"[{time.monotonic() - self._began:5.0f} s] {text}", markup=False, highlight=False)

    def waiting(self, text: str) -> None:
        if self._live is not None:
            self._live.update(Text(text, style="dim"), refresh=True)

    def update(self, domain: str, stats: EplbStats | None, text: str) -> None:
        for record in stats.cycles if stats else ():
            if record.cycle > self._shown_cycle:
                self._shown_cycle = record.cycle
                self.say(describe_cycle(record))
        if self._live is not None:
            self._live.update(_panel(domain, stats, text), refresh=True)
        elif text.strip() and time.monotonic() - self._last_sample > 20.0:
            self._last_sample = time.monotonic()
            self.say(f"text: {_one_line(text, 90)}")


class Clock:
    """Wall times of the parts."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        return time.monotonic() - self._began


def describe_cycle(record: CycleRecord) -> str:
    """One line about a cycle."""
    what = f"{record.moved} experts moved" if record.result == "done" else record.reason or record.result
    planned = f", planned in {record.planner_seconds * 1000:.0f} ms" if record.planner_seconds else ""
    return (
        f"cycle {record.cycle} (step {record.end_step}): {record.result}, {what}; PAR {show_par(record.par)}, "
        f"predicted {show_par(record.par_predicted)}{planned}"
    )


def show_par(par: Par | None) -> str:
    return f"{par.mean:.3f} (worst layer {par.worst:.3f})" if par else "-"


def _panel(domain: str, stats: EplbStats | None, text: str) -> Panel:
    parts: list[Table | Text] = []
    if stats is None:
        parts.append(Text("the balancer has not reported yet"))
    else:
        facts = Table.grid(padding=(0, 3))
        window = stats.window
        facts.add_row("PAR now", show_par(window.par if window else None), "phase", stats.phase)
        facts.add_row(
            "with the start placement", show_par(window.par_start if window else None), "step", str(stats.step)
        )
        facts.add_row(
            "cycles done / skipped / failed",
            f"{stats.cycles_done} / {stats.cycles_skipped} / {stats.cycles_failed}",
            "experts moved",
            str(stats.experts_moved),
        )
        parts.append(facts)
        if window is not None and window.rank_load:
            parts.append(_bars(window))
        parts.append(Text("PAR by window  " + "  ".join(f"{r.par.mean:.2f}" for r in stats.cycles[-12:] if r.par)))
    parts.append(Text(_one_line(text, 110), style="italic"))
    return Panel(Group(*parts), title=f"traffic: {domain}", title_align="left")


def _bars(window: Window) -> Table:
    """Load of each rank in the layer that would be worst with the start placement."""
    layer = max(range(len(window.rank_load_start)), key=lambda number: max(window.rank_load_start[number]))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column(f"layer {layer}")
    table.add_column("rank load / mean, now")
    table.add_column("with the start placement")
    for rank, (now, start) in enumerate(zip(window.rank_load[layer], window.rank_load_start[layer], strict=True)):
        table.add_row(f"rank {rank}", _bar(now), _bar(start))
    return table


def _bar(load: float) -> Text:
    filled = min(BAR_WIDTH, round(load / BAR_FULL * BAR_WIDTH))
    style = "red" if load > 1.15 else "yellow" if load > 1.05 else "green"
    return Text.assemble(("█" * filled, style), ("·" * (BAR_WIDTH - filled), "dim"), f" {load:.2f}")


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[-width:]
