# SPDX-License-Identifier: Apache-2.0
"""Run one offline vLLM engine in its own process: ``python offline.py JOB.json RESULT.json``.

The job is a dictionary: ``ranks`` (tensor-parallel), ``eplb`` (the eplb_config or null), ``compile``, ``arguments``
(more of the engine's), ``variables`` (of its environment), ``max_tokens``, ``prompts`` (a list of batches), ``cycles``
(the prompts are repeated until so many cycles are done), ``parts`` (which data-parallel part gets them, turn by turn),
``pattern`` (a regular expression that the answers to the first batch must match in the end), ``reload`` (in the end
weights are loaded anew), ``under_way`` (data-parallel parts that are asked to reload while requests are under way, turn
by turn; null for all, while they are paused), ``sleeps`` (levels: in the end the engine sleeps with each of them, see
allocator.py), ``updates`` (factors: in the end a trainer transfers the experts' weights times each of them, see
transfer_engine.py; after each sleep and each update the prompts are repeated until experts have moved again), ``turns``
and ``seconds`` (the updates are taken in so many turns, for at most so long, each after a sleep; see turns.py),
``routing`` (in the end layers are asked for what is refused), ``contents`` (what slots hold, at first and in the end),
``drafter`` (it is watched, and it is what gets corrupted), ``split`` (steps with micro-batches are counted) and
``probe`` / ``corrupt`` (see probes.py; what is corrupted is corrupted after all that, for one more turn). The result
holds the token ids of every prompt, turn by turn, and how many tokens went through the model if none came from a cache.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_TURNS = 60
MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe"

EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""In the environment of engines that are eager. vLLM compiles a function of its embedding even in an eager engine of
several ranks, and the first step of such an engine waits for the compiler."""


