# SPDX-License-Identifier: Apache-2.0
"""The part of the page about a run: load, cycles, waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..observe.stats import CycleRecord, EplbStats
from .charts import Line, bar_chart, line_chart
from .pieces import (
    MAX_TABLE_ROWS,
    card,
    escape,
    figure,
    is_table,
    mean_of,
    rank_pair,
    show_ms,
    show_par,
    show_seconds,
    table,
)

_RESULT_STYLE = {"done": "s0", "skipped": "s2", "failed": "s1"}


def run_parts(stats: EplbStats) -> list[str]:
    """The part about a run, as pieces of HTML."""
    parts = ["<h2>The run</h2>"]
    if stats.phase == "off":
        parts.append(f'<p class="note">Balancing was switched off: {escape(stats.off_reason or "no reason given")}</p>')
    if stats.mode == "observe":
        parts.append('<p class="note">Mode observe: load was counted and plans were made; no expert was moved.</p>')
        parts += _would_bring(stats)
    window = stats.window
    cards = []
    observing = stats.mode == "observe"
    if window is not None:
        cards.append(card(f"{window.par.mean:.3f}", f"PAR in the last window (worst layer {window.par.worst:.2f})"))
        if not observing:
            had = f"PAR with the start placement (worst layer {window.par_start.worst:.2f})"
            cards.append(card(f"{window.par_start.mean:.3f}", had))
    cards += _times(stats)
    cards += [
        card(f"{stats.cycles_done}", f"cycles done; {stats.cycles_skipped} skipped, {stats.cycles_failed} failed"),
        card(f"{stats.experts_moved:,}", f"experts moved in {stats.step:,} steps"),
        card(show_ms(stats.longest_step_seconds), "longest time that balancing added to one step"),
    ]
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    figures = []
    cycles = stats.cycles
    if any(cycle.par for cycle in cycles):
        figures.append(_run_par(cycles))
    if cycles:
        figures.append(
            figure(
                "Moves planned per cycle" if observing else "Experts moved per cycle",
                "red: failed" if observing else "grey: skipped, red: failed",
                bar_chart(
                    [float(cycle.moves_planned if observing else cycle.moved) for cycle in cycles],
                    "cycle",
                    "experts",
                    [cycle.cycle for cycle in cycles],
                    ["s1" if c.result == "failed" else "s0" for c in cycles]
                    if observing
                    else [_RESULT_STYLE[c.result] for c in cycles],
                ),
            )
        )
    if window is not None and is_table(window.rank_load_observed) and is_table(window.rank_load):
        figures += rank_pair(
            ("Rank load, as measured", window.rank_load),
            ("Rank load, with the plan of the window before", window.rank_load_observed),
        )
    elif window is not None and is_table(window.rank_load_start) and is_table(window.rank_load):
        figures += rank_pair(
            ("Rank load, with the start placement", window.rank_load_start),
            ("Rank load, with the placement in force", window.rank_load),
        )
    if any(cycle.planner_seconds for cycle in cycles):
        figures.append(
            figure(
                "Planning time per cycle",
                "in a child process, beside the steps",
                bar_chart([1e3 * c.planner_seconds for c in cycles], "cycle", "ms", [c.cycle for c in cycles]),
            )
        )
    figures.append(_stalls(stats))
    if window is None:
        parts.append('<p class="note">No collection window has ended yet, so there is no load to show.</p>')
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    if stats.ranks:
        parts.append(_ranks(stats))
    if cycles:
        shown = cycles[-MAX_TABLE_ROWS:]
        head = ["cycle", "steps", "result", "PAR before", "predicted", "realised", "moved", "reason"]
        rows = [_cycle_row(cycle) for cycle in shown]
        if any(cycle.p95_predicted is not None for cycle in shown):  # of plans made from several windows
            head[6:6] = ["95th percentile before", "predicted"]
            for row, cycle in zip(rows, shown, strict=True):
                row[6:6] = [show_par(cycle.p95_before), show_par(cycle.p95_predicted)]
        if any(cycle.saved_ms is not None for cycle in shown):
            head[-1:-1] = ["ms saved per step"]
            for row, cycle in zip(rows, shown, strict=True):
                row[-1:-1] = ["-" if cycle.saved_ms is None else f"{cycle.saved_ms:.3f}"]
        parts.append(table(head, rows, words={len(head) - 1}))
    return parts


def _would_bring(stats: EplbStats) -> list[str]:
    """Cards with the gain that balancing would bring, measured on windows that the plans had not seen."""
    judged = [(c.par_realised, c.par_observed, c.moves_planned) for c in stats.cycles]
    pairs = [(was.mean, would.mean, moves) for was, would, moves in judged if was is not None and would is not None]
    if not pairs:
        return ['<p class="note">No plan has been measured yet: a measurement takes two windows with load.</p>']
    was, would, moves = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    saved, how = (
        (1.0 - would / was if was > 0 else 0.0),
        "of the experts' time would be saved, if it follows the busiest rank",
    )
    times = [(c.moe_ms_realised, c.moe_ms_observed) for c in stats.cycles]
    timed = [(ms, would_ms) for ms, would_ms in times if ms and would_ms is not None]
    if timed:
        ms, would_ms = (float(np.mean(column)) for column in zip(*timed, strict=True))
        saved, how = 1.0 - would_ms / ms, f"of MoE time would be saved: {ms - would_ms:.3f} of {ms:.3f} ms in each step"
    cards = [
        card(f"{would:.3f}", f"PAR, mean of layers, with each plan in the window after it; {was:.3f} as it was"),
        card(f"{saved:.1%}", how),
        card(f"{moves:,.0f}", f"moves from the placement in force, mean of {len(pairs)} plans"),
    ]
    return [f'<div class="cards">{"".join(cards)}</div>']


def _times(stats: EplbStats) -> list[str]:
    """What balancing brings in time, where layers were timed."""
    cards = []
    if stats.moe_ms and stats.mode != "observe":
        start = f"MoE layers per step, predicted; {stats.moe_ms_start:.3f} ms with the start placement"
        cards.append(card(f"{stats.moe_ms:.3f} ms", start))
        cards.append(card(show_seconds(stats.moe_time_saved_seconds), "of MoE time saved so far, predicted"))
    if stats.step_ms and stats.mode != "observe":
        start = f"a whole step, measured; {stats.step_ms_start:.3f} ms with the start placement"
        cards.append(card(f"{stats.step_ms:.3f} ms", start))
        cards.append(card(show_seconds(stats.step_time_saved_seconds), "saved so far, measured"))
    return cards


def _run_par(cycles: Sequence[CycleRecord]) -> str:
    lines = [
        Line("in the window", "s0", [mean_of(c.par) for c in cycles]),
        Line("start placement", "s1", [mean_of(c.par_start) if c.par_start != c.par else None for c in cycles]),
        Line("as the plan predicted", "s2", [mean_of(c.par_predicted) for c in cycles]),
        Line("with the plan of the window before", "s3", [None, *(mean_of(c.par_observed) for c in cycles[:-1])]),
    ]
    lines = [line for line in lines if any(value is not None for value in line.values)]
    return figure("PAR over time", "mean of layers", line_chart(lines, "cycle", "PAR", [c.cycle for c in cycles]))


def _stalls(stats: EplbStats) -> str:
    rows = [
        ("agreement of the ranks", show_ms(stats.control_wait_seconds), show_ms(stats.control_wait_longest_seconds)),
        ("transfers", show_ms(stats.transfer_wait_seconds), "-"),
        ("commits", show_ms(stats.commit_seconds), show_ms(stats.commit_longest_seconds)),
        ("all, in one step", "-", show_ms(stats.longest_step_seconds)),
    ]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "<tr><th>steps waited for</th><th>in total</th><th>longest in one step</th></tr>"
    return figure("Stalls", f"over {stats.step:,} steps, on EP rank 0", f"<table>{head}{body}</table>")


def _ranks(stats: EplbStats) -> str:
    head = ("rank", "node", "load", "worst layer", "waited for agreement", "transfers", "commits", "longest step")
    rows = [
        (
            str(rank.rank),
            str(rank.node),
            f"{rank.load:.3f}",
            f"{rank.worst:.3f}",
            show_ms(rank.control_wait_seconds),
            show_ms(rank.transfer_wait_seconds),
            show_ms(rank.commit_seconds),
            show_ms(rank.longest_step_seconds),
        )
        for rank in stats.ranks[:MAX_TABLE_ROWS]
    ]
    return table(head, rows)


def _cycle_row(cycle: CycleRecord) -> list[str]:
    return [
        str(cycle.cycle),
        f"{cycle.step}-{cycle.end_step}",
        cycle.result,
        show_par(cycle.par),
        show_par(cycle.par_predicted),
        show_par(cycle.par_realised),
        f"{cycle.moved:,}",
        cycle.reason,
    ]
