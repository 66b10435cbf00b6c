# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of served models share: ratios of pairs of runs, and the engine on a CPU, which is vLLM with the tiny
model on two expert-parallel ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

RANKS = 2

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for 95 % with 1, 2, ... degrees of freedom; beyond them the last is taken, which is a little too wide."""


def ratios(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """``on`` over ``off``, pair by pair: median, mean, and the bounds of a 95 % confidence interval of the mean, which
    are None for a single pair."""
    pairs = [b / a for a, b in zip(off, on, strict=True)]
    mean, n = statistics.fmean(pairs), len(pairs)
    half = None if n < 2 else STUDENT[min(n - 2, len(STUDENT) - 1)] * statistics.stdev(pairs) / n**0.5
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"median": statistics.median(pairs), "mean": mean, "low": low, "high": high, "pairs": pairs}


def describe_ratio(name: str, ratio: dict[str, Any]) -> str:
    """One line."""
    spread = "" if ratio["low"] is None else f", 95 %: {ratio['low']:.3f} to {ratio['high']:.3f}"
    return f"{name}: {ratio['mean']:.3f}{spread} ({len(ratio['pairs'])} pairs, median {ratio['median']:.3f})"


def balancer_report() -> dict[str, Any]:
    """What the balancer of this process's engine did, by its statistics."""
    from vllm_ascend_eplb.observe.stats_file import read_stats, stats_path

    path = stats_path()
    stats = read_stats(path) if path else None
    assert stats is not None
    assert stats.window is not None
    return {
        "moved": stats.experts_moved,
        "cycles_done": stats.cycles_done,
        "cycles_skipped": stats.cycles_skipped,
        "par": stats.window.par.mean,
        "par_start": stats.window.par_start.mean,
        "moe_time_saved_seconds": stats.moe_time_saved_seconds,
        "step_time_saved_seconds": stats.step_time_saved_seconds,
        "reason": stats.cycles[-1].reason if stats.cycles else "",
    }


def cpu_engine(requests: int, eplb_config: dict[str, Any], **more: Any) -> Any:
    """Starts it; ``cpu_environment(RANKS)`` must be set.

    Args:
        requests: most that are served at once.
        eplb_config: the settings of the balancer.
        more: further arguments of vLLM's ``LLM``.
    """
    from vllm import LLM

    from examples.demo.server import MODEL

    return LLM(
        str(MODEL),
        dtype="float32",
        seed=0,
        max_model_len=512,
        max_num_seqs=requests,
        tensor_parallel_size=RANKS,
        enforce_eager=True,
        enable_expert_parallel=True,
        additional_config={"eplb_config": eplb_config},
        **more,
    )
