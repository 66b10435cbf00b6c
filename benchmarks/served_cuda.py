# SPDX-License-Identifier: Apache-2.0
"""Cost and gain of balancing in a served model on GPUs: ``python -m benchmarks.served_cuda --json PATH``.

Several engines of vLLM serve a model of Qwen3-30B-A3B's shape (fewer layers, dummy weights) on two expert-parallel
GPUs: without balancing, with vLLM's own balancer, and with this one without and with a redundant expert on each rank.
All engines stay in memory and take turns, so that each round compares them within a minute: decoding with few, some and
many requests at a time, and prefilling in full chunks. Every second round has the reverse order. All engines have the
same routers, which are skewed on purpose: rank 0 holds the experts with the most tokens, and an expert gets up to twice
the tokens of another in the same layer. Steps are timed in the front end, when their results arrive.

The report has the throughput of each engine relative to no balancing in the same round, and the confidence interval of
the mean. The exit status is 1 if a balancer moved nothing. On a machine without GPUs, ``--tiny`` runs a small version
on the CPU to check the script, without vLLM's own balancer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.served import describe_ratio, ratios

OFF = "off"
STARTS = (("ours, 2 redundant",), ("ours",), ("vllm, 2 redundant", OFF))
"""Engines that start together. Ours start alone, because they time the MoE layers as they start."""

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


FULL = Size(
    layers=24, requests=(16, 128, 512), steps=200, chunks=16, prompt=4096, chunk=8192, interval=300, settle=1000
)
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


def engine_arguments(mode: str, size: Size, tiny: bool) -> dict[str, Any]:
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
    device = {
        "gpu_memory_utilization": 0.22,
        "kv_cache_memory_bytes": 6 * 2**30,  # not measured, because engines share the GPUs
        "attention_backend": "TRITON_ATTN",
        "disable_custom_all_reduce": True,
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


def timed(engine: Any, prompts: list[list[int]], tokens: int) -> Iterator[tuple[float, int]]:
    """Steps of the engine until all prompts are answered: seconds since the step before, and requests that got a
    token."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{number}", TokensPrompt(prompt_token_ids=prompt), sampling)
    before = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if outputs:
            yield now - before, len(outputs)
            before = now


class Engine:
    """An engine in this process, with skewed routers."""

    def __init__(self, mode: str, size: Size, tiny: bool, folder: str) -> None:
        from vllm import LLM

        from benchmarks import served_cuda as here  # by a name that workers can import

        shape = SHAPE | {"num_hidden_layers": size.layers} | (IN_SMALL if tiny else {})
        Path(folder, "config.json").write_text(json.dumps(shape))
        self._mode, self._size, self._vocabulary = mode, size, int(str(shape["vocab_size"]))
        self._llm = LLM(folder, **engine_arguments(mode, size, tiny))
        assert set(self._llm.collective_rpc(here.skew_routers, args=(SKEW,))) == {size.layers}
        if mode.startswith("vllm"):
            self._llm.collective_rpc(here.moved_by_vllm)

    def decode(self, requests: int, steps: int) -> dict[str, float]:
        """Tokens a second of the steps in which all ``requests`` got a token, and the longest of these steps in ms."""
        all_steps = timed(self._llm.llm_engine, self._prompts(requests, 8), steps + 20)
        times = [seconds for seconds, rows in all_steps if rows == requests][10:-10]
        longest = max(range(len(times)), key=times.__getitem__)
        return {
            "tokens_per_s": requests * len(times) / sum(times),
            "median_ms": 1e3 * statistics.median(times),
            "longest_ms": 1e3 * times[longest],
            "longest_at": longest,
        }

    def prefill(self, chunks: int) -> dict[str, float]:
        """Tokens a second; the first chunk is not timed."""
        prompts = self._prompts((chunks + 1) * self._size.chunk // self._size.prompt, self._size.prompt)
        times = [seconds for seconds, _ in timed(self._llm.llm_engine, prompts, 1)][1:]
        return {
            "tokens_per_s": self._size.chunk * len(times) / sum(times),
            "median_ms": 1e3 * statistics.median(times),
            "longest_ms": 1e3 * max(times),
            "longest_at": max(range(len(times)), key=times.__getitem__),
        }

    def balanced(self) -> dict[str, Any]:
        """What its balancer did."""
        from benchmarks import served_cuda as here

        if self._mode == OFF:
            return {}
        if self._mode.startswith("vllm"):
            return {"moved": self._llm.collective_rpc(here.moved_by_vllm)[0]}
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
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        words = self._vocabulary - 1
        return [[(7919 * (request * length + at)) % words + 1 for at in range(length)] for request in range(count)]


def serve(connection: Connection, mode: str, size: Size, tiny: bool) -> None:
    """A process with an engine that does what ``connection`` asks, until it asks to close."""
    os.setpgrp()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "EPLB_STATS_FILE": f"{folder}/stats.json"}
        if tiny:
            from examples.demo.server import cpu_environment

            os.environ |= cpu_environment(2)
        engine = Engine(mode, size, tiny, folder)
        connection.send("ready")
        while True:
            name, *arguments = connection.recv()  # EOFError where the other end is gone
            connection.send(getattr(engine, name)(*arguments))
            if name == "close":
                return


