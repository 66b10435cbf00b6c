# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend, started as users do: ``vllm serve`` with one flag for the balancer.

On emulated NPUs vllm-ascend is unpacked in build/stack, or, with NPU_TEST_ASCEND=0.30.0rc2, the release candidate in
build/stack-0.30.0rc2. On real NPUs it is the installed one. With NPU_TEST_RUNNER=V2 the candidate uses its second model
runner.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx

from examples.demo.server import MAX_TOKENS_PER_REQUEST, MODEL, Server
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import read_stats

from ..e2e.nursery import Nursery
from ..processes import parent, title
from . import npus

RELEASE = "0.23.0.post1"
ASCEND = os.environ.get("NPU_TEST_ASCEND", RELEASE)
"""The version of vllm-ascend that is tested."""
STACK = npus.ROOT / "build" / ("stack" if ASCEND == RELEASE else f"stack-{ASCEND}")
SECOND_RUNNER = os.environ.get("NPU_TEST_RUNNER") == "V2"
"""True if vllm-ascend uses its second model runner."""
STANDINS = npus.ROOT / "tests" / "npu" / "standins"
MISSING = "" if (STACK / ".stamp").exists() else f"no vllm-ascend: run scripts/setup_npu_stack.sh {ASCEND}"
START_SECONDS = 800
SOC = {"A2": "Ascend910B3", "A3": "Ascend910_9391"}
MAX_SEQUENCES = 16
"""Sequences served at a time. A decode batch of them all is the largest that vllm-ascend sends by MC2."""
TOKENS = 32
"""Tokens per answer."""
SETTINGS: dict[str, object] = {
    "dynamic_eplb": True,
    "num_redundant_experts": 2,
    "expert_heat_collection_interval": 12,
    "algorithm_execution_interval": 2,
    "transfer_buffer_experts": 16,
    "target_par": 1.0,
    "min_gain": 0.0,
}
COMPILING = {
    "TORCHDYNAMO_DISABLE": "0",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
}
"""vllm-ascend captures graphs of compiled models only. The caches are off, because torch 2.13 cannot cache
vllm-ascend's operators. Some operators return their argument; torch warns of that, and refuses it if CI is set.
"""

UPSTREAM = (
    "vllm/v1/worker/gpu_model_runner.py:267 in __init__",
    "vllm_ascend/worker/model_runner_v1.py:1655 in _copy_valid_sampled_token_count",
    "vllm/v1/worker/gpu_model_runner.py:322 in __init__",
    "vllm_ascend/worker/model_runner_v1.py:1890 in _copy_valid_sampled_token_count",
    "vllm/v1/worker/gpu/async_utils.py:254 in async_copy_to_np",
    "vllm_ascend/worker/v2/model_runner.py:1101 in _copy_num_computed_tokens_to_cpu",
)
"""Copies to the host in vllm-ascend's own runners. In the first runner of 0.23.0.post1 and of 0.30.0rc2: of sampled
tokens and of the number of accepted draft tokens. In the second runner of 0.30.0rc2: of sampled tokens and of the
number of computed tokens."""


PRELOADED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm_ascend.ops",  # before the runner, as in a worker: they import each other
    "vllm_ascend.worker.model_runner_v1",
)
"""Modules from which programs with vllm-ascend's modules and front ends are forked (npus.nursery)."""


def python_path() -> str:
    path = f"{npus.ROOT}:{STACK / 'site'}:{STACK / 'packages'}:{STANDINS}"
    return f"{path}:{STACK / 'triton'}" if SECOND_RUNNER else path


