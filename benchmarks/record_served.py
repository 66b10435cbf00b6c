# SPDX-License-Identifier: Apache-2.0
"""Cost of recording in a served model: ``python -m benchmarks.record_served --json PATH``.

vLLM runs the tiny model on two expert-parallel CPU ranks with the balancer on. Recording is on and off in every other
step, and the mapping calls of all layers are timed in both cases. The difference of the medians is the cost of
recording per step. Mapping without recording, which every balancer with redundant experts needs, is reported
separately. The exit status is 1 if a step counted nothing while recording was on, or anything while it was off. PATH
may be a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.served import RANKS, cpu_engine

REQUESTS, TOKENS, TURNS = 16, 400, 3
SETTINGS = {
    "dynamic_eplb": True,
    "num_redundant_experts": 4,
    "expert_heat_collection_interval": 1_000_000,
}


def watch(worker: Any) -> None:
    """In a worker: takes the times, and turns recording on and off."""
    from vllm_ascend_eplb.adaptors.vllm import cpu
    from vllm_ascend_eplb.adaptors.vllm import state as adaptor

    recorder = worker.model_runner.eplb_state.updator.parts.recorder
    worker.watched = steps = []
    spent = [0.0]
    mapped = cpu.eplb_map_to_physical_and_record

    def timed(*arguments: Any, **names: Any) -> Any:
        began = time.perf_counter()
        out = mapped(*arguments, **names)
        spent[0] += time.perf_counter() - began
        return out

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(mapped.__name__) is mapped:
            setattr(module, mapped.__name__, timed)

    before = adaptor.VllmEplbState.forward_before

    def switched(self: Any, *, stage: Any, **names: Any) -> None:
        now = time.perf_counter()
        if steps:
            counted = int(recorder.counts.sum())
            steps[-1] |= {"seconds": now - steps[-1].pop("began"), "mapping": spent[0], "counted": counted}
        before(self, stage=stage, **names)
        recorder.counts.zero_()
        on = len(steps) % 2 == 0
        recorder.set_recording(on)
        spent[0] = 0.0
        steps.append({"began": now, "recording": on, "stage": str(stage)})

    adaptor.VllmEplbState.forward_before = switched  # type: ignore[method-assign]


def watched(worker: Any) -> list[dict[str, Any]]:
    """What a worker saw of each step but the last, which may not be over."""
    steps: list[dict[str, Any]] = worker.watched[:-1]
    return steps


def serve() -> list[dict[str, Any]]:
    """The steps of EP rank 0 in which all requests decode."""
    from examples.demo.server import cpu_environment
    from examples.tiny_moe.expert_load import read_prompts

    os.environ.update(cpu_environment(RANKS) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})  # for our own functions
    from vllm import SamplingParams

    from benchmarks import record_served as here  # by a name that workers can import

    engine = cpu_engine(REQUESTS, SETTINGS)
    engine.collective_rpc(here.watch)
    texts = [prompt[:120] for prompt in read_prompts("english")[:REQUESTS]]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for _ in range(TURNS):
        engine.generate(texts, sampling, use_tqdm=False)
    steps = engine.collective_rpc(here.watched)[0]
    engine.llm_engine.engine_core.shutdown()
    return [step for step in steps if "decode" in step["stage"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results; may be a pipe")
    arguments = parser.parse_args()
    steps, busy = serve(), os.getloadavg()[0]

    full = max(step["counted"] for step in steps)
    wrong = sum((step["counted"] > 0) != step["recording"] for step in steps)
    on = [step["mapping"] for step in steps if step["recording"] and step["counted"] == full]
    off = [step["mapping"] for step in steps if not step["recording"]]
    step, recorded, mapped = statistics.median(step["seconds"] for step in steps), *map(statistics.median, (on, off))
    report = {
        "benchmark": "record_served",
        "machine": f"{os.cpu_count()} cores, load {busy:.1f}",
        "ranks": RANKS,
        "requests": REQUESTS,
        "steps": len(steps),
        "step_us": 1e6 * step,
        "mapping_us": 1e6 * mapped,
        "mapping_and_recording_us": 1e6 * recorded,
        "mapping_over_step": mapped / step,
        "recording_over_step": (recorded - mapped) / step,
        "wrong": wrong,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong or not on or not off else 0


if __name__ == "__main__":
    sys.exit(main())
