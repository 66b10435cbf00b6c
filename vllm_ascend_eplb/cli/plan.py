# SPDX-License-Identifier: Apache-2.0
"""``plan``: makes an expert map from a recorded load, offline."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..files.disk import check_place
from ..files.expert_map import read_expert_map, write_expert_map
from ..files.traces import read_trace
from ..observe.stats import Par
from ..planning import plan as make_plan
from ..values.defaults import EFFORT, TARGET_PAR
from ..values.placement import Placement
from .maps import Form
from .output import CommandError, JsonOption, console, print_json, show_numbers, table, user_errors, warn


class Policy(str, Enum):
    INCREMENTAL = "incremental"
    DEFAULT = "default"


class Effort(str, Enum):
    FAST = "fast"
    THOROUGH = "thorough"


DEFAULT_EFFORT = Effort(EFFORT)


def plan(
    load: Annotated[Path, typer.Argument(metavar="LOAD", help="Loads: .npz, .npy or JSON; see the guide.")],
    ranks: Annotated[int, typer.Option(min=1, help="Expert-parallel size.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Map file to write.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; each has the same number of ranks.")] = 1,
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts per layer.")] = 0,
    groups: Annotated[int, typer.Option(min=1, help="Expert groups of the model (DeepSeek-V3: 8).")] = 1,
    policy: Annotated[Policy, typer.Option(help="Policy that plans.")] = Policy.INCREMENTAL,
    start: Annotated[Path | None, typer.Option(help="Map to start from; default: vLLM's start placement.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Use only that many windows, the last ones.")] = None,
    target_par: Annotated[
        float, typer.Option(min=1.0, max=10.0, help="PAR at which a layer is good enough.")
    ] = TARGET_PAR,
    effort: Annotated[Effort, typer.Option(help="Search effort; thorough finds fewer moves.")] = DEFAULT_EFFORT,
    form: Annotated[Form | None, typer.Option(help="Form of the map; default: by the ending of the file.")] = None,
    dense_layers: Annotated[int, typer.Option(min=0, help="Leading rows to add in SGLang's form.")] = 0,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Keep layers without load in the map, as they start.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan a placement for a recorded load, and write it as a map file."""
    with user_errors(as_json):
        if output is not None:
            check_place(output)
        trace = read_trace(load)
        total = trace.load[-(last or 0) :].sum(axis=0)
        count = trace.file_layers if all_layers else trace.num_layers
        if start is None:
            whole = Placement.initial(count, trace.num_experts, ranks, redundant)
        else:
            whole = read_expert_map(
                start,
                num_experts=trace.num_experts,
                num_ranks=ranks,
                allow_duplicates=True,
            )
            if whole.num_layers not in (count, trace.file_layers):
                raise CommandError(
                    f"{start} has {whole.num_layers} MoE layers, {load} has {trace.num_layers} with load of "
                    f"{trace.file_layers}; give a map and loads of the same model"
                )
            if whole.num_slots != trace.num_experts + redundant:
                raise CommandError(
                    f"{start} has {whole.num_slots - trace.num_experts} redundant experts, --redundant is "
                    f"{redundant}; give the same number"
                )
        before = trace.of_layers_with_load(whole)
        if policy is Policy.INCREMENTAL:
            made = make_plan(
                total, before, ranks, nodes, groups, target_par=target_par, effort=effort.value, time_budget=2.0
            )
        else:
            made = make_plan(total, before, ranks, nodes, groups, policy.value)
        after = Placement(made.physical_to_logical, trace.num_experts, ranks)
        if output is not None:
            made_map, numbers = after, [dense_layers + number for number in trace.layers]
            if whole.num_layers != after.num_layers:
                made_map = _within(whole, after, trace.layers)
                numbers = [dense_layers + number for number in range(whole.num_layers)]
            write_expert_map(output, made_map, form.value if form else None, layers=numbers)
    old, new = Par.of(before.par(total)), Par.of(after.par(total))
    if as_json:
        print_json(
            {
                "load": str(load),
                "windows": len(trace.load) if last is None else min(last, len(trace.load)),
                "layers": trace.num_layers,
                "layers_without_load": trace.skipped_layers,
                "numbers_without_load": list(trace.skipped),
                "warnings": list(trace.remarks),
                "experts": trace.num_experts,
                "ranks": ranks,
                "redundant": redundant,
                "policy": policy.value,
                "par_before": old.model_dump(),
                "par_after": new.model_dump(),
                "moves": made.num_moves,
                "seconds": round(made.seconds, 4),
                "output": str(output) if output else None,
            }
        )
        return
    rows = table("placement", "PAR, mean of layers", "worst layer", "copies to move")
    rows.add_row("before", f"{old.mean:.3f}", f"{old.worst:.3f}", "")
    rows.add_row("planned", f"{new.mean:.3f}", f"{new.worst:.3f}", str(made.num_moves))
    out = console()
    out.print(rows)
    warn(trace.remarks)
    if trace.skipped:
        kept = "stay as they start" if whole.num_layers != after.num_layers else "are left out"
        out.print(f"layers without load in {load} {kept}: {show_numbers(trace.skipped)}", markup=False)
    out.print(f"{policy.value}, planned in {made.seconds:.2f} s", markup=False)
    out.print(f"written: {output}" if output else "nothing written; give -o FILE to keep the map", markup=False)


def _within(whole: Placement, planned: Placement, layers: Sequence[int]) -> Placement:
    """The placement ``whole`` with ``planned`` in the layers ``layers``."""
    slots = whole.physical_to_logical.copy()
    slots[list(layers)] = planned.physical_to_logical
    return Placement(slots, whole.num_experts, whole.num_ranks)
