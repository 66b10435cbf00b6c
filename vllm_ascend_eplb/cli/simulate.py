# SPDX-License-Identifier: Apache-2.0
"""``simulate``: replays a recorded trace with several policies and settings."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .. import __version__
from ..files.disk import check_place, write_atomic
from ..files.traces import Trace, read_trace
from ..settings.config import EplbConfig
from ..settings.fit import ModelShape, ServerShape, fit
from ..settings.messages import EplbConfigError
from ..simulate.cost import LINK_EFFICIENCY, MACHINES, CostModel, Machine, MoeShape, model_of_shape
from ..simulate.replay import grid, replays
from ..simulate.replay import simulate as run_simulation
from ..simulate.result import POLICY_CHOICES, Conditions, PolicyChoice, Simulation
from ..values.defaults import TARGET_PAR
from .output import (
    CommandError,
    JsonOption,
    console,
    print_json,
    show_bytes,
    show_numbers,
    show_seconds,
    table,
    user_errors,
    warn,
)

TABLES = {
    "outcomes",
    "baseline_par_mean",
    "baseline_par_worst",
    "expert_load",
    "rank_load_before",
    "rank_load_after",
    "replicas",
}
SERIES = {"par_mean", "par_worst", "moves", "baseline_par_mean", "baseline_par_worst"}
"""Fields that --json leaves out; a file written with -o has them."""


def simulate(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="Loads [windows, layers, experts]: .npz, .npy or JSON.")
    ],
    ranks: Annotated[int, typer.Option(min=2, help="Expert-parallel size.")],
    machine: Annotated[str, typer.Option(help=f"Cost model of: {', '.join(MACHINES)}.")] = "a3",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; default: by the machine.")] = None,
    policies: Annotated[str, typer.Option(help="Comma-separated policies: none, incremental, default, random.")] = (
        "none,incremental,default"
    ),
    intervals: Annotated[str, typer.Option(help="Comma-separated numbers of windows between two plans.")] = "1,2,4,8",
    redundant: Annotated[
        str | None, typer.Option(help="Comma-separated redundant experts per layer; default: RANKS.")
    ] = None,
    max_moves: Annotated[str, typer.Option(help="Comma-separated caps of moves per cycle; none: no cap.")] = "none",
    shares: Annotated[str, typer.Option(help="Dispatch by planned shares: off, on, or off,on.")] = "off",
    batch: Annotated[float, typer.Option(min=0.001, help="Tokens per rank and step.")] = 128.0,
    window_steps: Annotated[int, typer.Option(min=1, help="Forward steps in one window of the trace.")] = 600,
    delay_steps: Annotated[int, typer.Option(min=0, help="Steps from a window's end until its plan is in force.")] = 50,
    weight_bytes: Annotated[float, typer.Option(min=0.1, max=8.0, help="Bytes per weight: 1 int8, 2 bf16.")] = 1.0,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden size of the model, if its shape is not a known one.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the model's experts.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token of the model.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="Expert groups of the model (DeepSeek-V3: 8).")] = 1,
    link: Annotated[
        float | None, typer.Option(min=0.001, help="Rate within a node in GB/s; default: by the machine.")
    ] = None,
    link_between: Annotated[
        float | None, typer.Option(min=0.001, help="Rate between nodes in GB/s; default: by the machine.")
    ] = None,
    exposed: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Part of the transfer time that steps wait for; 1: all."),
    ] = 1.0,
    target_par: Annotated[
        float, typer.Option(min=1.0, max=10.0, help="PAR at which a layer is good enough.")
    ] = TARGET_PAR,
    min_gain: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least gain of a plan, as a part of the PAR.")
    ] = 0.01,
    threads: Annotated[int | None, typer.Option(min=1, help="Planning threads; default: all cores, at most 8.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the result (JSON), for `report`.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replay a recorded load with several policies and settings, and show which ones pay."""
    with user_errors(as_json):
        if output is not None:
            check_place(output)
        loaded = read_trace(trace)
        warn(loaded.remarks)
        preset = _machine(machine, link, link_between)
        cost = CostModel(
            preset, _shape(loaded, hidden, width, top_k), ranks, _nodes(nodes, ranks, preset), batch, weight_bytes
        )
        settings = grid(
            _policies(policies),
            _numbers(intervals, "--intervals", 1),
            [ranks] if redundant is None else _numbers(redundant, "--redundant", 0),
            [None if text == "none" else _number(text, "--max-moves", 0) for text in _split(max_moves)],
            [_switch(text) for text in _split(shares)],
        )
        conditions = Conditions(
            cost,
            window_steps,
            delay_steps,
            target_par,
            min_gain,
            "fast",
            groups,
            threads or min(8, os.cpu_count() or 1),
        )
        with progress(len(replays(settings)) * len(loaded.load), as_json) as tick:
            result = run_simulation(
                loaded.load,
                settings,
                conditions,
                exposed=exposed,
                trace=trace.name,
                version=__version__,
                progress=tick,
            )
        if output is not None:
            write_atomic(output, result.to_json().encode())
    if as_json:
        best = result.best
        print_json(
            {
                **result.model_dump(exclude=TABLES | SERIES),
                "outcomes": [
                    {**o.model_dump(exclude=SERIES), "par": round(o.mean_par, 4), "moves": o.total_moves}
                    for o in result.outcomes
                ],
                "best": best.setting.describe() if best else None,
                "eplb_config": result.eplb_config(),
                "refused": refusal(result) or None,
                "output": str(output) if output else None,
            }
        )
    else:
        show(result, console())
        if loaded.skipped:
            console().print(f"layers without load, left out: {show_numbers(loaded.skipped)}", markup=False)
        if output is not None:
            console().print(f"written: {output}; `vllm-ascend-eplb report {output}` draws it", markup=False)
    if result.interrupted:
        raise typer.Exit(130)


