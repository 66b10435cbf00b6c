# SPDX-License-Identifier: Apache-2.0
"""Cost and gain of balancing in a served model on GPUs: ``python -m benchmarks.served_cuda --json PATH``.

Several engines of vLLM serve a model of Qwen3-30B-A3B's shape (fewer layers, dummy weights) on two expert-parallel
GPUs: without balancing, with vLLM's own balancer, and with this one without and with a redundant expert on each rank.
All engines stay in memory and take turns, so that each round compares them within a minute: decoding with few, some and
many requests at a time, and prefilling in full chunks. Every second round has the reverse order. All engines have the
same routers, which are skewed on purpose: rank 0 holds the experts with the most tokens, and an expert gets up to twice
the tokens of another in the same layer. Steps are timed in the front end, when their results arrive.

The report has the throughput of each engine relative to no balancing in the same round, and the confidence interval of
the mean; and the same for the median step, which a single long step does not change, and for a step that nothing
disturbs. GPUs at their power limit disturb, and so do other guests of the host. An engine that does not start, or ends,
is left out, and the report says so. The exit status is 1 if a balancer moved nothing or was left out.

On a machine without GPUs, ``--tiny`` runs a small version on the CPU to check the script, without vLLM's own balancer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.served import balancer_report
from benchmarks.served_turns import OFF, Engines, Turn, all_over_off, answer, describe, rates, timed

STARTS = ((OFF, "vllm, 2 redundant"), ("ours, 2 redundant",), ("ours",))
"""Engines that start together. Ours start alone, because they time the MoE layers as they start."""

MODES = [mode for together in STARTS for mode in together]

SKEW = 0.35


@dataclass(frozen=True)
class Size:
    """How much is served: layers, requests at a time, decoding steps of a turn, chunks that a turn prefills, tokens of
    a prompt and of a chunk, steps of a balancer's window, and steps before any is timed."""

    layers: int
    requests: tuple[int, ...]
    steps: int
    chunks: int
    prompt: int
    chunk: int
    interval: int
    settle: int


FULL = Size(layers=24, requests=(16, 128, 512), steps=100, chunks=30, prompt=4096, chunk=8192, interval=300, settle=450)
TINY = Size(layers=2, requests=(2, 8), steps=60, chunks=2, prompt=64, chunk=128, interval=20, settle=60)

SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
IN_SMALL = {"vocab_size": 512, "hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4}


def skew_routers(worker: Any, sigma: float) -> int:
    """In a worker: makes the first experts of each layer likelier than the last ones; how many layers there are."""
    import torch

    gates = [module for name, module in worker.model_runner.model.named_modules() if name.endswith("mlp.gate")]
    for gate in gates:
        if not gate.weight.numel():  # on a CPU it is packed away
            continue
        quantiles = torch.linspace(0.99, 0.01, gate.weight.shape[0])
        factors = torch.exp(sigma * 2**0.5 * torch.erfinv(2 * quantiles - 1))
        gate.weight.data.mul_(factors.to(gate.weight).unsqueeze(1))
    return len(gates)


def moved_by_vllm(worker: Any) -> int:
    """In a worker: slots whose expert is not the one they began with, by vLLM's own balancer."""
    state = worker.model_runner.eplb_state
    began = getattr(worker, "slots_at_first", None)
    now = [model_state.physical_to_logical_map.clone() for model_state in state.model_states.values()]
    if began is None:
        worker.slots_at_first = now
        return 0
    return sum(int((before != after).sum()) for before, after in zip(began, now, strict=True))


def redundant_experts(mode: str) -> int:
    return 2 if mode.endswith("2 redundant") else 0


def engine_arguments(mode: str, size: Size, tiny: bool, uncompiled: bool = False) -> dict[str, Any]:
    balancer: dict[str, Any] = {}
    if mode.startswith("ours"):
        settings = {
            "dynamic_eplb": True,
            "num_redundant_experts": redundant_experts(mode),
            "expert_heat_collection_interval": size.interval,
        }
        balancer = {"additional_config": {"eplb_config": settings}}
    elif mode.startswith("vllm"):
        window = {"window_size": size.interval, "step_interval": size.interval}
        theirs = {**window, "num_redundant_experts": redundant_experts(mode), "use_async": True}
        balancer = {"enable_eplb": True, "eplb_config": theirs}
    # Only what is decoded is captured, and what is prefilled is not: other sizes would only make starts longer.
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": list(size.requests)}
    if uncompiled:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    device = {
        "gpu_memory_utilization": 0.22,
        "kv_cache_memory_bytes": 6 * 2**30,  # not measured, because engines share the GPUs
        "disable_custom_all_reduce": True,
        "compilation_config": graphs,
        **({"attention_backend": "TRITON_ATTN"} if uncompiled else {}),
    }
    return {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "seed": 0,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": mode.startswith("ours") or not tiny,  # which vLLM alone cannot do on a CPU
        "enable_prefix_caching": False,
        "max_num_seqs": max(size.requests),
        "max_model_len": 2 * size.prompt,
        "max_num_batched_tokens": size.chunk,
        "enforce_eager": tiny,
        "dtype": "float32" if tiny else "bfloat16",
        **({} if tiny else device),
        **balancer,
    }


class Engine:
    """An engine in this process, with skewed routers."""

    def __init__(self, mode: str, size: Size, tiny: bool, uncompiled: bool, folder: str) -> None:
        from vllm import LLM
        from vllm.utils.gc_utils import freeze_gc_heap

        from benchmarks import served_cuda as here  # by a name that workers can import

        shape = SHAPE | {"num_hidden_layers": size.layers} | (IN_SMALL if tiny else {})
        Path(folder, "config.json").write_text(json.dumps(shape))
        self._mode, self._size, self._vocabulary = mode, size, int(str(shape["vocab_size"]))
        self._llm = LLM(folder, **engine_arguments(mode, size, tiny, uncompiled))
        assert set(self._llm.collective_rpc(here.skew_routers, args=(SKEW,))) == {size.layers}
        if mode.startswith("vllm"):
            self._llm.collective_rpc(here.moved_by_vllm)
        freeze_gc_heap()  # as vLLM's server does; a collection of all that was imported takes half a second of a step

    def decode(self, requests: int, steps: int) -> dict[str, float]:
        """Of the steps in which all ``requests`` got a token, see :func:`rates`."""
        all_steps = timed(self._llm.llm_engine, self._prompts(requests, 8), steps + 20)
        return rates([seconds for seconds, rows in all_steps if rows == requests][10:-10], requests)

    def prefill(self, chunks: int) -> dict[str, float]:
        """Of the chunks, see :func:`rates`; the first one is not timed."""
        prompts = self._prompts((chunks + 1) * self._size.chunk // self._size.prompt, self._size.prompt)
        return rates([seconds for seconds, _ in timed(self._llm.llm_engine, prompts, 1)][1:], self._size.chunk)

    def balanced(self) -> dict[str, Any]:
        """What its balancer did."""
        from benchmarks import served_cuda as here

        if self._mode == OFF:
            return {}
        if self._mode.startswith("vllm"):
            return {"moved": self._llm.collective_rpc(here.moved_by_vllm)[0]}
        return balancer_report()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        words = self._vocabulary - 1
        return [[(7919 * (request * length + at)) % words + 1 for at in range(length)] for request in range(count)]


def serve(connection: Connection, mode: str, size: Size, tiny: bool, uncompiled: bool) -> None:
    """A process with an engine."""
    os.setpgrp()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "EPLB_STATS_FILE": f"{folder}/stats.json"}
        if tiny:
            from examples.demo.server import cpu_environment

            os.environ |= cpu_environment(2)
        for module in ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.gpu_model_runner"):
            importlib.import_module(module)  # all engines at the same time; their workers are forked
        answer(connection, lambda: Engine(mode, size, tiny, uncompiled, folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results, after each round")
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--chunk", type=int, help="tokens of a step that prefills")
    parser.add_argument("--requests", type=int, nargs="+", help="at a time, while decoding")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="engines")
    parser.add_argument("--rounds", type=int, default=6, help="at most")
    parser.add_argument("--seconds", type=float, default=3600, help="no round starts later, nor ends later if it can")
    parser.add_argument("--uncompiled", action="store_true", help="without torch.compile, with attention by Triton")
    arguments = parser.parse_args()
    began = time.monotonic()
    changed = {name: getattr(arguments, name) for name in ("layers", "chunk", "requests")}
    size = replace(
        TINY if arguments.tiny else FULL, **{name: value for name, value in changed.items() if value is not None}
    )

    kinds: dict[str, tuple[Any, ...]] = {f"decode {count}": ("decode", count, size.steps) for count in size.requests}
    kinds["prefill"] = ("prefill", size.chunks)
    rounds: list[Turn] = []
    report: dict[str, Any] = {"over_off": {}, "balanced": {}}

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)

    modes = {mode for mode in (OFF, *arguments.modes) if not (arguments.tiny and mode.startswith("vllm"))}
    starts = [[mode for mode in together if mode in modes] for together in STARTS]
    engines = Engines(starts, serve, size, arguments.tiny, arguments.uncompiled)
    try:
        engines.start(say)
        for mode in engines.modes:
            engines.ask(mode, "decode", max(size.requests), size.settle)
            for call in kinds.values():
                engines.ask(mode, *call)
            say(f"{mode}: {engines.ask(mode, 'balanced')}")
        longest = 0.0
        while len(rounds) < arguments.rounds:
            round_began = time.monotonic()
            if rounds and round_began + longest > began + arguments.seconds:
                break
            turn = engines.turn(kinds, len(rounds))
            if any(OFF not in of for of in turn.values()):
                break
            rounds.append(turn)
            longest = max(longest, time.monotonic() - round_began)
            report = {
                "benchmark": "served_cuda",
                "machine": _machine(),
                **asdict(size),
                "skew": SKEW,
                "uncompiled": arguments.uncompiled,
                "balanced": {mode: engines.ask(mode, "balanced") for mode in engines.modes},
                "left_out": engines.left_out,
                **all_over_off(rounds),
                "rounds": rounds,
            }
            say(f"round {len(rounds)}")
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        describe(report)
        for mode in engines.modes:
            engines.ask(mode, "close")
    finally:
        engines.end()
    idle = any(found and found.get("moved") == 0 for found in report["balanced"].values())
    return int(idle or bool(engines.left_out) or not rounds)


def _machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{os.cpu_count()} cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
