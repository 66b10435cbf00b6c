# SPDX-License-Identifier: Apache-2.0
"""Functions that run inside vLLM's workers and observe the routers and kernels.

They are sent by name, so every worker needs this folder on its path; conftest.py puts it there.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch


class Probe:
    """Observations of one worker.

    Attributes:
        tokens: tokens of requests in the current forward, by the scheduler; where each rank has a part of a request,
            tokens of the parts.
        windows: the routers' own choices per window, counted without the package.
        loads: the load that the planner got for the same windows.
        taken: the counts of this rank's recorder at the end of every window.
        masks: the (token, k) pairs that every call computed.
        wrong_experts: pairs of this rank's tokens that were sent to a slot with another expert.
        padded_rows: padding rows that this rank routed, in steps with requests.
        history: step, phase and placement of every step.
        idle: the longest run of steps without a request.
        ahead: steps that were scheduled before the tokens of the previous step were known.
        split: steps with requests whose batch was split into micro-batches.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.tokens = 0
        self.windows: list[np.ndarray] = []
        self.loads: list[np.ndarray] = []
        self.taken: list[np.ndarray] = []
        self.counts = np.zeros(shape, dtype=np.int64)
        self.masks: list[torch.Tensor] = []
        self.wrong_experts = 0
        self.padded_rows = 0
        self.history: list[tuple[int, int, int]] = []
        self.idle = 0
        self.ahead = 0
        self.split = 0


def state_of(worker: Any) -> Any:
    return worker.model_runner.eplb_state


def _counted(updator: Any) -> np.ndarray:
    """[L]: pairs that the recorder has counted since the last snapshot."""
    recorder = updator.parts.recorder
    recorder.flush(updator.placement)
    return recorder.window().sum(axis=(0, 2))


