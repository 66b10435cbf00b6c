# SPDX-License-Identifier: Apache-2.0
"""Checks and times the promises of the planner: ``python -m benchmarks.planner_checks --json PATH``.

It prints tables of plans (PAR of the planned and of the next window, moves, bytes, time), of drifting loads, of the
time of plans from series, of dispatch shares, of the rounds of whole plans and of large models. Without ``--quick`` it
also compares small instances with a mixed-integer program. ``--parts`` chooses some of the tables. All results go to
PATH as JSON (PATH may be a pipe), and ``--plot`` draws PAR against moves. Loads come from ``--loads`` DIR (JSON files
with ``logical_count``), from a trace, and from a generator with the statistics of a large served model.

The exit status is 1 if a check fails: a plan is invalid, misses its target, differs from vLLM's planner or depends on
the number of threads; shares are not optimal; a plan from eight windows takes over 1.5 times the CPU time of one from
the newest window; or a plan takes many more rounds than its busiest receiver needs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loads, planner_optimum, planner_peers
from benchmarks.placements import greedy_placement, receipts
from benchmarks.planner_cases import (
    EXPERT_BYTES,
    TRACE,
    Case,
    FloatArray,
    Slots,
    file_cases,
    generated_cases,
    trace_cases,
)
from benchmarks.planner_results import Results, Row, draw, print_plans
from benchmarks.planner_series import run_series
from vllm_ascend_eplb.planning import dispatch_shares, plan, shared_rank_load
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.transfer.slots import default_buffer_experts
from vllm_ascend_eplb.values.placement import Placement, peak_to_average
from vllm_ascend_eplb.values.rounds import receive_bound
from vllm_ascend_eplb.values.topology import Topology

PARTS = ("plans", "drift", "series", "dispatch", "rounds", "scale", "optimum")


# -- cases ------------------------------------------------------------------------------------------------------------


# -- measurements -----------------------------------------------------------------------------------------------------


def best_of(runs: int, call: Callable[[], Any], most_seconds: float) -> tuple[Any, float]:
    """The result and the shortest wall time in ms of at most ``runs`` calls, fewer if they take long."""
    best, spent, result = np.inf, 0.0, None
    for _ in range(runs):
        began = time.perf_counter()
        result = call()
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
        if spent > most_seconds:
            break
    return result, best * 1e3


def measure(case: Case, policy: str, answer: Callable[[], Slots], runs: int, seconds: float) -> tuple[Row, Slots]:
    after, milliseconds = best_of(runs, answer, seconds)
    placement = Placement(after, case.load.shape[1], case.num_ranks)
    now, later = placement.par(case.load), placement.par(case.following)
    moved = receipts(case.slots, after, case.num_ranks)
    row = Row(
        case.name, policy, float(now.mean()), float(now.max()), float(later.mean()), float(later.max()),
        int(moved.sum()), int(moved.max()), int(moved.sum()) * EXPERT_BYTES / 1e9, milliseconds,
    )  # fmt: skip
    return row, after


def run_plans(results: Results, cases: list[Case], peers: dict[str, planner_peers.Peer], quick: bool) -> None:
    runs = 20
    for case in cases:
        rows = []
        in_force, loads_now = case.placement, case.load
        rows.append(measure(case, "stay", lambda case=case: case.slots, 1, 0)[0])
        # Reference first: its time is what the others are compared with.
        for name, peer in peers.items():
            call = functools.partial(peer, case.load, case.slots, case.num_ranks)
            row, after = measure(case, name, call, runs, 0.2 if quick else 3.0)
            rows.append(row)
            if name == "vllm":
                ours = plan(loads_now, case.slots, case.num_ranks, policy="default").physical_to_logical
                results.check(bool(np.array_equal(after, ours)), f"{case.name}: 'default' differs from vLLM's policy")
        seconds = case.thorough_seconds / (3 if quick else 1)
        settings: dict[str, dict[str, Any]] = {
            "random": {"policy": "random"},
            "default": {"policy": "default"},
            "incremental": {"target_par": case.target_par},
            "incremental thorough": {"target_par": case.target_par, "effort": "thorough", "time_budget": seconds},
        }
        for name, options in settings.items():
            call = functools.partial(_slots_of_plan, case, options)
            row, _ = measure(case, name, call, 1 if "thorough" in name else runs, 0.5 if quick else 3.0)
            rows.append(row)
        vllm = next((row.milliseconds for row in rows if row.policy == "vllm"), None)
        for row in rows:
            row.vllm_ratio = vllm / row.milliseconds if vllm is not None and row.policy != "stay" else None
        results.plans += rows
        check_plans(results, case, in_force)
        print_plans(rows)


def _slots_of_plan(case: Case, options: dict[str, Any]) -> Slots:
    return plan(case.load, case.slots, case.num_ranks, **options).physical_to_logical


def check_plans(results: Results, case: Case, in_force: Placement) -> None:
    """Checks every promise of the policy "incremental"."""
    made = [plan(case.load, case.slots, case.num_ranks, target_par=case.target_par, threads=n) for n in (1, 2)]
    made += [
        plan(case.load, case.slots, case.num_ranks, target_par=case.target_par, effort="thorough", rounds=5, threads=n)
        for n in (1, 3)
    ]
    for single, threaded in (made[:2], made[2:]):
        results.check(
            bool(np.array_equal(single.moves, threaded.moves)), f"{case.name}: the plan depends on the threads"
        )
        try:
            single.check(in_force)
        except ValueError as error:
            results.check(False, f"{case.name}: {error}")
        results.check(bool((single.par_after <= single.par_before + 1e-6).all()), f"{case.name}: a layer got worse")
    worst = float(made[0].par_after.max())
    results.check(worst <= case.target_par + 0.01, f"{case.name}: worst layer at {worst:.4f}")


def run_drift(results: Results, num_layers: int, num_windows: int, seeds: range) -> None:
    """Evaluate each plan on the next window, and compare it with planning from scratch."""
    print("\ndrifting load, PAR of the following window (mean over windows and layers)")
    for num_ranks, num_slots, target, options in (
        (32, 288, 1.01, {}),
        (64, 320, 1.018, {"effort": "thorough", "rounds": 100}),
    ):
        for kind in ("mild", "medium", "mixed"):
            rows = []
            for seed in seeds:
                windows = loads.drifting_windows(kind, num_windows, num_layers, 256, seed)
                means, moves = follow(windows, num_ranks, num_slots, {"target_par": target, **options})
                row = {
                    "ranks": num_ranks, "slots": num_slots, "drift": kind, "seed": seed, "target": target, **options,
                    "layers": num_layers, "windows": num_windows, **{f"par {name}": par for name, par in means.items()},
                    "moves per window": moves["incremental"] / (num_windows - 2),
                    "part of moves from scratch": moves["incremental"] / moves["from scratch"],
                }  # fmt: skip
                rows.append(row)
                print_drift(f"EP{num_ranks}/{num_slots} {kind:6s} seed {seed}", [row])
            if len(rows) > 1:
                print_drift(f"EP{num_ranks}/{num_slots} {kind:6s} all   ", rows)
            results.drift += rows


def follow(
    windows: FloatArray, num_ranks: int, num_slots: int, options: dict[str, Any]
) -> tuple[dict[str, float], dict[str, int]]:
    """Plans after each window [T, L, E] but the first and the last: mean PAR of the window after, and receipts."""
    num_windows, num_layers, num_experts = windows.shape
    start = Placement.initial(num_layers, num_experts, num_ranks, num_slots - num_experts)
    stay = plan(windows[0], start, num_ranks, policy="default").physical_to_logical
    held = {"incremental": stay, "from scratch": stay, "stay": stay}
    par: dict[str, list[float]] = {name: [] for name in held}
    moves = {"incremental": 0, "from scratch": 0}
    for t in range(1, num_windows - 1):
        after = {
            "incremental": plan(windows[max(0, t - 11) : t + 1], held["incremental"], num_ranks, **options),
            "from scratch": plan(windows[t], held["from scratch"], num_ranks, policy="default"),
        }
        for name, made in after.items():
            moves[name] += int(receipts(held[name], made.physical_to_logical, num_ranks).sum())
            held[name] = made.physical_to_logical
        for name, slots in held.items():
            par[name].append(float(Placement(slots, num_experts, num_ranks).par(windows[t + 1]).mean()))
    return {name: float(np.mean(values)) for name, values in par.items()}, moves


def print_drift(name: str, rows: list[dict[str, Any]]) -> None:
    ours, scratch, stay, part = (
        float(np.mean([row[key] for row in rows]))
        for key in ("par incremental", "par from scratch", "par stay", "part of moves from scratch")
    )
    print(
        f"  {name} incremental {ours:.4f}  from scratch {scratch:.4f} ({ours - scratch:+.4f})  stay {stay:.4f}  "
        f"moves {part:.1%} of those from scratch",
        flush=True,
    )


def run_dispatch(results: Results, cases: list[Case]) -> None:
    print("\ndispatch shares, mean PAR of the placement in force")
    try:
        import scipy  # noqa: F401
    except ImportError:
        scipy_there = False
    else:
        scipy_there = True
    for case in cases:
        shares, milliseconds = best_of(
            20, lambda case=case: dispatch_shares(case.load, case.slots, case.num_ranks), 1.0
        )
        with_shares = peak_to_average(shared_rank_load(case.load, case.slots, shares, case.num_ranks))
        gap = None
        if scipy_there:
            layers = range(0, len(case.load), max(1, len(case.load) // 3))
            best = [planner_optimum.least_peak(case.load[i], case.slots[i], case.num_ranks) for i in layers]
            peaks = shared_rank_load(case.load, case.slots, shares, case.num_ranks).max(axis=1)[list(layers)]
            gap = float((peaks / best).max() - 1)
            results.check(gap <= 1.1e-3, f"{case.name}: shares are {gap:.2%} above the linear program's optimum")
        row = {
            "case": case.name,
            "par even": float(case.placement.par(case.load).mean()), "par shares": float(with_shares.mean()),
            "milliseconds": milliseconds, "gap to linear program": gap,
        }  # fmt: skip
        results.dispatch.append(row)
        shown = "" if gap is None else f"  {gap:.3%} above the LP"
        print(
            f"  {case.name:45s} even {row['par even']:.4f}  shares {row['par shares']:.4f}  "
            f"{milliseconds:.2f} ms{shown}",
            flush=True,
        )


def run_rounds(results: Results, cases: list[Case]) -> None:
    print("\nrounds of whole plans, with the default staging buffer, over the fewest that the busiest receiver allows")
    for case in cases:
        layers, slots_per_rank = len(case.slots), case.slots.shape[1] // case.num_ranks
        if case.num_ranks < 16:
            continue
        buffer = default_buffer_experts(layers, slots_per_rank)
        moves = plan(case.load, case.slots, case.num_ranks).moves
        topology = Topology.even(case.num_ranks, case.num_ranks // 8)
        began = time.perf_counter()
        rounds = schedule_rounds(case.placement, moves, topology, buffer)
        milliseconds = 1e3 * (time.perf_counter() - began)
        bound = receive_bound(case.placement, rounds, buffer) if rounds else 0
        results.check(len(rounds) <= max(bound + 1, 1.1 * bound), f"{case.name}: {len(rounds)} rounds, bound {bound}")
        row = {
            "case": case.name, "moves": len(moves), "buffer": buffer, "rounds": len(rounds), "bound": bound,
            "milliseconds": milliseconds,
        }  # fmt: skip
        results.rounds.append(row)
        print(
            f"  {case.name:45s} {len(moves):5d} moves, buffer {buffer}: {len(rounds):3d} rounds, bound {bound:3d}, "
            f"{milliseconds:.0f} ms",
            flush=True,
        )


def run_scale(results: Results) -> None:
    print("\nlarge models, generated load, one descent")
    for num_layers, num_experts, num_ranks, per_rank, target in (
        (58, 256, 320, 1, 1.02),
        (58, 256, 320, 2, 1.05),
        (60, 384, 64, 7, 1.03),
        (94, 512, 64, 9, 1.03),
        (94, 512, 128, 5, 1.03),
    ):
        num_slots = num_ranks * per_rank
        generator = loads.LoadGenerator(num_layers, num_experts, seed=3)
        first = generator.window().astype(np.float64)
        generator.drift("medium")
        load = generator.window().astype(np.float64)
        before = plan(first, Placement.initial(num_layers, num_experts, num_ranks, num_slots - num_experts), num_ranks,
                      target_par=target).physical_to_logical  # fmt: skip
        made, milliseconds = best_of(
            3, lambda b=before, w=load, r=num_ranks, t=target: plan(w, b, r, target_par=t), 5.0
        )
        in_force = Placement(before, num_experts, num_ranks)
        made.check(in_force)
        row = {
            "layers": num_layers, "experts": num_experts, "ranks": num_ranks, "slots": num_slots, "target": target,
            "par before": float(made.par_before.mean()), "par after": float(made.par_after.mean()),
            "worst after": float(made.par_after.max()), "moves": made.num_moves, "milliseconds": milliseconds,
        }  # fmt: skip
        results.scale.append(row)
        print(
            f"  {num_layers} layers, {num_experts} experts, EP{num_ranks}/{num_slots}: PAR {row['par before']:.3f} to "
            f"{row['par after']:.4f} (worst {row['worst after']:.4f}), {made.num_moves} moves, {milliseconds:.0f} ms",
            flush=True,
        )


def run_optimum(results: Results, cases: list[Case], seconds: float, instances: int) -> None:
    """A quarter of the experts on 8 ranks with 72 slots, one layer at a time, against HiGHS."""
    print("\nsmall instances (64 experts, EP8/72, target 1.02) against a mixed-integer program")
    for case in cases:
        if case.planned_for is None or case.num_ranks != 32:
            continue
        total = {"fast": 0, "thorough": 0, "best of HiGHS": 0, "best known": 0}
        for layer in np.linspace(0, len(case.load) - 1, instances).astype(int):
            before, load = case.planned_for[layer : layer + 1, ::4], case.load[layer : layer + 1, ::4]
            slots = greedy_placement(before, 72, 8)
            fast = plan(load, slots, 8)
            thorough = plan(load, slots, 8, effort="thorough", rounds=3000)
            found = planner_optimum.fewest_moves(load[0], slots[0], 8, 1.02, seconds)
            row = {
                "case": case.name, "layer": int(layer), "fast": fast.num_moves, "thorough": thorough.num_moves,
                "worst par": float(max(fast.par_after[0], thorough.par_after[0])),
                "best of HiGHS": None if found is None else found.moves,
                "bound": None if found is None else found.bound,
                "best known": min(thorough.num_moves, found.moves if found is not None else thorough.num_moves),
            }  # fmt: skip
            results.optimum.append(row)
            print(f"  {row}", flush=True)
            results.check(row["worst par"] <= 1.0201, f"{case.name}, layer {layer}: target missed on 64 experts")
            if found is not None:
                for name in total:
                    total[name] += int(row[name])
        if total["best of HiGHS"]:
            for name in ("fast", "thorough"):
                highs, known = (total[name] / total[best] for best in ("best of HiGHS", "best known"))
                print(f"  {case.name}, {name}: {highs:.3f} of HiGHS's best solutions, {known:.3f} of the best known")


# -- output -----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the results go; may be a pipe")
    parser.add_argument("--quick", action="store_true", help="fewer runs, layers and windows; under 50 s")
    parser.add_argument("--loads", type=Path, help="folder of JSON files with logical_count [layers][experts]")
    parser.add_argument(
        "--trace", type=Path, help=f"load trace .npz [windows, layers, experts]; default {TRACE.name} if there"
    )
    parser.add_argument("--deepseek", type=Path, help="eplb.py of DeepSeek's EPLB, or its folder")
    parser.add_argument("--vllm-ascend", type=Path, help="unpacked sources of vllm-ascend")
    parser.add_argument("--plot", type=Path, help="picture of the trade-off (PNG or SVG)")
    parser.add_argument("--optimum-seconds", type=float, default=15.0, help="time of the solver per small instance")
    parser.add_argument("--parts", default="", help=f"comma-separated, of {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",") if arguments.parts else PARTS[: -1 if arguments.quick else None]
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts {arguments.parts}: allowed are {', '.join(PARTS)}")

    results = Results({"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__})
    results.machine |= {"cores": os.cpu_count(), "load at start": os.getloadavg()[0]}
    peers: dict[str, planner_peers.Peer] = {}
    if "plans" in parts and importlib.util.find_spec("vllm") is not None:
        peers["vllm"] = planner_peers.vllm_peer()
    if arguments.deepseek:
        peers["deepseek"] = planner_peers.deepseek_peer(arguments.deepseek)
    if arguments.vllm_ascend:
        for policy in ("swift", "flashlb"):
            peers[f"vllm-ascend {policy}"] = planner_peers.ascend_peer(arguments.vllm_ascend, policy)

    cases = file_cases(arguments.loads, arguments.quick) if arguments.loads else []
    generated = generated_cases(16 if arguments.quick else 58)
    trace = arguments.trace or (TRACE if TRACE.exists() else None)
    cases += generated if not (arguments.quick and cases) else generated[:1]
    if trace is not None:
        cases += trace_cases(trace)
    if "plans" in parts:
        run_plans(results, cases, peers, arguments.quick)
    if "drift" in parts:
        run_drift(
            results, 8 if arguments.quick else 58, 12 if arguments.quick else 24, range(1 if arguments.quick else 3)
        )
    if "series" in parts:
        run_series(results, arguments.loads, arguments.quick)
    if "dispatch" in parts:
        run_dispatch(results, [case for case in cases if not case.name.endswith(("1.05", "1.005", "1.012"))])
    if "rounds" in parts:
        run_rounds(results, cases)
    if "scale" in parts:
        run_scale(results)
    if "optimum" in parts:
        run_optimum(results, cases, arguments.optimum_seconds, 6)
    if arguments.plot:
        draw(results, cases, arguments.plot)
    results.machine["load at end"] = os.getloadavg()[0]
    with arguments.json.open("w") as file:
        json.dump(asdict(results), file, indent=1)
    print(f"\n{len(results.failures)} failed checks" if results.failures else "\nall checks passed")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