def show(result: Simulation, out: Console) -> None:
    """Prints the outcomes as text."""
    out.print(
        f"{result.trace}: {result.num_windows} windows of {result.num_layers} layers x {result.num_experts} experts, "
        f"{result.num_ranks} ranks on {result.num_nodes} node(s)\n{result.machine}; {result.model}, "
        f"{show_bytes(result.expert_bytes)} per expert, {result.batch:g} tokens per rank and step\n"
        f"rates: {result.machine_source}\n",
        markup=False,
    )
    rows = table("setting", "PAR", "worst", "cycles", "moved", "step", "saved", "transfers", "net", "%")
    total = result.baseline_step_seconds * result.num_windows * result.window_steps
    for outcome in result.outcomes:
        rows.add_row(
            outcome.setting.describe(),
            f"{outcome.mean_par:.3f}",
            f"{max(outcome.par_worst, default=1.0):.2f}",
            str(outcome.cycles),
            show_bytes(outcome.bytes_moved),
            show_seconds(outcome.step_seconds),
            show_seconds(outcome.saved_seconds),
            show_seconds(outcome.receive_seconds + outcome.commit_seconds),
            show_seconds(outcome.net_seconds),
            f"{100 * outcome.net_seconds / total:.1f}" if total else "-",
            style="bold green" if outcome is result.best else None,
        )
    out.print(rows)
    par = mean(result.baseline_par_mean or (1.0,))
    start = f"{show_seconds(result.baseline_step_seconds)} per step, PAR {par:.3f}"
    out.print(
        f"\nStep: an average step. Times are those of the MoE layers over the whole trace, against the start placement "
        f"without redundancy ({start}). Net: steps wait for {result.exposed:.0%} of the transfer time. These figures "
        f"are a model, not measurement; took {result.seconds:.1f} s.",
        markup=False,
    )
    best = result.best
    if result.interrupted:
        out.print("interrupted: not all settings were tried", style="yellow")
    if best is None:
        out.print("no setting was replayed to its end", style="yellow")
    elif all(outcome.policy == "none" for outcome in result.outcomes):
        out.print("no setting that balances was replayed to its end", style="yellow")
    elif best.net_seconds <= 0 or best.policy == "none":
        out.print(f"best: {best.setting.describe()}: balancing does not pay here", style="bold")
    else:
        out.print(f"best (fewest bytes within 1 % of the largest gain): {best.setting.describe()}", style="bold")
        out.print(f"  --additional-config '{{\"eplb_config\": {json.dumps(result.eplb_config())}}}'", markup=False)


