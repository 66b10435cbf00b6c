# SPDX-License-Identifier: Apache-2.0
"""Gain of balancing in a served model on a CPU: ``python -m benchmarks.served_cpu --pairs 5 --json PATH``.

vLLM serves the tiny model on two expert-parallel CPU ranks, in pairs of engines. The first engine of a pair has a
static placement. The second has the balancer, started from the same placement, with the times of layers measured at
start-up. Pairs are repeated, so that drift of the machine affects both engines alike. Two placements are tried: the one
that vLLM loads (its load is nearly even), and one whose first rank has the experts with the most tokens. The result is
the mean of the pairs' ratios with its confidence interval. The exit status is 1 if the balancer moved nothing under
skewed load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.served import RANKS, cpu_engine, describe_ratio, ratios

LOADS = ("balanced", "skewed")
REDUNDANT, REQUESTS, CHUNK, INTERVAL = 4, 48, 2048, 20


def skewed_placement() -> Any:
    """All of the hottest experts of English prompts on rank 0."""
    from examples.tiny_moe.expert_load import FOLDER
    from vllm_ascend_eplb import Placement

    with np.load(FOLDER / "expert_load_histogram.npz") as archive:
        load = archive["loads"][list(archive["domains"]).index("english")]
    order = np.argsort(-load, axis=1)
    half = load.shape[1] // 2
    hot, cold, spare = order[:, :half], order[:, half:], REDUNDANT // 2
    slots = np.concatenate([hot, cold[:, -spare:], cold, hot[:, -spare:]], axis=1)
    return Placement(slots, load.shape[1], RANKS)


def serve(load: str, balanced: bool, seconds: float, calibration: Path) -> dict[str, Any]:
    """One engine from its start to its end: tokens per second, prefilling and decoding."""
    from vllm import SamplingParams

    from examples.tiny_moe.expert_load import read_prompts
    from vllm_ascend_eplb import Placement
    from vllm_ascend_eplb.files.expert_map import write_expert_map
    from vllm_ascend_eplb.observe.stats_file import read_stats, stats_path

    with tempfile.TemporaryDirectory() as folder:
        start = skewed_placement() if load == "skewed" else Placement.initial(6, 64, RANKS, REDUNDANT)
        write_expert_map(f"{folder}/map.json", start)
        settings: dict[str, Any] = {"expert_map_path": f"{folder}/map.json"}
        if balanced:
            settings |= {
                "dynamic_eplb": True,
                "expert_heat_collection_interval": INTERVAL,
                "algorithm_execution_interval": 2,
                "calibration_path": str(calibration),
            }
        engine = cpu_engine(REQUESTS, settings, max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
        text = " ".join(read_prompts("english"))
        prompts = [text[97 * at : 97 * at + 1200] for at in range(REQUESTS)]

        def rate(tokens: int, least_seconds: float) -> float:
            """Tokens per second: of prompts where one token is answered, else of answers."""
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            done, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < least_seconds or not done:
                for answer in engine.generate(
                    prompts if tokens == 1 else [p[:60] for p in prompts], sampling, use_tqdm=False
                ):
                    done += len(answer.prompt_token_ids or ()) if tokens == 1 else tokens
            return done / took

        rate(1, seconds)  # the balancer settles
        result: dict[str, Any] = {"prefill_tokens_per_s": rate(1, seconds), "decode_tokens_per_s": rate(100, seconds)}
        if balanced:
            path = stats_path()
            stats = read_stats(path) if path else None
            assert stats is not None
            result |= {
                "moved": stats.experts_moved,
                "cycles_done": stats.cycles_done,
                "cycles_skipped": stats.cycles_skipped,
                "par": stats.window.par.mean if stats.window else None,
                "par_start": stats.window.par_start.mean if stats.window else None,
                "moe_time_saved_seconds": stats.moe_time_saved_seconds,
                "step_time_saved_seconds": stats.step_time_saved_seconds,
                "reason": stats.cycles[-1].reason if stats.cycles else "",
            }
        engine.llm_engine.engine_core.shutdown()
    return result


def run(load: str, balanced: bool, arguments: argparse.Namespace, calibration: Path) -> dict[str, Any]:
    """One engine in a process of its own."""
    from examples.demo.server import cpu_environment

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.served_cpu", "--one", load, "on" if balanced else "off"]
        command += ["--json", str(answer), "--seconds", str(arguments.seconds), "--calibration", str(calibration)]
        environment = {**os.environ, **cpu_environment(RANKS), "EPLB_STATS_FILE": f"{folder}/stats.json"}
        subprocess.run(command, env=environment, check=True, timeout=1200)
        return dict(json.loads(answer.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results; may be a pipe")
    parser.add_argument("--pairs", type=int, default=5, help="engines without and with the balancer, in turn")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, at least")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--one", nargs=2, metavar=("LOAD", "ON"), help="only one engine, in this process")
    parser.add_argument("--calibration", type=Path, help="file with times of layers; without it they are measured once")
    arguments = parser.parse_args()
    if arguments.one:
        load, balanced = arguments.one
        result = serve(load, balanced == "on", arguments.seconds, arguments.calibration)
        arguments.json.write_text(json.dumps(result))
        return 0
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = arguments.calibration or Path(folder) / "step_cost.json"
        for load in arguments.loads:
            for pair in range(arguments.pairs):
                for balanced in (False, True):
                    result = {"load": load, "pair": pair, "on": balanced, **run(load, balanced, arguments, calibration)}
                    runs.append(result)
                    print(json.dumps(result), flush=True)
    compared: dict[str, Any] = {}
    for load in arguments.loads:
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            off, on = ([run[key] for run in runs if run["load"] == load and run["on"] is on] for on in (False, True))
            compared[f"{load} {key}"] = ratios(off, on)
    report = {
        "benchmark": "served_cpu",
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "ranks": RANKS,
        "redundant": REDUNDANT,
        "on_over_off": compared,
        "runs": runs,
    }
    text = json.dumps(report, indent=1)
    print(text)
    for name, ratio in compared.items():
        print(describe_ratio(name, ratio))
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(any(run["load"] == "skewed" and run["on"] and not run["moved"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
