# SPDX-License-Identifier: Apache-2.0
"""Functions that run inside vLLM's workers and give them other weights, as trainers do. See probes.py."""

from __future__ import annotations

from typing import Any

import torch
from probes import state_of


def remember_weights(worker: Any) -> None:
    """Keep a copy of all loaded weights, and count scheduled tokens."""
    worker.eplb_weights = {name: tensor.clone() for name, tensor in worker.model_runner.model.named_parameters()}
    worker.eplb_drafts, worker.eplb_most_tokens = 0, 0
    execute = worker.model_runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        worker.eplb_drafts += sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        worker.eplb_most_tokens = max(worker.eplb_most_tokens, scheduler_output.total_num_scheduled_tokens)
        return execute(scheduler_output, *args, **kwargs)

    worker.model_runner.execute_model = execute_model


def reload_weights(worker: Any) -> dict[str, Any]:
    """Load the weights of the start again, by name and by reload; both go back to the initial placement."""
    state, updator = state_of(worker), state_of(worker).updator
    result = {"placement": updator.placement.digest, "phase": updator.state.phase.name, "drafts": worker.eplb_drafts}
    norms = {name: tensor for name, tensor in worker.eplb_weights.items() if name.endswith("norm.weight")}
    with torch.no_grad():
        worker.model_runner.model.load_weights(iter(norms.items()))
    result["by_name"], result["norms"] = updator.placement.digest, len(norms)
    with torch.no_grad():
        worker.reload_weights(weights_iterator=iter(worker.eplb_weights.items()), is_checkpoint_format=False)
    result["moved"] = sum(
        not bool(torch.equal(tensor, worker.eplb_weights[name]))
        for name, tensor in worker.model_runner.model.named_parameters()
    )
    result.update(
        placement_after=updator.placement.digest,
        initial=state.updator.parts.adaptor.placement.digest,
        most_tokens=worker.eplb_most_tokens,
        cycle=updator.state.cycle,
    )
    return result


def shorten_meetings(worker: Any, seconds: float) -> None:
    """How long the ranks of one engine wait for those of the others."""
    from vllm_ascend_eplb.adaptors.vllm import state

    state.MEETING_SECONDS = seconds


def load_again(worker: Any) -> None:
    """Load the weights of the start again after they were lost."""
    with torch.no_grad():
        worker.reload_weights(weights_iterator=iter(worker.eplb_weights.items()), is_checkpoint_format=False)


def updated(worker: Any) -> dict[str, Any]:
    """The placement in force, the initial placement, the number of cycles, and whether balancing is paused."""
    updator = state_of(worker).updator
    return {
        "placement": updator.placement.digest,
        "initial": updator.parts.adaptor.placement.digest,
        "cycle": updator.state.cycle,
        "paused": updator.state.paused,
    }


def order(worker: Any, command: str) -> None:
    """Give an order to the balancer, as an operator does."""
    from vllm_ascend_eplb.balancer.orders import Order, write_order

    box = state_of(worker).updator.parts.orders
    if box is not None:
        write_order(box.path, Order(command=command))
        box.look()
