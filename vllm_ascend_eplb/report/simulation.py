# SPDX-License-Identifier: Apache-2.0
"""The part of the page about a simulation: the best setting, all settings, the load."""

from __future__ import annotations

import json

import numpy as np

from ..simulate.result import Outcome, Simulation
from .charts import Line, bar_chart, heat_map, line_chart
from .pieces import MAX_TABLE_ROWS, card, escape, figure, is_table, rank_pair, show_bytes, show_ms, show_seconds, table


def simulation_parts(sim: Simulation) -> list[str]:
    """The part about a simulation, as pieces of HTML."""
    parts = [
        "<h2>The simulation</h2>",
        f"<p>{sim.num_windows} windows of {sim.window_steps:,} steps, {sim.num_layers} MoE layers of {sim.num_experts} "
        f"experts, {sim.num_ranks} ranks, {sim.num_ranks // sim.num_nodes} on each node. Cost model: "
        f"{escape(sim.machine)}; {escape(sim.model)}, {show_bytes(sim.expert_bytes)} per expert, {sim.batch:g} tokens "
        f"per rank and step.</p>",
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
                figure(
                    "Experts moved after each window",
                    f"best setting; {best.total_moves:,} in total, {show_bytes(best.bytes_moved)}",
                    bar_chart([float(x) for x in best.moves], "window", "experts"),
                )
            )
        figures.append(_net_bars(sim))
    if is_table(sim.expert_load):
        figures.append(
            figure(
                "Load per layer and expert",
                "whole trace, divided by the layer's mean",
                heat_map(sim.expert_load, "layers", "experts", "load / mean", low=0.0),
            )
        )
    if best is not None and best.redundant and is_table(sim.replicas):
        figures.append(
            figure(
                "Replicas per expert",
                "best setting, at the end of the trace",
                heat_map(sim.replicas, "layers", "experts", "copies", low=0.0),
            )
        )
    if is_table(sim.rank_load_before) and is_table(sim.rank_load_after):
        figures += rank_pair(
            ("Rank load, with the start placement", sim.rank_load_before),
            ("Rank load, with the best setting", sim.rank_load_after),
        )
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    if sim.outcomes:
        parts.append(_outcomes(sim))
    config = sim.eplb_config()
    if config is not None and best is not None and best.net_seconds > 0:
        command = "--additional-config '" + json.dumps({"eplb_config": config}) + "'"
        parts.append(f"<p>The best setting, as an argument of the server:</p><pre>{escape(command)}</pre>")
    parts.append(
        f'<p class="soft">A model, not a measurement: times are those of the MoE layers. Rates: '
        f"{escape(sim.machine_source)}. Net: steps wait for {sim.exposed:.0%} of the transfer time, although transfers "
        f"overlap with steps. Settings within 1 % of the largest gain count as equal; the best one of them moves the "
        f"fewest bytes. In names of settings, +n means n redundant experts per layer.</p>"
    )
    return parts


def _best_cards(sim: Simulation, best: Outcome) -> str:
    total = sim.baseline_step_seconds * sim.num_windows * sim.window_steps
    before = f"; {np.mean(sim.baseline_par_mean):.3f} with the start placement" if sim.baseline_par_mean else ""
    cards = [
        card(best.policy, best.setting.describe()),
        card(f"{best.mean_par:.3f}", f"PAR, mean of layers and windows{before}"),
        card(
            show_ms(best.step_seconds),
            f"MoE layers per step; {show_ms(sim.baseline_step_seconds)} with the start placement and no redundancy",
        ),
        card(f"{best.net_seconds / total:+.1%}" if total else "-", "of the MoE time saved, net of transfers"),
        card(show_bytes(best.bytes_moved), f"moved in {best.cycles} cycles; {best.skipped} skipped"),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _simulated_par(sim: Simulation, best: Outcome) -> list[str]:
    """PAR by window of the best setting, of the best of each other policy, and without balancing."""
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
        figure("PAR over time", "mean of layers", line_chart(mean, "window", "PAR")),
        figure("PAR of the worst layer", "over time", line_chart(worst, "window", "PAR")),
    ]


def _net_bars(sim: Simulation) -> str:
    total = sim.baseline_step_seconds * sim.num_windows * sim.window_steps
    values = [max(0.0, 100.0 * outcome.net_seconds / total) if total else 0.0 for outcome in sim.outcomes]
    styles = ["s0" if outcome is sim.best else "s2" for outcome in sim.outcomes]
    chart = bar_chart(values, "setting", "% saved", list(range(1, len(values) + 1)), styles)
    return figure("Net saving by setting", "numbers as in the table below; no bar for settings that cost time", chart)


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
                show_bytes(o.bytes_moved),
                show_bytes(o.bytes_between_nodes),
                show_ms(o.step_seconds),
                show_seconds(o.saved_seconds),
                show_seconds(o.receive_seconds + o.commit_seconds),
                show_seconds(o.net_seconds),
                f"{100 * o.net_seconds / total:.1f}" if total else "-",
            )
        )
    return table(head, rows, words={1}, marked=marked)