def refusal(result: Simulation) -> str:
    """Why this version would refuse the best setting; empty if it would not."""
    try:
        config = EplbConfig.from_additional_config({"eplb_config": result.eplb_config() or {}})
        fit(config, ModelShape(result.num_experts), ServerShape(result.num_ranks))
    except EplbConfigError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    stderr = Console(stderr=True)
    if quiet or not stderr.is_terminal:  # a disabled bar of rich before 15 still prints an empty line
        yield lambda done, total: None
        return
    columns = (TextColumn("replaying"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("replaying", total=total)
        yield lambda done, _: bar.update(task, completed=done)


def _machine(name: str, link: float | None, link_between: float | None) -> Machine:
    if name not in MACHINES:
        raise CommandError(f"--machine {name}: allowed are {', '.join(MACHINES)}; --link changes a rate")
    machine = MACHINES[name]
    if link is not None:  # a given rate is a measured one, so the efficiency is divided out
        machine = replace(machine, link=link * 1e9 / LINK_EFFICIENCY, source=f"{machine.source}; link as given")
    if link_between is not None:
        machine = replace(
            machine,
            link_between=link_between * 1e9 / LINK_EFFICIENCY,
            source=f"{machine.source}; link between as given",
        )
    return machine


def _shape(trace: Trace, hidden: int | None, width: int | None, top_k: int | None) -> MoeShape:
    known = model_of_shape(trace.num_layers, trace.num_experts)
    if known is None and (hidden is None or width is None or top_k is None):
        raise CommandError(
            f"no known model has {trace.num_layers} MoE layers of {trace.num_experts} experts; give --hidden, --width "
            f"and --top-k from its config.json"
        )
    if known is not None and hidden is None and width is None and top_k is None:
        return known
    base = known or MoeShape("model", trace.num_layers, trace.num_experts, 1, 1, 1)
    return MoeShape(
        base.name if known else f"{trace.num_layers} layers of {trace.num_experts} experts",
        trace.num_layers,
        trace.num_experts,
        top_k or base.top_k,
        hidden or base.hidden,
        width or base.width,
        "as given",
    )


def _nodes(nodes: int | None, ranks: int, machine: Machine) -> int:
    if nodes is None:
        nodes = max(1, -(-ranks // machine.ranks_per_node))
        while ranks % nodes:
            nodes += 1
    if ranks % nodes:
        raise CommandError(f"--nodes {nodes} cannot share {ranks} ranks evenly; give a divisor of {ranks}")
    return nodes


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, option: str, least: int) -> list[int]:
    found = [_number(part, option, least) for part in _split(text)]
    if not found:
        raise CommandError(f"{option} is empty; give whole numbers from {least}, separated by commas")
    return found


def _number(text: str, option: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise CommandError(f"{option} {text[:40]}: allowed are whole numbers from {least}, separated by commas")
    return int(text)


def _policies(text: str) -> list[PolicyChoice]:
    chosen: list[PolicyChoice] = []
    for part in _split(text):
        known = next((policy for policy in POLICY_CHOICES if policy == part), None)
        if known is None:
            raise CommandError(f"--policies {part[:40]}: allowed are {', '.join(POLICY_CHOICES)}")
        chosen.append(known)
    if not chosen:
        raise CommandError(f"--policies is empty; allowed are {', '.join(POLICY_CHOICES)}")
    return chosen


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise CommandError(f"--shares {text[:40]}: allowed are off, on, or off,on")
    return text == "on"
