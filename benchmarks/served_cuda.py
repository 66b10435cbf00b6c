# SPDX-License-Identifier: Apache-2.0
"""What balancing costs and gives a served model on GPUs: ``python -m benchmarks.served_cuda --json PATH``.

vLLM serves a model of Qwen3-30B-A3B's shape (fewer layers, dummy weights) on two expert-parallel GPUs: without
balancing, with vLLM's own balancer (asynchronous, its default, and synchronous) and with this one, one after the other
in the same way, without balancing once more at the end. Routers are skewed on purpose, and alike in all of them: rank 0
holds the experts that are asked for most, and one expert of a layer is asked for up to twice as often as another. Steps
are timed where they arrive, in the front end: decoding, all requests together, and prefilling in full chunks. The exit
status is 1 if a balancer moved nothing. PATH may be a pipe.

On a machine without GPUs ``--tiny`` runs it on the CPU in small, to see that it runs; vLLM's own balancer is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODES = ("off", "vllm async", "vllm sync", "ours", "off again")
REDUNDANT, SKEW = 4, 0.35


@dataclass(frozen=True)
class Size:
    """How much is served: layers, requests at a time, tokens of each, steps before any is timed, chunks of prompts that
    are prefilled, tokens of a prompt and of a chunk; and the steps of a window."""

    layers: int
    requests: int
    tokens: int
    settle: int
    prefills: int
    prompt: int
    chunk: int
    interval: int


FULL = Size(layers=24, requests=512, tokens=1500, settle=1000, prefills=40, prompt=4096, chunk=8192, interval=300)
TINY = Size(layers=2, requests=8, tokens=60, settle=40, prefills=2, prompt=64, chunk=128, interval=20)

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


def engine_arguments(mode: str, size: Size, tiny: bool) -> dict[str, Any]:
    balancer: dict[str, Any] = {}
    if mode == "ours":
        settings = {
            "dynamic_eplb": True,
            "num_redundant_experts": REDUNDANT,
            "expert_heat_collection_interval": size.interval,
        }
        balancer = {"additional_config": {"eplb_config": settings}}
    elif mode.startswith("vllm"):
        theirs = {"window_size": size.interval, "step_interval": size.interval, "num_redundant_experts": REDUNDANT}
        by = {"use_async": True} if mode == "vllm async" else {"use_async": False, "communicator": "torch_nccl"}
        balancer = {"enable_eplb": True, "eplb_config": theirs | by}
    device = {"gpu_memory_utilization": 0.85, "attention_backend": "TRITON_ATTN", "disable_custom_all_reduce": True}
    return {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "seed": 0,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": mode == "ours" or not tiny,  # which vLLM alone cannot do on a CPU
        "enable_prefix_caching": False,
        "max_num_seqs": size.requests,
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


def serve(mode: str, size: Size, tiny: bool) -> dict[str, Any]:
    """One engine from its start to its end, and what was measured."""
    from vllm import LLM

    from benchmarks import served_cuda as here  # by a name that workers can import

    shape = SHAPE | {"num_hidden_layers": size.layers} | (IN_SMALL if tiny else {})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        llm = LLM(folder, **engine_arguments(mode, size, tiny))
        assert set(llm.collective_rpc(here.skew_routers, args=(SKEW,))) == {size.layers}
        if mode.startswith("vllm"):
            llm.collective_rpc(here.moved_by_vllm)
        engine, vocabulary = llm.llm_engine, int(str(shape["vocab_size"]))

        def prompts(count: int, length: int) -> list[list[int]]:
            return [
                [(7919 * (request * length + at)) % (vocabulary - 1) + 1 for at in range(length)]
                for request in range(count)
            ]

        for _ in timed(engine, prompts(size.requests, 8), size.settle):
            pass
        began = time.perf_counter()
        for _ in timed(engine, prompts(size.prefills * size.chunk // size.prompt, size.prompt), 1):
            pass
        prefill = size.prefills * size.chunk / (time.perf_counter() - began)
        steps = [
            seconds for seconds, rows in timed(engine, prompts(size.requests, 8), size.tokens) if rows == size.requests
        ][20:-20]
        result = {
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": size.requests * len(steps) / sum(steps),
            "steps": len(steps),
            "step_median_ms": 1e3 * statistics.median(steps),
            "step_p99_ms": 1e3 * sorted(steps)[int(0.99 * len(steps))],
            "step_longest_ms": 1e3 * max(steps),
        }
        if mode == "ours":
            from vllm_ascend_eplb.observe.stats_file import read_stats, stats_path

            path = stats_path()
            stats = read_stats(path) if path else None
            assert stats is not None
            assert stats.window is not None
            result |= {
                "moved": stats.experts_moved,
                "cycles_done": stats.cycles_done,
                "cycles_skipped": stats.cycles_skipped,
                "par": stats.window.par.mean,
                "par_start": stats.window.par_start.mean,
            }
        elif mode.startswith("vllm"):
            result["moved"] = llm.collective_rpc(here.moved_by_vllm)[0]
        engine.engine_core.shutdown()
    return result


def run(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.served_cuda", "--mode", mode, "--json", str(answer)]
        environment = {
            **os.environ,
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "EPLB_STATS_FILE": f"{folder}/stats.json",
        }
        if arguments.tiny:
            from examples.demo.server import cpu_environment

            command.append("--tiny")
            environment |= cpu_environment(2)
        subprocess.run([*command, "--layers", str(arguments.layers)], env=environment, check=True, timeout=1200)
        return dict(json.loads(answer.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the results; may be a pipe")
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    parser.add_argument("--layers", type=int, default=0, help="of the model")
    parser.add_argument("--mode", choices=MODES, help="only this one, in this process; the result is not compared")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else FULL
    if arguments.layers:
        size = Size(**{**asdict(size), "layers": arguments.layers})
    if arguments.mode:
        arguments.json.write_text(json.dumps(serve(arguments.mode, size, arguments.tiny)))
        return 0
    arguments.layers = size.layers
    results = {}
    for mode in [mode for mode in MODES if not (arguments.tiny and mode.startswith("vllm"))]:
        results[mode] = run(mode, arguments)
        print(mode, json.dumps(results[mode]), flush=True)
    off = {key: (results["off"][key] + results["off again"][key]) / 2 for key in results["off"]}
    report = {
        "benchmark": "served_cuda",
        "machine": _machine(),
        **asdict(size),
        "redundant": REDUNDANT,
        "skew": SKEW,
        "results": results,
        "over_off": {
            mode: {key: result[key] / off[key] for key in off if key != "steps"} for mode, result in results.items()
        },
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(any(result.get("moved") == 0 for result in results.values()))


def _machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{os.cpu_count()} cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