class Served:
    """An engine in a process of its own."""

    def __init__(self, mode: str, size: Size, tiny: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, mode, size, tiny))
        self._process.start()
        there.close()

    def wait(self) -> None:
        """Until it can be asked.

        Raises:
            EOFError: the engine ended; its log says why.
        """
        assert self._connection.recv() == "ready"

    def ask(self, *what: Any) -> Any:
        self._connection.send(what)
        return self._connection.recv()

    def end(self) -> None:
        """Ends the process, also one that was not asked to close."""
        self._connection.close()
        self._process.join(20)
        self._process.kill()


def over_off(rounds: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, dict[str, Any]]:
    """By kind of step and engine: tokens a second over those of no balancing, round by round."""

    def rates(kind: str, mode: str) -> list[float]:
        return [turn[kind][mode]["tokens_per_s"] for turn in rounds]

    return {
        f"{kind}, {mode}": ratios(rates(kind, OFF), rates(kind, mode))
        for kind, modes in rounds[0].items()
        for mode in modes
        if mode != OFF
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results, after each round")
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    parser.add_argument("--layers", type=int, default=0, help="of the model")
    parser.add_argument("--rounds", type=int, default=6, help="at most")
    parser.add_argument("--seconds", type=float, default=3600, help="no round starts later")
    arguments = parser.parse_args()
    began = time.monotonic()
    size = TINY if arguments.tiny else FULL
    if arguments.layers:
        size = Size(**{**asdict(size), "layers": arguments.layers})

    kinds: dict[str, tuple[Any, ...]] = {f"decode {count}": ("decode", count, size.steps) for count in size.requests}
    kinds["prefill"] = ("prefill", size.chunks)
    engines: dict[str, Served] = {}
    rounds: list[dict[str, dict[str, dict[str, float]]]] = []
    report: dict[str, Any] = {}

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)

    try:
        for together in STARTS:
            modes = [mode for mode in together if not (arguments.tiny and mode.startswith("vllm"))]
            engines |= {mode: Served(mode, size, arguments.tiny) for mode in modes}
            for mode in modes:
                engines[mode].wait()
                say(f"{mode}: serves")
        for mode, engine in engines.items():
            engine.ask("decode", max(size.requests), size.settle)
            for call in kinds.values():
                engine.ask(*call)
            say(f"{mode}: {engine.ask('balanced')}")
        while len(rounds) < arguments.rounds and time.monotonic() - began < arguments.seconds:
            order = list(engines) if len(rounds) % 2 == 0 else list(engines)[::-1]
            rounds.append({kind: {mode: engines[mode].ask(*call) for mode in order} for kind, call in kinds.items()})
            report = {
                "benchmark": "served_cuda",
                "machine": _machine(),
                **asdict(size),
                "skew": SKEW,
                "balanced": {mode: engine.ask("balanced") for mode, engine in engines.items()},
                "over_off": over_off(rounds),
                "rounds": rounds,
            }
            say(f"round {len(rounds)}")
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        for name, ratio in report["over_off"].items():
            print(describe_ratio(name, ratio))
        for engine in engines.values():
            engine.ask("close")
    finally:
        for engine in engines.values():
            engine.end()
    return int(any(found.get("moved") == 0 for found in report["balanced"].values()))


def _machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{os.cpu_count()} cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