def install(worker: Any) -> None:
    from vllm.distributed.parallel_state import (
        get_dp_group,
        get_ep_group,
        get_pcp_group,
        get_pp_group,
        get_tensor_model_parallel_rank,
    )
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.platforms import current_platform
    from vllm.v1.worker.ubatching import dbo_current_ubatch_id

    runner, state = worker.model_runner, state_of(worker)
    updator = state.updator
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        # vLLM makes these in the profile run, which its CPU worker skips for eager engines
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
    shape = (updator.placement.num_layers, updator.placement.num_experts)
    worker.eplb_probe = probe = Probe(shape)
    idle = [0]
    sliced = state.slice.parts > 1  # each tensor-parallel rank routes a part of the batch

    routers = [module.router for module in runner.model.modules() if _has_router(module, BaseRouter)]
    routers = list({id(router): router for router in routers}.values())
    assert len(routers) == shape[0], f"{len(routers)} routers for {shape[0]} layers"
    chosen: dict[int, torch.Tensor] = {}
    micro_batches: list[slice] = []  # rows of the batch; empty if it is not split

    def captured(layer: int, ids: torch.Tensor) -> None:
        first = get_tensor_model_parallel_rank() * len(ids) if sliced else 0
        if micro_batches:
            first += micro_batches[dbo_current_ubatch_id()].start
        real = min(max(probe.tokens - first, 0), len(ids))
        if probe.tokens:
            probe.padded_rows += len(ids) - real
        chosen[layer] = ids.clone()
        np.add.at(probe.counts[layer], ids[:real].reshape(-1).long().cpu().numpy(), 1)

    for layer, router in enumerate(routers):
        router.set_capture_fn(lambda ids, layer=layer: captured(layer, ids))

    snapshot, step, prepare = updator.parts.recorder.snapshot, updator.forward_before, state.prepare_forward
    execute, dummy = runner.execute_model, runner._dummy_run
    calls = [0]

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):  # the V2 runner's dummy run calls this function
            return execute(scheduler_output, *args, **kwargs)
        probe.tokens = scheduler_output.total_num_scheduled_tokens
        idle[0] = 0
        batch = getattr(runner, "input_batch", None)  # the V2 runner has none
        probe.ahead += getattr(batch, "prev_sampled_token_ids", None) is not None
        return execute(scheduler_output, *args, **kwargs)

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        probe.tokens = 0
        idle[0] += 1
        probe.idle = max(probe.idle, idle[0])
        return dummy(*args, **kwargs)

    def watched_prepare(model_config: Any, tokens: int, parts: list[Any] | None = None) -> None:
        micro_batches[:] = [part.token_slice for part in parts or ()]
        probe.split += bool(micro_batches and probe.tokens)
        if probe.tokens and get_pcp_group().world_size > 1:
            probe.tokens = tokens  # this rank's part of the requests
        prepare(model_config, tokens, parts)

    def watched_step(**kwargs: Any) -> None:
        step(**kwargs)
        probe.history.append((updator.state.step, int(updator.state.phase), updator.placement.digest))

    def counted_snapshot(placement: Any) -> None:
        probe.windows.append(probe.counts.copy())
        probe.counts[:] = 0
        probe.taken.append(_counted(updator))
        snapshot(placement)

    def first_of_mine(rows: int) -> int:
        """Index of this rank's first token among those gathered from all ranks."""
        metadata = get_forward_context().dp_metadata
        if metadata is None:
            return get_pcp_group().rank_in_group * (rows // get_pcp_group().world_size)
        sizes = metadata.get_chunk_sizes_across_dp_rank()
        assert sum(sizes) == rows
        return sum(sizes[: (get_ep_group() if sliced else get_dp_group()).rank_in_group])

    def watched_compute(output: Any, hidden: Any, w1: Any, w2: Any, b1: Any, b2: Any, weights: Any, ids: Any,
                        expert_map: Any, *rest: Any) -> None:  # fmt: skip
        layer = calls[0] % shape[0]
        calls[0] += 1
        probe.masks.append(expert_map[ids.long()] >= 0)
        first, wanted = first_of_mine(len(ids)), chosen[layer].long()
        mine = ids[first : first + len(wanted)].long()
        held = torch.from_numpy(updator.placement.physical_to_logical[layer].astype(np.int64))[mine]
        probe.wrong_experts += int((held != wanted).sum())
        compute(output, hidden, w1, w2, b1, b2, weights, ids, expert_map, *rest)

    runner.execute_model, runner._dummy_run = execute_model, dummy_run
    state.prepare_forward = watched_prepare
    updator.forward_before = watched_step
    updator.parts.recorder.snapshot = counted_snapshot
    if current_platform.is_cpu():  # where the experts are computed in Python
        from vllm_ascend_eplb.adaptors.vllm import cpu

        compute = cpu.cpu_local_experts
        cpu.cpu_local_experts = watched_compute
    if updator.parts.planner is not None:
        submit = updator.parts.planner.submit

        def watched_submit(request: Any) -> None:
            probe.loads.append(request.load.sum(axis=0))
            submit(request)

        updator.parts.planner.submit = watched_submit


def watch_split(worker: Any) -> None:
    """Count the steps whose batch is split into micro-batches, where graphs are replayed and no router can be asked."""
    state = state_of(worker)
    prepare, worker.eplb_split = state.prepare_forward, 0

    def watched_prepare(model_config: Any, tokens: int, parts: list[Any] | None = None) -> None:
        worker.eplb_split += parts is not None
        prepare(model_config, tokens, parts)

    state.prepare_forward = watched_prepare


def _has_router(module: Any, kind: type) -> bool:
    return isinstance(getattr(module, "router", None), kind)


def watch_drafter(worker: Any) -> None:
    """Record the draft tokens, and per window the choices of the draft model's routers for tokens without padding."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    runner, state = worker.model_runner, state_of(worker)
    drafter = runner.drafter if hasattr(runner, "drafter") else runner.speculator  # the V1 and the V2 runner
    draft_config = worker.vllm_config.speculative_config.draft_model_config
    worker.eplb_proposed, worker.eplb_windows, worker.eplb_loads = [], [], []
    propose = drafter.propose

    def watched_propose(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        if not kwargs.get("dummy_run"):  # the V2 runner's dummy batches have draft tokens, too
            worker.eplb_proposed.append(drafts.tolist())
        return drafts

    drafter.propose = watched_propose
    if state is None:
        return
    updator, tokens = state.draft.updator, [0]
    counts = np.zeros((updator.placement.num_layers, updator.placement.num_experts), dtype=np.int64)
    prepare, snapshot, dummy = state.prepare_forward, updator.parts.recorder.snapshot, runner._dummy_run

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        tokens[0] = 0
        state.prepare_forward = prepare  # the V2 runner's draft model calls it for dummy batches, too
        try:
            return dummy(*args, **kwargs)
        finally:
            state.prepare_forward = watched_prepare

    def watched_prepare(model_config: Any, num_unpadded_tokens: int, *args: Any, **kwargs: Any) -> None:
        prepare(model_config, num_unpadded_tokens, *args, **kwargs)
        if model_config is draft_config:
            tokens[0] = num_unpadded_tokens

    def watched_snapshot(placement: Any) -> None:
        worker.eplb_windows.append(counts.tolist())
        counts[:] = 0
        snapshot(placement)

    def captured(layer: int, ids: torch.Tensor) -> None:
        np.add.at(counts[layer], ids[: tokens[0]].reshape(-1).long().cpu().numpy(), 1)

    routers = [module.router for module in drafter.model.modules() if _has_router(module, BaseRouter)]
    for layer, router in enumerate({id(router): router for router in routers}.values()):
        router.set_capture_fn(lambda ids, layer=layer: captured(layer, ids))
    runner._dummy_run = dummy_run
    state.prepare_forward, updator.parts.recorder.snapshot = watched_prepare, watched_snapshot
    if updator.parts.planner is not None:
        submit = updator.parts.planner.submit

        def watched_submit(request: Any) -> None:
            worker.eplb_loads.append(request.load.sum(axis=0).tolist())
            submit(request)

        updator.parts.planner.submit = watched_submit


def report_of_drafter(worker: Any) -> dict[str, Any]:
    """The observations since the last report, and the state of the draft model's balancer."""
    result = {"drafts": worker.eplb_proposed, "windows": worker.eplb_windows, "loads": worker.eplb_loads}
    worker.eplb_proposed = []
    state = state_of(worker)
    if state is not None:
        updator = state.draft.updator
        result |= {
            "part": updator.parts.adaptor.part,
            "digest": updator.placement.digest,
            "initial": updator.parts.adaptor.placement.digest,
            "step": updator.state.step,
            "stats": updator.stats.stats().to_json(),
        }
    return result


def switch_maps_without_weights(worker: Any, of_drafter: bool = False) -> None:
    """The negative control: switch the maps to a placement whose weights were never moved. Later commits switch to maps
    that are wrong in the same way, so that no cycle repairs them."""
    updator = state_of(worker).draft.updator if of_drafter else state_of(worker).updator
    maps, start = updator.rollout.maps, updator.placement
    stage = maps.stage

    def stage_turned(placement: Any, layers: list[int]) -> None:
        turned = np.roll(placement.physical_to_logical, 1, axis=1)
        stage(type(placement)(turned, placement.num_experts, placement.num_ranks), layers)

    maps.stage = stage_turned
    maps.stage(start, list(range(start.num_layers)))
    maps.switch()


def routing_that_is_refused(worker: Any) -> list[str]:
    """The errors of a real layer of this data-parallel engine: unchanged, with an older kernel (tokens are gathered
    before they are routed), with a kernel that routes by itself, and unchanged again."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from vllm_ascend_eplb.adaptors.errors import UnsupportedError
    from vllm_ascend_eplb.adaptors.vllm.adaptor import require_routing_of_own_tokens

    model = worker.model_runner.model
    layer = next(module for module in model.modules() if isinstance(module, MoERunner))
    method = layer.routed_experts.quant_method
    kernel = method.moe_kernel
    own = type(method)

    class RoutingByItself(own):
        is_monolithic = True

    def said() -> str:
        try:
            require_routing_of_own_tokens(model)
        except UnsupportedError as error:
            return str(error)
        return ""

    answers = [said()]
    method.moe_kernel = None
    answers.append(said())
    method.moe_kernel = kernel
    method.__class__ = RoutingByItself
    answers.append(said())
    method.__class__ = own
    return [*answers, said()]


def contents(worker: Any) -> list[tuple[int, int, list[tuple[str, str]]]]:
    """Layer, expert and tensors of each slot of this rank: data type and a digest of the bytes."""
    adaptor, placement = state_of(worker).updator.parts.adaptor, state_of(worker).updator.placement
    first = adaptor.rank * placement.slots_per_rank
    found = []
    for layer, slots in enumerate(adaptor.expert_tensors()):
        for slot, tensors in enumerate(slots):
            flat = [tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy() for tensor in tensors]
            digests = [hashlib.sha256(values.tobytes()).hexdigest() for values in flat]
            expert = int(placement.physical_to_logical[layer, first + slot])
            found.append((layer, expert, [(str(a.dtype), b) for a, b in zip(tensors, digests, strict=True)]))
    return found


def cycles_done(worker: Any) -> int:
    """Cycles that moved experts so far; 0 without balancing, and on all ranks except the first."""
    state = state_of(worker)
    return state.updator.stats.stats().cycles_done if state is not None and state.updator is not None else 0


def report(worker: Any) -> dict[str, Any]:
    """The state of a worker as plain values."""
    updator = state_of(worker).updator
    if updator is None:  # static placement
        return {}
    result = {
        "part": updator.parts.adaptor.part,
        "digest": updator.placement.digest,
        "initial": updator.parts.adaptor.placement.digest,
        "step": updator.state.step,
        "cycle": updator.state.cycle,
        "failures": updator.state.failures,
        "phase": updator.state.phase.name,
        "stats": updator.stats.stats().to_json(),
        "views": views_agree(worker),
        "async_scheduling": bool(worker.vllm_config.scheduler_config.async_scheduling),
    }
    if hasattr(worker, "eplb_split"):
        result["split"] = worker.eplb_split
    probe = getattr(worker, "eplb_probe", None)
    if probe is not None:
        result["windows"] = [window.tolist() for window in probe.windows]
        result["loads"] = [load.tolist() for load in probe.loads]
        result["masks"] = [mask.int().tolist() for mask in probe.masks]
        result["wrong_experts"] = probe.wrong_experts
        result["padded_rows"] = probe.padded_rows
        result["idle"] = probe.idle
        result["ahead"] = probe.ahead
        result["split"] = probe.split
        result["history"] = probe.history
        result["counted"] = (np.sum(probe.taken, axis=0) + _counted(updator)).tolist()
        result["routed"] = (np.sum(probe.windows, axis=0) + probe.counts).sum(axis=1).tolist()
    return result


def views_agree(worker: Any) -> bool:
    """True if the maps in vLLM's state API equal those that vLLM derives from its physical-to-logical map."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    def agree(views: Any) -> bool:
        shown, copies = views.logical_to_physical_map.cpu(), views.logical_replica_count.cpu()
        inverse, count = compute_logical_maps(views.physical_to_logical_map.cpu(), views.model.num_logical_experts)
        width = inverse.shape[-1]
        return bool(
            torch.equal(count, copies) and torch.equal(inverse, shown[..., :width]) and (shown[..., width:] == -1).all()
        )

    return all(agree(views) for views in state_of(worker).model_states.values())