def environment(report: Path, device: str = "A2", **settings: str) -> dict[str, str]:
    """The environment in which the stack runs.

    Args:
        report: file for reports of the race detector.
        device: A2 or A3.
    """
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if SECOND_RUNNER else {}
    if npus.REAL:
        return npus.environment(**runner, **settings)
    values = npus.environment(
        PYTHONPATH=python_path(),
        EMULATED_NPU_RACE="report",
        EMULATED_NPU_COMM_ORDER="report",
        EMULATED_NPU_MEMORY_MB="2048",
        EMULATED_NPU_REPORT=str(report),
        EMULATED_NPU_SOC=SOC[device],
        EMULATED_NPU_DEVICE_TYPE=device,
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=str(STACK / "cache"),  # another vLLM would look at a model again, in a process of its own
        TORCHDYNAMO_DISABLE="1",
    )
    values.pop("VLLM_PLUGINS", None)
    values.pop("DYNAMIC_EPLB", None)
    if SECOND_RUNNER:
        values["TRITON_INTERPRET"] = "1"
    return {**values, **runner, **settings}


def prompts(per_domain: int, characters: int = 160) -> list[list[str]]:
    """Batches of prompts, one per domain."""
    batches = []
    for path in sorted((MODEL / "prompts").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()[:per_domain]
        batches.append([json.loads(line)["prompt"][:characters] for line in lines])
    return batches


def quantised_model(folder: Path, form: str) -> None:
    """Write the model in W8A8 or W4A8 into a new folder (quantised.py)."""
    folder.mkdir()
    _on_the_cpu("tests.npu.quantised", folder, form)


def model_with_drafter(folder: Path) -> None:
    """Write a model with a draft model in its checkpoint, both with experts, into a new folder (e2e/mtp_model.py)."""
    _on_the_cpu("tests.e2e.mtp_model", folder)


def model_of_deepseeks_class(folder: Path) -> None:
    """Write a model whose class loads its experts by itself into a new folder (e2e/deepseek_model.py)."""
    _on_the_cpu("tests.e2e.deepseek_model", folder)


def drafter_without_experts(folder: Path) -> None:
    """Write an EAGLE-3 draft model for examples/tiny_moe into a new folder (e2e/eagle3_model.py)."""
    _on_the_cpu("tests.e2e.eagle3_model", folder)


def transformers_tokens(
    folder: Path, texts: list[str], tokens: int, quantised: Path | None = None, model: Path = MODEL
) -> list[list[int]]:
    """Greedy tokens of a model in transformers (reference.py).

    Args:
        folder: for the files of the job and the answer.
        texts, tokens: prompts, and the number of tokens per answer.
        quantised: folder of the same model of :func:`quantised_model`, if that is to answer.
        model: folder of the model.
    """
    job, answer = folder / "transformers.json", folder / "transformers-answer.json"
    job.write_text(json.dumps({"texts": texts, "tokens": tokens, "model": str(model)}))
    _on_the_cpu("tests.npu.reference", job, answer, *(() if quantised is None else (quantised,)))
    return json.loads(answer.read_text())


def _on_the_cpu(module: str, *arguments: Path | str) -> None:
    result = subprocess.run(
        [str(npus.PYTHON), "-m", module, *map(str, arguments)],
        cwd=npus.ROOT,
        env=npus.environment(
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
            HF_HUB_OFFLINE="1",
            **({} if npus.REAL else {"PYTHONPATH": f"{npus.ROOT}:{STACK / 'packages'}:{STANDINS}"}),
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


CLIENT = httpx.Client(timeout=300, trust_env=False, limits=httpx.Limits(keepalive_expiry=1))
"""Used by all threads and for all servers: to make a client takes longer than a step. It closes connections before the
servers do, after five seconds."""


class NpuServer(Server):
    """``vllm serve`` of the stack.

    Args:
        eplb_config: the one flag; None for a server without it.
        folder: an empty folder for its log, statistics and reports.
        ranks: tensor-parallel and expert-parallel size.
        device, dtype, model: the emulated device, and the model with its dtype.
        graphs: batch sizes for which graphs of the compiled model are captured; empty for an eager model.
        graph_mode: vLLM's cudagraph_mode.
        probe: the workers have the methods of tests.npu.probe.Probe, for :meth:`call`.
        arguments: further arguments for ``vllm serve``.
        beside: vllm-ascend's settings beside ``eplb_config``.
        parts: the names of the balancers, if there are several.
        spawned: ``vllm serve`` as users start it, as always on real NPUs; otherwise front_end.py.
        nursery: the front end is forked, too, from this process.
        settings: environment variables.
    """

    def __init__(
        self,
        eplb_config: dict[str, object] | None,
        folder: Path,
        ranks: int = 2,
        device: str = "A2",
        dtype: str = "float32",
        model: str = str(MODEL),
        graphs: tuple[int, ...] = (),
        graph_mode: str = "FULL_DECODE_ONLY",
        probe: bool = False,
        arguments: tuple[str, ...] = (),
        beside: dict[str, object] | None = None,
        parts: tuple[str, ...] = (),
        spawned: bool = npus.REAL,
        nursery: Nursery | None = None,
        **settings: str,
    ) -> None:
        super().__init__(ranks, {}, folder, MAX_SEQUENCES)
        self.report = folder / "races.txt"
        self.parts, self._nursery = parts, nursery
        port = self.url.rpartition(":")[2]
        additional = {**({} if eplb_config is None else {"eplb_config": eplb_config}), **(beside or {})}
        captured = {"cudagraph_mode": graph_mode, "cudagraph_capture_sizes": graphs}
        self.command = [
            *(str(npus.PYTHON), "-m"),
            *("vllm.entrypoints.cli.main" if spawned else "tests.npu.front_end", "serve", model),
            *("--served-model-name", "tiny-moe", "--dtype", dtype),
            *(("--compilation-config", json.dumps(captured)) if graphs else ("--enforce-eager",)),
            *("--host", "127.0.0.1", "--port", port, "--uvicorn-log-level", "warning"),
            *("--tensor-parallel-size", str(ranks), "--enable-expert-parallel"),
            *("--max-model-len", str(MAX_TOKENS_PER_REQUEST), "--max-num-seqs", str(MAX_SEQUENCES)),
            "--no-enable-prefix-caching",
            *(() if npus.REAL else ("--num-gpu-blocks-override", "256")),
            *(("--additional-config", json.dumps(additional)) if additional else ()),
            *(("--worker-extension-cls", "tests.npu.probe.Probe") if probe else ()),
            *arguments,
        ]
        if graphs:
            settings |= COMPILING
        if probe:
            settings["VLLM_SERVER_DEV_MODE"] = "1"  # serves /collective_rpc
        own = {key: self.environment[key] for key in ("EPLB_STATS_FILE", "VLLM_RPC_BASE_PATH")}
        self.environment = environment(self.report, device, **own, **settings)

    def start(self) -> None:
        if self._nursery is None:
            super().start()
        else:  # without "python -m"
            arguments = self.command[2:]
            self._process = self._nursery.fork("nursery:run_module", arguments, self.environment, self.log_path)

    def started(self) -> NpuServer:
        self.start()
        try:
            for _ in self.wait_until_ready(START_SECONDS):
                pass
        except BaseException:  # also Ctrl-C
            self.stop(5)
            raise
        return self

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def all_stats(self) -> list[EplbStats | None]:
        """The last report of every balancer."""
        path = self.stats_path
        return [read_stats(path.with_stem(f"{path.stem}-{part}".rstrip("-"))) for part in self.parts] or [self.stats()]

    def cycles_done(self) -> int:
        """The number of completed cycles, of the balancer with the fewest."""
        return min(stats.cycles_done if stats else 0 for stats in self.all_stats())

    def cycles_tried(self) -> int:
        """The number of completed and dropped cycles, of the balancer with the fewest."""
        return min(stats.cycles_done + stats.cycles_failed if stats else 0 for stats in self.all_stats())

    def planners(self) -> list[int]:
        """Ids of the planners, which are spawned children of workers."""
        return [
            process
            for process in self.processes()
            if "spawn_main" in title(process) and "Worker" in title(parent(process))
        ]

    def races(self) -> list[str]:
        """The reports of the race detector so far."""
        text = self.report.read_text() if self.report.exists() else ""
        return [part for part in text.split("\n[") if part.strip()]

    def unexpected_races(self) -> list[str]:
        """The reports except those of upstream's runner, which copies sampled tokens to the host on its own stream and
        frees their memory before the copy is done."""
        return [race for race in self.races() if "data race" not in race or not any(part in race for part in UPSTREAM)]

    def complete(self, texts: list[str], tokens: int, engine: int | None = None) -> list[list[int]]:
        """Greedy answers to all texts, asked at the same time.

        Args:
            engine: the data-parallel engine that answers; None leaves the choice to vLLM.
        """
        return [choice["token_ids"] for choice in self._choices(texts, tokens, engine, ignore_eos=True)]

    def complete_text(self, texts: list[str], tokens: int) -> list[str]:
        """Greedy answers in words, each until the model ends it."""
        return [choice["text"] for choice in self._choices(texts, tokens, None, ignore_eos=False)]

    def _choices(self, texts: list[str], tokens: int, engine: int | None, ignore_eos: bool) -> list[dict[str, Any]]:
        headers = {} if engine is None else {"X-data-parallel-rank": str(engine)}
        fixed = {"model": "tiny-moe", "max_tokens": tokens, "temperature": 0, "return_token_ids": True}

        def ask(text: str) -> dict[str, Any]:
            request = {**fixed, "prompt": text, "ignore_eos": ignore_eos}
            response = CLIENT.post(f"{self.url}/v1/completions", json=request, headers=headers)
            response.raise_for_status()
            return response.json()["choices"][0]

        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(ask, texts))

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples on ``/metrics`` that have all these labels (``name="value"``)."""
        lines = CLIENT.get(f"{self.url}/metrics").text.splitlines()
        lines = [line for line in lines if line.startswith(f"{name}{{") and all(label in line for label in labels)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def call(self, method: str, *arguments: int | str) -> list[Any]:
        """Call a method of tests.npu.probe.Probe on all workers."""
        request = {"method": method, "args": arguments}
        response = CLIENT.post(f"{self.url}/collective_rpc", json=request)
        response.raise_for_status()
        return response.json()["results"]


def equal(got: list[list[int]], want: list[list[int]]) -> int:
    """The number of equal tokens."""
    return sum(a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


Pairs = list[tuple[list[int], list[int]]]
"""Pairs of token sequences: the answer and the expected one."""


def serve_until(
    server: NpuServer, batches: list[list[str]], want: list[list[list[int]]], cycles: int, exact: bool = True
) -> Pairs:
    """Ask for the domains in turn, three times each, until ``cycles`` more cycles have moved experts. Returns all pairs
    of answers. With ``exact`` every token must be equal."""
    until, pairs = server.cycles_done() + cycles, []
    for number in range(60):
        batch = number // 3 % len(batches)
        got = server.complete(batches[batch], TOKENS)
        assert got == want[batch] or not exact
        pairs += zip(got, want[batch], strict=True)
        if server.cycles_done() >= until:
            return pairs
    raise AssertionError(f"{server.cycles_done()} of {until} cycles: {server.all_stats()}\n{server.log[-3000:]}")


def agreement(pairs: Pairs, tokens: int = TOKENS) -> float:
    """Share of equal tokens among those that follow equal ones, of answers of so many; behind the first difference
    everything differs."""
    prefixes = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None) for pair in pairs]
    same = sum(tokens if prefix is None else prefix for prefix in prefixes)
    return same / (same + sum(prefix is not None for prefix in prefixes))


def freeze_weights_until_noticed(server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]) -> None:
    """The negative control: from now on the server switches maps and leaves the weights, and tokens must differ. Soon
    afterwards balancing goes off, because checksums find wrong weights in the slots."""
    assert set(server.call("probe_freeze_weights")) == {"1"}
    before, same = server.cycles_tried(), 0
    for number in range(40):
        batch = number % len(batches)
        same = equal(server.complete(batches[batch], TOKENS), want[batch])
        # Checksums may drop the first cycle already, after a round that switched the maps.
        if server.cycles_tried() > before and same < 0.7 * TOKENS * len(batches[0]):
            return
    raise AssertionError(f"{same} of {TOKENS * len(batches[0])} tokens equal")
