# SPDX-License-Identifier: Apache-2.0
"""CPU time of a plan from a series of windows, over that of a plan from the newest window alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loads
from benchmarks.placements import Slots, greedy_placement
from benchmarks.planner_results import Results
from vllm_ascend_eplb.planning import plan

MOST_RATIO = 1.5

SHAPES = ((58, 256, 8, 288), (58, 256, 32, 288), (58, 256, 64, 320), (58, 256, 144, 288), (94, 128, 32, 160))
"""(layers, experts, ranks, slots)."""

DRIFTS = {"at rest": 0.0, "none": 0.0, "mild": 0.07, "medium": 0.26, "hard": 0.46}
"""Standard deviation of the log ratio between consecutive windows. "at rest": windows have so many tokens, and the
placement in force suits them so well, that no layer moves."""

TOKENS_AT_REST = 1 << 20
"""Tokens per expert in a window at rest; other windows have ``loads.TOKENS_PER_EXPERT``."""

SECONDS_OF_A_SAMPLE = 0.02


def drifting_counts(popularity: loads.FloatArray, drift: str, num_windows: int, seed: int) -> np.ndarray[Any, Any]:
    """int64 [T, L, E]: windows whose popularity begins at ``popularity`` [L, E] and drifts, with the spread of each
    layer's log load kept."""
    random = np.random.default_rng(seed)
    latent = np.log(np.maximum(popularity, popularity[popularity > 0].min()))
    mean, spread = latent.mean(axis=1, keepdims=True), latent.std(axis=1, keepdims=True)
    latent = (latent - mean) / spread
    correlation = 1 - np.minimum((DRIFTS[drift] / spread) ** 2 / 2, 0.9)
    tokens = popularity.shape[1] * (TOKENS_AT_REST if drift == "at rest" else loads.TOKENS_PER_EXPERT)
    windows = []
    for _ in range(num_windows):
        now = np.exp(mean + spread * latent)
        windows.append(random.poisson(now / now.sum(axis=1, keepdims=True) * tokens))
        latent = correlation * latent + np.sqrt(1 - correlation**2) * random.normal(size=latent.shape)
    return np.stack(windows)


def cpu_seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, on average."""
    began = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began) / calls


def ratio_of(series: np.ndarray[Any, Any], slots: Slots, num_ranks: int, pairs: int) -> dict[str, float]:
    """Medians over ``pairs`` of samples, which follow one another."""

    def from_one() -> object:
        return plan(series[-1], slots, num_ranks)

    def from_series() -> object:
        return plan(series, slots, num_ranks)

    calls = [max(1, int(SECONDS_OF_A_SAMPLE / max(cpu_seconds(call, 2), 1e-5))) for call in (from_one, from_series)]
    samples = np.array([[cpu_seconds(from_one, calls[0]), cpu_seconds(from_series, calls[1])] for _ in range(pairs)])
    newest, whole = 1e3 * np.median(samples, axis=0)
    return {"one ms": newest, "series ms": whole, "ratio": float(np.median(samples[:, 1] / samples[:, 0]))}


def run_series(results: Results, folder: Path | None, quick: bool, num_windows: int = 8) -> None:
    print(f"\nCPU time of a plan from {num_windows} windows over that from the newest, fast, one thread")
    files = loads.read_folder(folder) if folder else {}
    for num_layers, num_experts, num_ranks, num_slots in SHAPES[1:2] if quick else SHAPES:
        bases = {"generated": loads.LoadGenerator(num_layers, num_experts, seed=1).window().astype(np.float64)}
        for name, file in (("prefill", loads.PREFILL_1K), ("decode", loads.DECODE_1000)):
            if file in files and files[file].shape == (num_layers, num_experts):
                bases[name] = files[file]
        for name, popularity in bases.items():
            case = f"{num_experts} experts, EP{num_ranks}/{num_slots} {name}"
            for drift in DRIFTS:
                windows = drifting_counts(popularity, drift, 2 * num_windows, seed=7)
                earlier, series = windows[:num_windows], windows[num_windows:]
                # As served: the placement in force was planned from the windows before.
                start = greedy_placement(earlier.sum(axis=0).astype(np.float64), num_slots, num_ranks)
                target = {"target_par": 1.0} if drift == "at rest" else {}
                slots = plan(earlier, start, num_ranks, **target).physical_to_logical
                row = {"layers": num_layers, "experts": num_experts, "ranks": num_ranks, "slots": num_slots}
                row |= {"load": name, "drift": drift, "windows": num_windows}
                row |= {"moves of one": plan(series[-1], slots, num_ranks).num_moves}
                row |= {"moves of series": plan(series, slots, num_ranks).num_moves}
                row |= ratio_of(series, slots, num_ranks, 5 if quick else 11)
                results.series.append(row)
                print(
                    f"  {case:34s} {drift:7s}  one {row['one ms']:7.3f} ms, "
                    f"{row['moves of one']:5d} moves  series {row['series ms']:7.3f} ms, "
                    f"{row['moves of series']:5d} moves  ratio {row['ratio']:.2f}",
                    flush=True,
                )
                results.check(
                    row["ratio"] <= MOST_RATIO,
                    f"{case}, drift {drift}: a series takes {row['ratio']:.2f} x one window",
                )
