# SPDX-License-Identifier: Apache-2.0
"""The page: what it shows of a run and of a simulation, and its words."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import __version__
from ..files.map_recorder import RecordedMap
from ..observe.stats import CycleRecord, EplbStats, Par
from ..simulate.result import Outcome, Simulation
from ..values.placement import Placement
from .charts import Line, bar_chart, heat_map, line_chart

MAX_TABLE_ROWS = 64
_RESULT_STYLE = {"done": "s0", "skipped": "s2", "failed": "s1"}


def make_page(
    stats: EplbStats | None,
    simulation: Simulation | None,
    title: str = "Expert load balancing",
    recorded: RecordedMap | None = None,
) -> str:
    """The whole page.

    Args:
        stats: of a run, or None. simulation, recorded: or None. At least one of them.
        title: heading of the page.
        recorded: the map that a run left, with the load behind it.
    """
    parts = [f"<h1>{_text(title)}</h1>", subtitle(stats, simulation)]
    if stats is not None:
        parts += run_parts(stats)
    if recorded is not None:
        parts += _recorded(recorded)
    if simulation is not None:
        parts += _simulation(simulation)
    parts.append(
        '<p class="soft">PAR: peak-to-average ratio of the ranks&rsquo; load in a layer. 1.00 is perfect; a layer '
        "takes PAR times as long as it needs to. A replica is a copy of an expert.</p>"
    )
    return document(title, parts)


def document(title: str, parts: Sequence[str], allowed: str = "") -> str:
    """A whole document.

    Args:
        title: of the window.
        parts: its contents, as HTML.
        allowed: what it may do beyond showing itself, as directives of a content security policy.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    more = f"; {allowed}" if allowed else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the page must load nothing, whatever stands in it; the icon is there so that browsers do not ask for one
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'{more}\">"
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>\n{style}</style></head>'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def subtitle(stats: EplbStats | None, simulation: Simulation | None = None) -> str:
    """A line that says of what the page is, as HTML."""
    parts = []
    if stats is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(stats.updated_at, 4e9)))
        parts.append(f"run as of {when}, version {stats.version or 'unknown'}, policy {stats.policy or '-'}")
    if simulation is not None:
        parts.append(f"simulation of {simulation.trace or 'a trace'}, version {simulation.version or 'unknown'}")
    return f'<p class="soft">{_text("; ".join(parts))}; page made by version {_text(__version__)}</p>'


# --- a run -----------------------------------------------------------------------------------------------------------


