# SPDX-License-Identifier: Apache-2.0
"""The part of the page about a recorded map and the load behind it."""

from __future__ import annotations

import numpy as np

from ..files.map_recorder import RecordedMap
from ..values.placement import Placement
from .charts import Line, heat_map, line_chart
from .pieces import figure


def recorded_parts(recorded: RecordedMap) -> list[str]:
    """The part about a recorded map, as pieces of HTML."""
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
            figure(
                "PAR over recorded windows",
                "mean of layers, each placement in all windows",
                line_chart([plain, held], "window", "PAR"),
            ),
            figure(
                "Load per layer and expert",
                f"{len(load)} windows, divided by the layer's mean",
                heat_map(relative, "layers", "experts", "load / mean", low=0.0),
            ),
        ]
    else:
        parts.append('<p class="note">There is no load of this map beside it, so the page shows only the copies.</p>')
    if redundant:
        copies = heat_map(placement.replica_count, "layers", "experts", "copies", low=0.0)
        figures.append(figure("Replicas per expert", "in this placement", copies))
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    return parts
