# SPDX-License-Identifier: Apache-2.0
"""An offline engine that saves its weights as a sharded state; test_weights_out.py forks it.

In mode balance, experts move first, so that saving is refused. Then an order moves them back, and saving works.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from offline import MODEL, Engine

from vllm_ascend_eplb.balancer.orders import Order, orders_path, write_order
from vllm_ascend_eplb.observe.stats_file import stats_path

MOST_SECONDS = 300.0


def moved(worker: Any) -> int:
    """The number of slots, over all layers and ranks, whose expert is not the loaded one."""
    updator = worker.model_runner.eplb_state.updator
    now, loaded = updator.placement, updator.parts.adaptor.placement
    return int((now.physical_to_logical != loaded.physical_to_logical).sum())


def read_by_name(worker: Any) -> str:
    """The result of a user's function that reads weights by name in a worker."""
    try:
        return f"{len(list(worker.model_runner.model.named_parameters()))} parameters"
    except RuntimeError as error:
        return str(error)


def rank_of(worker: Any) -> int:
    return int(worker.rank)


def refuse_on_first(worker: Any) -> int:
    """A user's function that reads weights on one rank only."""
    if worker.rank == 0:
        worker.model_runner.model.state_dict()
    return -1


def main(job_path: str) -> None:
    from vllm import SamplingParams

    job = json.loads(Path(job_path).read_text())
    folder = job["folder"]

    engine = Engine(
        model=str(MODEL),
        dtype="float32",
        seed=0,
        max_model_len=512,
        max_num_seqs=16,
        tensor_parallel_size=2,
        enforce_eager=True,
        enable_expert_parallel=True,
        additional_config={"eplb_config": job["eplb"]},
    )
    core = engine.llm.llm_engine.engine_core
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def generate_until(moves: bool) -> None:
        end = time.monotonic() + MOST_SECONDS
        while (engine.rpc(moved)[0] > 0) is not moves:
            assert time.monotonic() < end, f"moved is still {not moves}"
            for batch in job["prompts"]:
                engine.generate(batch, sampling)

    def save() -> str:
        try:
            core.save_sharded_state(path=folder, pattern=None, max_size=5 * 1024**3)
        except Exception as error:
            return str(error)
        return ""

    result: dict[str, Any] = {}
    if job["eplb"]["mode"] == "balance":
        generate_until(True)
        result["refused"] = save()
        result["read"] = engine.rpc(read_by_name)
        try:
            engine.rpc(refuse_on_first)
        except Exception as error:
            result["refused on one rank"] = str(error)
        result["ranks"] = engine.rpc(rank_of)
        result["files"] = len(list(Path(folder).glob("*.safetensors")))
        path = stats_path("")
        assert path is not None
        write_order(orders_path(path), Order(command="restore"))
        generate_until(False)
    result["saved"] = save()
    result["read_at_last"] = engine.rpc(read_by_name)
    Path(job["result"]).write_text(json.dumps(result))
    engine.close()