def run_parts(stats: EplbStats) -> list[str]:
    """What is shown of a run, as pieces of HTML."""
    parts = ["<h2>The run</h2>"]
    if stats.phase == "off":
        parts.append(f'<p class="note">Balancing was switched off: {_text(stats.off_reason or "no reason given")}</p>')
    if stats.mode == "observe":
        parts.append('<p class="note">Mode observe: load was counted and plans were made; no expert was moved.</p>')
        parts += _would_bring(stats)
    window = stats.window
    cards = []
    observing = stats.mode == "observe"
    if window is not None:
        cards.append(_card(f"{window.par.mean:.3f}", f"PAR in the last window (worst layer {window.par.worst:.2f})"))
        if not observing:
            had = f"PAR with the start placement (worst layer {window.par_start.worst:.2f})"
            cards.append(_card(f"{window.par_start.mean:.3f}", had))
    cards += [
        _card(f"{stats.cycles_done}", f"cycles done; {stats.cycles_skipped} skipped, {stats.cycles_failed} failed"),
        _card(f"{stats.experts_moved:,}", f"experts moved in {stats.step:,} steps"),
        _card(_ms(stats.longest_step_seconds), "longest time that balancing added to one step"),
    ]
    parts.append(f'<div class="cards">{"".join(cards)}</div>')
    figures = []
    cycles = stats.cycles
    if any(cycle.par for cycle in cycles):
        figures.append(_run_par(cycles))
    if cycles:
        figures.append(
            _figure(
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
    if window is not None and _is_table(window.rank_load_observed) and _is_table(window.rank_load):
        figures += _rank_pair(
            ("Rank load, as measured", window.rank_load),
            ("Rank load, with the plan of the window before", window.rank_load_observed),
        )
    elif window is not None and _is_table(window.rank_load_start) and _is_table(window.rank_load):
        figures += _rank_pair(
            ("Rank load, with the start placement", window.rank_load_start),
            ("Rank load, with the placement in force", window.rank_load),
        )
    if any(cycle.planner_seconds for cycle in cycles):
        figures.append(
            _figure(
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
        rows = [_cycle_row(cycle) for cycle in cycles[-MAX_TABLE_ROWS:]]
        head = ("cycle", "steps", "result", "PAR before", "predicted", "realised", "moved", "reason")
        parts.append(_table(head, rows, words={7}))
    return parts


def _would_bring(stats: EplbStats) -> list[str]:
    """What balancing would bring here, judged by windows that the plans had not seen."""
    judged = [(c.par_realised, c.par_observed, c.moves_planned) for c in stats.cycles]
    pairs = [(was.mean, would.mean, moves) for was, would, moves in judged if was is not None and would is not None]
    if not pairs:
        return ['<p class="note">No plan has been measured yet: a measurement takes two windows with load.</p>']
    was, would, moves = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    saved = 1.0 - would / was if was > 0 else 0.0
    cards = [
        _card(f"{would:.3f}", f"PAR, mean of layers, with each plan in the window after it; {was:.3f} as it was"),
        _card(f"{saved:.1%}", "of the experts' time would be saved, if it follows the busiest rank"),
        _card(f"{moves:,.0f}", f"moves from the placement in force, mean of {len(pairs)} plans"),
    ]
    return [f'<div class="cards">{"".join(cards)}</div>']


def _run_par(cycles: Sequence[CycleRecord]) -> str:
    lines = [
        Line("in the window", "s0", [_mean(c.par) for c in cycles]),
        Line("start placement", "s1", [_mean(c.par_start) if c.par_start != c.par else None for c in cycles]),
        Line("as the plan predicted", "s2", [_mean(c.par_predicted) for c in cycles]),
        Line("with the plan of the window before", "s3", [None, *(_mean(c.par_observed) for c in cycles[:-1])]),
    ]
    lines = [line for line in lines if any(value is not None for value in line.values)]
    return _figure("PAR over time", "mean of layers", line_chart(lines, "cycle", "PAR", [c.cycle for c in cycles]))


def _stalls(stats: EplbStats) -> str:
    rows = [
        ("agreement of the ranks", _ms(stats.control_wait_seconds), _ms(stats.control_wait_longest_seconds)),
        ("transfers", _ms(stats.transfer_wait_seconds), "-"),
        ("commits", _ms(stats.commit_seconds), _ms(stats.commit_longest_seconds)),
        ("all, in one step", "-", _ms(stats.longest_step_seconds)),
    ]
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "<tr><th>steps waited for</th><th>in total</th><th>longest in one step</th></tr>"
    return _figure("Stalls", f"over {stats.step:,} steps, on EP rank 0", f"<table>{head}{body}</table>")


def _ranks(stats: EplbStats) -> str:
    head = ("rank", "node", "load", "worst layer", "waited for agreement", "transfers", "commits", "longest step")
    rows = [
        (
            str(each.rank),
            str(each.node),
            f"{each.load:.3f}",
            f"{each.worst:.3f}",
            _ms(each.control_wait_seconds),
            _ms(each.transfer_wait_seconds),
            _ms(each.commit_seconds),
            _ms(each.longest_step_seconds),
        )
        for each in stats.ranks[:MAX_TABLE_ROWS]
    ]
    return _table(head, rows)


def _cycle_row(cycle: CycleRecord) -> tuple[str, ...]:
    return (
        str(cycle.cycle),
        f"{cycle.step}-{cycle.end_step}",
        cycle.result,
        _par(cycle.par),
        _par(cycle.par_predicted),
        _par(cycle.par_realised),
        f"{cycle.moved:,}",
        cycle.reason,
    )


# --- a recorded map --------------------------------------------------------------------------------------------------


def _recorded(recorded: RecordedMap) -> list[str]:
    placement, load = recorded.placement, recorded.load
    redundant = placement.num_slots - placement.num_experts
    parts = [
        "<h2>The recorded map</h2>",
        f"<p>{placement.num_layers} MoE layers of {placement.num_experts} experts on {placement.num_ranks} ranks, "
        f"{redundant} redundant experts per layer.</p>",
    ]
    figures = []
    if load is not None:
        start = Placement.initial(placement.num_layers, placement.num_experts, placement.num_ranks, redundant)
        held = Line("this placement", "s0", [float(placement.par(window).mean()) for window in load])
        plain = Line("vLLM's start placement", "s1", [float(start.par(window).mean()) for window in load])
        total = load.sum(axis=0)
        relative = total / np.maximum(total.mean(axis=1, keepdims=True), 1e-30)
        figures += [
            _figure(
                "PAR over recorded windows",
                "mean of layers, each placement in all windows",
                line_chart([plain, held], "window", "PAR"),
            ),
            _figure(
                "Load per layer and expert",
                f"{len(load)} windows, divided by the layer's mean",
                heat_map(relative, "layers", "experts", "load / mean", low=0.0),
            ),
        ]
    else:
        parts.append('<p class="note">There is no load of this map beside it, so the page shows only the copies.</p>')
    if redundant:
        copies = heat_map(placement.replica_count, "layers", "experts", "copies", low=0.0)
        figures.append(_figure("Replicas per expert", "in this placement", copies))
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    return parts


# --- a simulation ----------------------------------------------------------------------------------------------------


def _simulation(sim: Simulation) -> list[str]:
    parts = [
        "<h2>The simulation</h2>",
        f"<p>{sim.num_windows} windows of {sim.window_steps:,} steps, {sim.num_layers} MoE layers of {sim.num_experts} "
        f"experts, {sim.num_ranks} ranks, {sim.num_ranks // sim.num_nodes} on each node. Cost model: "
        f"{_text(sim.machine)}; {_text(sim.model)}, {_bytes(sim.expert_bytes)} per expert, {sim.batch:g} tokens per "
        f"rank and step.</p>",
    ]
    if sim.interrupted:
        parts.append('<p class="note">The simulation was interrupted: not all settings were tried.</p>')
    best = sim.best
    figures = []
    if best is not None:
        parts.append(_best_cards(sim, best))
        figures += _simulated_par(sim, best)
        if best.total_moves:
            figures.append(
                _figure(
                    "Experts moved after each window",
                    f"best setting; {best.total_moves:,} in total, {_bytes(best.bytes_moved)}",
                    bar_chart([float(x) for x in best.moves], "window", "experts"),
                )
            )
        figures.append(_net_bars(sim))
    if _is_table(sim.expert_load):
        figures.append(
            _figure(
                "Load per layer and expert",
                "whole trace, divided by the layer's mean",
                heat_map(sim.expert_load, "layers", "experts", "load / mean", low=0.0),
            )
        )
    if best is not None and best.redundant and _is_table(sim.replicas):
        figures.append(
            _figure(
                "Replicas per expert",
                "best setting, at the end of the trace",
                heat_map(sim.replicas, "layers", "experts", "copies", low=0.0),
            )
        )
    if _is_table(sim.rank_load_before) and _is_table(sim.rank_load_after):
        figures += _rank_pair(
            ("Rank load, with the start placement", sim.rank_load_before),
            ("Rank load, with the best setting", sim.rank_load_after),
        )
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    if sim.outcomes:
        parts.append(_outcomes(sim))
    config = sim.eplb_config()
    if config is not None and best is not None and best.net_seconds > 0:
        command = "--additional-config '" + json.dumps({"eplb_config": config}) + "'"
        parts.append(f"<p>The best setting, as an argument of the server:</p><pre>{_text(command)}</pre>")
    parts.append(
        f'<p class="soft">A model, not a measurement: times are those of the MoE layers. Rates: '
        f"{_text(sim.machine_source)}. Net: steps wait for {sim.exposed:.0%} of the transfer time, although transfers "
        f"overlap with steps. Settings within 1 % of the largest gain count as equal; the best one of them moves the "
        f"fewest bytes. In names of settings, +n means n redundant experts per layer.</p>"
    )
    return parts


def _best_cards(sim: Simulation, best: Outcome) -> str:
    total = sim.baseline_step_seconds * sim.num_windows * sim.window_steps
    before = f"; {np.mean(sim.baseline_par_mean):.3f} with the start placement" if sim.baseline_par_mean else ""
    cards = [
        _card(best.policy, best.setting.describe()),
        _card(f"{best.mean_par:.3f}", f"PAR, mean of layers and windows{before}"),
        _card(
            _ms(best.step_seconds),
            f"MoE layers per step; {_ms(sim.baseline_step_seconds)} with the start placement and no redundancy",
        ),
        _card(f"{best.net_seconds / total:+.1%}" if total else "-", "of the MoE time saved, net of transfers"),
        _card(_bytes(best.bytes_moved), f"moved in {best.cycles} cycles; {best.skipped} skipped"),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _simulated_par(sim: Simulation, best: Outcome) -> list[str]:
    """PAR by window of the best setting, of the best of the other policies and without anything."""
    shown = []
    styles = {"default": "s3", "incremental": "s4", "random": "s2"}
    for policy, style in styles.items():
        outcome = next((o for o in sim.outcomes if o.policy == policy), None)
        if outcome is not None and policy != best.policy:
            shown.append((outcome, outcome.setting.describe(), style))
    shown.append((best, "best: " + best.setting.describe(), "s0"))  # last, so that it is drawn on top
    mean = [Line(label, style, outcome.par_mean) for outcome, label, style in shown]
    worst = [Line(label, style, outcome.par_worst) for outcome, label, style in shown]
    if len(sim.baseline_par_mean) == len(sim.baseline_par_worst) == sim.num_windows:
        mean.insert(0, Line("start placement, no redundancy", "s1", sim.baseline_par_mean))
        worst.insert(0, Line("start placement, no redundancy", "s1", sim.baseline_par_worst))
    return [
        _figure("PAR over time", "mean of layers", line_chart(mean, "window", "PAR")),
        _figure("PAR of the worst layer", "over time", line_chart(worst, "window", "PAR")),
    ]


def _net_bars(sim: Simulation) -> str:
    total = sim.baseline_step_seconds * sim.num_windows * sim.window_steps
    values = [max(0.0, 100.0 * outcome.net_seconds / total) if total else 0.0 for outcome in sim.outcomes]
    styles = ["s0" if outcome is sim.best else "s2" for outcome in sim.outcomes]
    chart = bar_chart(values, "setting", "% saved", list(range(1, len(values) + 1)), styles)
    return _figure("Net saving by setting", "numbers as in the table below; no bar for settings that cost time", chart)


def _outcomes(sim: Simulation) -> str:
    total = sim.baseline_step_seconds * sim.num_windows * sim.window_steps
    head = (
        "",
        "setting",
        "PAR",
        "worst",
        "cycles",
        "moved",
        "between nodes",
        "MoE/step",
        "saved",
        "transfers",
        "net",
        "%",
    )
    rows: list[tuple[str, ...]] = []
    marked = set()
    for number, o in enumerate(sim.outcomes[:MAX_TABLE_ROWS], 1):
        if o is sim.best:
            marked.add(len(rows))
        rows.append(
            (
                str(number),
                o.setting.describe(),
                f"{o.mean_par:.3f}",
                f"{max(o.par_worst, default=1.0):.2f}",
                str(o.cycles),
                _bytes(o.bytes_moved),
                _bytes(o.bytes_between_nodes),
                _ms(o.step_seconds),
                _seconds(o.saved_seconds),
                _seconds(o.receive_seconds + o.commit_seconds),
                _seconds(o.net_seconds),
                f"{100 * o.net_seconds / total:.1f}" if total else "-",
            )
        )
    return _table(head, rows, words={1}, marked=marked)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _rank_pair(*tables: tuple[str, Sequence[Sequence[float]]]) -> list[str]:
    """Heat maps, with their titles, on one scale."""
    values = np.concatenate([np.ravel(np.asarray(table)) for _, table in tables])
    low, high = float(values.min()), float(values.max())
    return [
        _figure(
            title,
            "divided by the layer's mean, last window",
            heat_map(table, "layers", "ranks", "load / mean", diverging=True, low=low, high=high),
        )
        for title, table in tables
    ]


def _is_table(table: Sequence[Sequence[float]]) -> bool:
    return bool(table) and bool(table[0]) and all(len(row) == len(table[0]) for row in table)


def _figure(title: str, remark: str, content: str) -> str:
    return f"<figure><figcaption>{_text(title)}<small>{_text(remark)}</small></figcaption>{content}</figure>"


def _card(value: str, text: str) -> str:
    return f'<div class="card"><b>{_text(value)}</b><span>{_text(text)}</span></div>'


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: set[int] | None = None, marked: set[int] | None = None
) -> str:
    wordy = words or set()
    top = "".join(f"<th{' class=words' if i in wordy else ''}>{_text(cell)}</th>" for i, cell in enumerate(head))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td{' class=words' if i in wordy else ''}>{_text(cell)}</td>" for i, cell in enumerate(row))
        body.append(f"<tr{' class=best' if marked and number in marked else ''}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _mean(par: Par | None) -> float | None:
    return par.mean if par is not None else None


def _par(par: Par | None) -> str:
    return f"{par.mean:.3f} ({par.worst:.2f})" if par is not None else "-"


def _ms(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-4 or seconds == 0 else f"{1e6 * seconds:.1f} µs"


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if abs(seconds) >= 600 else f"{seconds:.1f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