def environment(ranks: int) -> dict[str, str]:
    """Environment variables of vLLM's CPU backend for ``ranks`` workers on a small machine."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Engine:
    """A vLLM engine of one or several data-parallel parts, with one interface for both."""

    def __init__(self, **arguments: Any) -> None:
        from vllm import LLM, AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.parts = arguments.get("data_parallel_size", 1)
        self._requests = 0
        if self.parts == 1:
            self.llm = LLM(**arguments)
        else:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._many = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result; an engine that has ended answers some calls never."""
        asked = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        while not concurrent.futures.wait([asked], timeout=5.0).done:
            if self._many.errored:
                raise RuntimeError("an engine has ended")
        return asked.result()

    def rpc(
        self, function: Callable[..., Any] | str, *args: Any, parts: Sequence[int] | None = None, **keywords: Any
    ) -> list[Any]:
        """Call ``function(worker, *args, **keywords)``, or the worker's method of this name, in every worker, or in
        those of some data-parallel parts; return the results in rank order."""
        if self.parts == 1:
            return self.llm.collective_rpc(function, args=args, kwargs=keywords)
        called = range(self.parts) if parts is None else parts
        results = self._run(self._call(function, args, keywords, called))
        return [result for part in results for result in part]

    async def _call(
        self, function: Callable[..., Any] | str, args: tuple[Any, ...], keywords: dict[str, Any], parts: Sequence[int]
    ) -> list[list[Any]]:
        """The results of data-parallel parts; vLLM before 0.32 has no public function for this."""
        core = self._many.engine_core
        asked = (
            core._call_utility_async("collective_rpc", function, None, args, keywords, engine=core.core_engines[part])
            for part in parts
        )
        return await asyncio.gather(*asked)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No part makes a step meanwhile; requests are kept."""
        if self.parts > 1:
            self._run(self._many.pause_generation(mode="keep"))
        yield
        if self.parts > 1:
            self._run(self._many.resume_generation())

    def generate(self, prompts: list[str], sampling: Any, part: int | None = None) -> list[Any]:
        """Answers to all prompts, asked at the same time, from one data-parallel part, or from any (None)."""
        if self.parts == 1:
            return self.llm.generate(prompts, sampling, use_tqdm=False)
        return self._run(self._gather(prompts, sampling, part))

    @contextlib.contextmanager
    def generating(self, prompts: list[str], sampling: Any) -> Iterator[list[Any]]:
        """The block runs when every prompt has a token of its answer; the list has the answers afterwards."""
        outputs: list[Any] = []
        before, asked = (
            len(self._begun),
            asyncio.run_coroutine_threadsafe(self._gather(prompts, sampling, None), self._loop),
        )
        while len(self._begun) < before + len(prompts) and not asked.done():
            time.sleep(0.001)
        yield outputs
        outputs += asked.result()

    def unfinished(self) -> int:
        """Requests that have a token, but not the last one."""
        return len(self._begun - self._ended)

    async def _gather(self, prompts: list[str], sampling: Any, part: int | None) -> list[Any]:
        async def ask(prompt: str) -> Any:
            self._requests += 1
            name = str(self._requests)
            async for output in self._many.generate(prompt, sampling, request_id=name, data_parallel_rank=part):
                self._begun.add(name)
                last = output
            self._ended.add(name)
            return last

        return await asyncio.gather(*(ask(prompt) for prompt in prompts))

    def update_weights(self, factor: float) -> None:
        """Transfer weights as a trainer does, in two parts, to the stand-in of transfer_engine.py."""
        with self.paused():
            self.rpc("start_weight_update")
            for part in (0, 1):
                self.rpc("update_weights", update_info={"factor": factor, "part": part})
            self.rpc("finish_weight_update")

    def sleep(self, level: int) -> None:
        """Sleep and wake up; after level 2, load the weights again."""
        import weight_probes

        if self.parts > 1:  # vLLM pauses all parts before sleep, and resumes when they have all memory again
            self._run(self._many.sleep(level))
            self._run(self._many.wake_up(["weights"]))
        else:
            self.rpc("sleep", level)
            self.rpc("wake_up")
        if level == 2:
            self.rpc(weight_probes.load_again)
        if self.parts > 1:
            self._run(self._many.wake_up(["kv_cache"]))

    def close(self) -> None:
        if self.parts == 1:
            self.llm.llm_engine.engine_core.shutdown()
        else:
            self._many.shutdown()


def report_at_rest(engine: Engine) -> list[Any]:
    """The reports of all workers. Data-parallel engines make dummy steps for a while after the last request, in which
    experts may still move, so they are asked until they have made none for a second."""
    import probes

    def steps(reports: list[Any]) -> list[int]:
        return [report.get("step", 0) for report in reports]

    ranks: list[Any] = engine.rpc(probes.report)
    before: list[int] = []
    while engine.parts > 1 and before != steps(ranks):
        before = steps(ranks)
        time.sleep(1.0)
        ranks = engine.rpc(probes.report)
    return ranks


def main(job_path: str, result_path: str) -> None:
    import probes
    import weight_probes
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    job = json.loads(Path(job_path).read_text())
    arguments = {
        "model": str(MODEL),
        "dtype": "float32",
        "seed": 0,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "tensor_parallel_size": job["ranks"],
        "enforce_eager": not job.get("compile", False),
    }
    if job["eplb"] is not None:
        arguments |= {"enable_expert_parallel": True, "additional_config": {"eplb_config": job["eplb"]}}
    engine = Engine(**(arguments | job.get("arguments", {})))
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    result: dict[str, object] = {}
    if job.get("probe"):
        engine.rpc(probes.install)
    if job.get("split"):
        engine.rpc(probes.watch_split)
    if any(job.get(name) for name in ("reload", "under_way", "sleeps", "turns")):
        engine.rpc(weight_probes.remember_weights)
    if job.get("sleeps") or job.get("turns"):
        import allocator

        engine.rpc(allocator.remember)
    if job.get("drafter"):
        engine.rpc(probes.watch_drafter)
    if job.get("contents"):
        result["contents_loaded"] = engine.rpc(probes.contents)
    tokens, computed, cached = [], 0, 0
    parts = job.get("parts", [None])

    def ask(part: int | None = None) -> list[Any]:
        return [output for batch in job["prompts"] for output in engine.generate(batch, sampling, part)]

    def token_ids(outputs: list[Any]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in outputs]

    def done() -> int:
        return max(engine.rpc(probes.cycles_done), default=0)

    def ask_until_moved() -> list[list[int]]:
        """Answers, turn by turn, until one more cycle is done; of one turn without balancing."""
        wanted = done() + 1 if job["eplb"] is not None else 0
        answers: list[list[int]] = []
        for _ in range(MOST_TURNS):
            answers += token_ids(ask())
            if done() >= wanted:
                return answers
        raise RuntimeError(f"experts did not move in {MOST_TURNS} turns")

    for turn in range(MOST_TURNS):
        outputs = ask(parts[turn % len(parts)])
        tokens += token_ids(outputs)
        computed += sum(len(output.prompt_token_ids) + job["max_tokens"] - 1 for output in outputs)
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
        if turn + 1 >= len(parts) and done() >= job.get("cycles", 0):
            break
    result["tokens"], result["computed"], result["cached"] = tokens, computed, cached
    if job.get("pattern"):
        shaped = SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            structured_outputs=StructuredOutputsParams(regex=job["pattern"]),
        )
        result["texts"] = [output.outputs[0].text for output in engine.generate(job["prompts"][0], shaped)]
    if job.get("reload"):
        result["reloads"] = engine.rpc(weight_probes.reload_weights)
        result["tokens_after"] = token_ids(ask()) + token_ids(ask())
    result["under_way"] = []
    for called in job.get("under_way", []):
        engine.rpc(weight_probes.shorten_meetings, 60.0 if called is None else 1.5)
        told, waiting = "", engine.paused() if called is None else contextlib.nullcontext()
        with engine.generating([text for batch in job["prompts"] for text in batch], sampling) as outputs, waiting:
            unfinished = engine.unfinished()
            try:
                engine.rpc(weight_probes.reload_weights, parts=called)
            except Exception as error:
                told = str(error)
            mine = engine.rpc(weight_probes.updated) if called is None else []
        after = ask_until_moved()
        result["under_way"].append(
            {"unfinished": unfinished, "error": told, "ranks": mine, "tokens": token_ids(outputs) + after}
        )
    result["sleeps"] = []
    for level in job.get("sleeps", []):
        engine.sleep(level)
        mine = engine.rpc(weight_probes.updated) if job["eplb"] is not None else []
        result["sleeps"].append({"ranks": mine, "tokens": ask_until_moved()})
    result["updates"] = []
    if job.get("turns"):
        import turns

        result["turns"] = turns.take(engine, lambda: token_ids(ask()), job["turns"], job["seconds"], job.pop("updates"))
    for factor in job.get("updates", []):
        engine.update_weights(factor)
        mine = engine.rpc(weight_probes.updated) if job["eplb"] is not None else []
        result["updates"].append({"ranks": mine, "tokens": ask_until_moved()})
    if job.get("routing"):
        result["routing"] = engine.rpc(probes.routing_that_is_refused)
    if job["eplb"] is not None:
        result["ranks"] = report_at_rest(engine)
    if job.get("drafter"):
        result["drafters"] = engine.rpc(probes.report_of_drafter)
    if job.get("contents"):
        result["contents_moved"] = engine.rpc(probes.contents)
    if job.get("corrupt"):
        engine.rpc(probes.switch_maps_without_weights, bool(job.get("drafter")))
        result["corrupt_tokens"] = token_ids(ask())
        result["corrupt_views"] = engine.rpc(probes.views_agree)
        if job.get("drafter"):
            result["corrupt_drafts"] = engine.rpc(probes.report_of_drafter)[0]["drafts"]
    engine.close()
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
