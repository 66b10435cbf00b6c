# SPDX-License-Identifier: Apache-2.0
"""The balancer inside vllm-ascend.

vllm-ascend has an EPLB of its own, whose four classes only its model runner uses, by names that it imports. In a worker
whose settings turn the balancer on, these names stand for the classes below, which keep the calls that the runner
makes::

    D2DExpertWeightLoader(), EplbProcess(...)   nothing: EplbUpdator owns both
    VllmEplbAdaptor(model=)                     the layers and their expert tensors, by vllm-ascend's own class
    EplbUpdator(...), warm_up_eplb()            builds the balancer in the profile run, when the weights are there

and the steps come from the one point that is right for real and dummy forwards::

    _determine_batch_execution_and_padding returned ──> forward_before   (behind the data-parallel collective)
    the runner's own call of forward_end            ──> forward_end

**Routing.** vllm-ascend turns a logical expert into a slot by ``log2phy[ids]``, with one slot per expert and rank. Here
``log2phy`` is a :class:`SlotTable`, an object that is indexed the same way and spreads an expert's tokens over all its
replicas. Where ranks may gather tokens before routing (AllGather), every rank then maps a token alike, so each pair is
computed once; vllm-ascend's own tables differ between ranks there.

**Slots under AllGather.** Its AllGather dispatcher looks up slots in a map that is indexed by logical experts, which
fails as soon as there are redundant experts. ``look_up_slots`` gives it one that is indexed by slots. Since 0.30 layers
map experts themselves and the dispatchers see slots only; there ``route_by`` gives the layers such a map.

**Loading.** Since 0.30 weights are loaded in vLLM's own order, experts 0..E-1 and then the copies. That this
is what the layers' maps say is checked, and that copies are equal.

**Load** comes from the layers' ``moe_load``, which counts what the slots of a rank have received, whatever way the
tokens came. It is made a view of the recorder's counters, and added to in every forward.

**A drafter with experts** registers its layers where the model has registered its own: all are layers of one placement,
the drafter's last. It guesses between the two calls of a step, so by the same maps and into the same load.

**Pipeline stages** are balancers of their own: vllm-ascend's groups of ranks that share experts, and the layers that it
registers, are those of one stage.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..config import EplbConfig
from ..load import LoadRecorder
from ..maps import DispatchMaps
from ..ops import entries_of
from ..placement import EMPTY, Placement
from ..post_import import after_import
from ..topology import Topology, host_identity
from ..transfer import exchange_bytes
from ..updator import EplbUpdator, Stage, require_equal_start, start_balancer
from .ascend_config import CHECKED_VERSIONS, installed_version, second_runner, settings_of, switch_on
from .base import EplbAdaptor
from .vllm_config import pipeline_parts

logger = logging.getLogger("vllm.eplb")

RUNNER = "vllm_ascend.worker.model_runner_v1"
DISPATCHER = "vllm_ascend.ops.fused_moe.token_dispatcher"
FORWARD_CONTEXT = "vllm_ascend.ascend_forward_context"

CALLS = {
    "eplb_loader": {"set_adator"},
    "eplb_process": {"_launch_process"},
    "eplb_updator": {"set_adaptor", "warm_up_eplb", "forward_before", "forward_end", "adaptor.clear_all_moe_loads"},
}
"""What the runner calls on the objects that are replaced. A runner that calls more is left alone."""


class AscendError(RuntimeError):
    """This model, or this vllm-ascend, cannot be balanced."""


# --- taking over, in the worker ---------------------------------------------------------------------------------------


def hook_worker(module: ModuleType) -> None:
    """Puts a balanced worker in place of vllm-ascend's, in its module; idempotent."""
    if not getattr(module.NPUWorker, "_eplb", False):
        module.NPUWorker = balanced(module.NPUWorker)  # type: ignore[attr-defined]


def balanced(base: type) -> type:
    """A subclass of vllm-ascend's worker that takes the names over where the settings ask for it, counts steps once
    warm-up is over, and ends the balancer with itself."""

    class EplbNPUWorker(base):  # type: ignore[misc]
        _eplb = True

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            prepare(vllm_config)
            super().__init__(vllm_config, *args, **kwargs)

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            updator = _updator_of(self)
            if updator is not None:
                updator.begin()
            return result

        def shutdown(self) -> None:
            updator = _updator_of(self)
            if updator is not None:
                updator.shutdown()
            super().shutdown()

    return EplbNPUWorker


def _updator_of(worker: Any) -> _Updator | None:
    updator = getattr(getattr(worker, "model_runner", None), "eplb_updator", None)
    return updator if isinstance(updator, _Updator) else None


def prepare(vllm_config: Any) -> None:
    """In a worker's process, before its runner is built: takes the names over if the settings turn the balancer on."""
    config = settings_of(vllm_config.additional_config)
    if not config.active or second_runner():
        return
    switch_on()  # a worker on another machine has not inherited it
    _Updator.settings, _Updator.load_format = config, str(vllm_config.load_config.load_format)
    take_over(importlib.import_module(RUNNER))


def differences(runner: ModuleType) -> list[str]:
    """What the runner's module lacks or does that these classes do not know; empty where they fit."""
    found = []
    for name in ("D2DExpertWeightLoader", "EplbProcess", "EplbUpdator", "VllmEplbAdaptor", "NPUModelRunner"):
        if not hasattr(runner, name):
            found.append(f"{name} is missing")
    if not hasattr(importlib.import_module(FORWARD_CONTEXT), "_EXTRA_CTX"):
        found.append("_EXTRA_CTX is missing")
    if found:
        return found
    for name in ("execute_model", "_dummy_run", "_determine_batch_execution_and_padding"):
        if not callable(getattr(runner.NPUModelRunner, name, None)):
            found.append(f"NPUModelRunner.{name} is missing")
    for name in ("register_layer", "_registered_moe_layers", "init_expert_param_per_layer", "init_buffer_tensor"):
        if not hasattr(runner.VllmEplbAdaptor, name):
            found.append(f"VllmEplbAdaptor.{name} is missing")
    source = inspect.getsource(runner)
    for attribute, known in CALLS.items():
        called = set(re.findall(rf"self\.{attribute}\.([\w.]+)\(", source))
        found += [f"it calls {attribute}.{name}" for name in sorted(called - known)]
    return found


def take_over(runner: ModuleType) -> None:
    """Puts our classes in place of vllm-ascend's four, in its model runner's module. Where the runner does not fit they
    are left alone, with a warning that says why."""
    if getattr(runner, "_eplb", False):
        return
    version = installed_version()
    found = differences(runner)
    if found:
        logger.warning(
            "vllm-ascend %s keeps its own EPLB: its model runner differs from the one that this package knows (%s): %s",
            version,
            ", ".join(CHECKED_VERSIONS),
            "; ".join(found),
        )
        return
    if version not in CHECKED_VERSIONS:
        logger.warning("EPLB was checked against vllm-ascend %s; this is %s", ", ".join(CHECKED_VERSIONS), version)
    runner.D2DExpertWeightLoader = _Loader  # type: ignore[attr-defined]
    runner.EplbProcess = _Process  # type: ignore[attr-defined]
    runner.EplbUpdator = _Updator  # type: ignore[attr-defined]
    runner.VllmEplbAdaptor = _layers_class(runner.VllmEplbAdaptor)  # type: ignore[attr-defined]
    runner.Manager = _Manager  # type: ignore[attr-defined]
    _hook_runner(runner.NPUModelRunner)
    after_import(DISPATCHER, look_up_slots)
    count_in_every_forward(importlib.import_module(FORWARD_CONTEXT))
    runner._eplb = True  # type: ignore[attr-defined]


def _hook_runner(runner: Any) -> None:
    """Says what kind of forward begins, and steps at the right point of it."""
    execute, dummy, determine = (
        runner.execute_model,
        runner._dummy_run,
        runner._determine_batch_execution_and_padding,
    )

    def begun(self: Any, forward: Callable[[], Any], serving: bool, stage: Stage) -> Any:
        self._eplb_forward = (serving, stage)
        try:
            return forward()
        finally:
            self._eplb_forward = None

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
        stage: Stage = "prefill" if most > self.uniform_decode_query_len else "decode"
        return begun(self, lambda: execute(self, scheduler_output, *args, **kwargs), True, stage)

    @functools.wraps(dummy)
    def dummy_run(self: Any, *args: Any, skip_eplb: bool = False, is_profile: bool = False, **kwargs: Any) -> Any:
        def forward() -> Any:
            return dummy(self, *args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)

        return forward() if skip_eplb or is_profile else begun(self, forward, False, "decode")

    @functools.wraps(determine)
    def determine_then_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = determine(self, *args, **kwargs)
        forward = getattr(self, "_eplb_forward", None)
        if forward is not None and getattr(self, "dynamic_eplb", False):
            self._eplb_forward = None
            across = result[3]  # int [D], tokens of each data-parallel engine; None where there is one
            if across is not None:
                forward = forward_of_all(across, self.eplb_pd_thresholds)
            self.eplb_updator.step(*forward)
        return result

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AscendError(
            "reload_weights fills slots by the initial placement, which may not be in force any more; start the server "
            "anew with the other weights"
        )

    runner.execute_model, runner._dummy_run, runner.reload_weights = execute_model, dummy_run, reload_weights
    runner._determine_batch_execution_and_padding = determine_then_step


def look_up_slots(dispatcher: ModuleType) -> None:
    """Lets the AllGather dispatcher look slots up in a map of slots; idempotent."""
    cls: Any = dispatcher.TokenDispatcherWithAllGather
    original = cls.token_dispatch
    if getattr(original, "_eplb", False):
        return

    @functools.wraps(original)
    def token_dispatch(self: Any, token_dispatch_input: Any) -> Any:
        routing = token_dispatch_input.routing
        if isinstance(routing.log2phy, SlotTable):
            routing = replace(routing, expert_map=routing.log2phy.local_slots, global_redundant_expert_num=0)
            token_dispatch_input = replace(token_dispatch_input, routing=routing)
        return original(self, token_dispatch_input)

    token_dispatch._eplb = True  # type: ignore[attr-defined]
    cls.token_dispatch = token_dispatch


def count_in_every_forward(context: ModuleType) -> None:
    """Lets the layers count whatever runs them; the recorder knows what is to be kept. vllm-ascend leaves a drafter's
    dummy batches out, in which the slots of an idle engine receive the other engines' tokens; idempotent."""
    type(context._EXTRA_CTX).eplb_heat_collection_status = property(lambda self: True)


class SlotTable:
    """Stands where a layer's ``log2phy`` stood: indexed by logical experts, gives slots.

    Args:
        maps: the maps of all layers; changed in place by commits.
        layer: which of them.
        local_slots: int32 [P], the local slot of each slot of this rank, -1 for the others.
        offset: added to the row of a token; where each rank routes its own tokens ranks differ in it, so that few
            tokens per rank spread, too. 0 where several ranks may map the same token.
    """

    def __init__(self, maps: DispatchMaps, layer: int, local_slots: torch.Tensor, offset: int) -> None:
        self._table = maps.logical_to_physical[layer].view(-1)
        self._count = maps.replica_count[layer]
        self._width = maps.width
        self._offset = offset
        self.local_slots = local_slots

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots [N, K] for logical experts [N, K], in their dtype. Only device work, so that graphs may capture it."""
        experts = ids.to(torch.int64)
        rows = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int64).unsqueeze(1) + self._offset
        entries = entries_of(rows, experts, self._count[experts])
        return self._table[experts * self._width + entries].to(ids.dtype)


def maps_itself(layer: Any) -> bool:
    """Whether a layer turns experts into slots before it calls a dispatcher, as layers do since 0.30. Such layers are
    loaded in vLLM's own order, whatever their maps say."""
    return hasattr(layer, "ascend_expert_map")


def route_by(layer: Any, table: SlotTable) -> None:
    """Puts a table in place of a layer's own."""
    del layer.log2phy  # a buffer since 0.30, which would take tensors only
    layer.log2phy = table
    if maps_itself(layer):
        # All that the dispatchers get: a map to look up slots in, and how many there are beyond its length.
        layer.ascend_expert_map, layer.global_redundant_expert_num = table.local_slots, 0


class _Manager:
    """vllm-ascend's planner shares a dictionary through a process of its own; here nothing reads it."""

    def dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return values


class _Loader:
    def set_adator(self, adaptor: Any) -> None:
        """The name is the runner's."""


class _Process:
    """There is one planner for all ranks; EplbUpdator of expert-parallel rank 0 owns it."""

    pid = None

    def __init__(self, shared_dict: Any, policy_type: int, enable_d2d: bool = True, tp_size: int | None = None) -> None:
        self.shared_dict = shared_dict

    def _launch_process(self) -> _Process:
        return self

    def is_alive(self) -> bool:
        return False


def _layers_class(stock: type) -> type:
    """vllm-ascend's adaptor without its buffers: staging is the loader's."""

    class EplbLayers(stock):  # type: ignore[misc]
        def init_buffer_tensor(self, num_buffer_tensor: int) -> None:
            """As many experts as a rank has would be allocated here."""

    return EplbLayers


class _Updator:
    """EplbUpdator under the calls of vllm-ascend's runner."""

    settings = EplbConfig()
    load_format = "auto"

    def __init__(self, eplb_config: Any, loader: Any, eplb_process: Any, process: Any) -> None:
        self.adaptor: Any = None
        self.balancer: EplbUpdator | None = None
        self._began = False

    def set_adaptor(self, adaptor: Any) -> None:
        self.adaptor = adaptor

    def warm_up_eplb(self) -> None:
        """Builds the balancer, or for a placement that stays its tables only; in the profile run, on all ranks
        together."""
        # The profile run is in inference mode; tensors made here are changed outside of it, too.
        with torch.inference_mode(False), torch.no_grad():
            adaptor = AscendAdaptor(self.adaptor, self.settings)
            if self.settings.dynamic:
                self.balancer = start_balancer(adaptor, self.settings)
                require_loaded_copies(self.balancer.differing, self.load_format)
            else:
                require_equal_start(adaptor, self.settings)

    def begin(self) -> None:
        """Warm-up is over on this rank: what comes now are steps."""
        self._began = True

    def forward_before(self) -> None:
        """The runner's call comes behind the data-parallel collective of real forwards and before that of dummy ones;
        ``step`` is called at the point that is the same for both."""

    def step(self, serving: bool, stage: Stage) -> None:
        if self.balancer is None or not self._began:
            return
        # The runner works in inference mode; tensors made here live longer than that.
        with torch.inference_mode(False), torch.no_grad():
            self.balancer.forward_before(serving=serving, stage=stage)

    def forward_end(self, eplb_heat_collection_status: bool = True) -> None:
        if self.balancer is not None and self._began:
            self.balancer.forward_end()

    def shutdown(self) -> None:
        if self.balancer is not None:
            self.balancer.close()


def require_loaded_copies(differing: int, load_format: str) -> None:
    """A model that loads its experts by itself may leave redundant slots empty; tokens that are sent there would be
    answered wrongly.

    Args:
        differing: experts whose copies differ from each other once the model is loaded.
        load_format: with vLLM's "dummy" every slot gets weights of its own, which is no fault.

    Raises:
        AscendError: copies differ that should not.
    """
    if differing and load_format != "dummy":
        raise AscendError(
            f"copies of {differing} experts differ from each other once the weights are loaded, so tokens would be "
            "answered wrongly: this model's loader does not fill redundant slots; set num_redundant_experts to 0, or "
            "leave eplb_config out"
        )


# --- the model --------------------------------------------------------------------------------------------------------


def forward_of_all(tokens_of_engines: torch.Tensor, most_in_decode: int) -> tuple[bool, Stage]:
    """What data-parallel engines make of a forward together: whether it serves requests, and its stage.

    A slot receives tokens of all engines, also while its own has no request, so all of them count, and by the same
    stage. They make dummy batches only while one of them serves; the token of such a batch is counted, too.

    Args:
        tokens_of_engines: int [D], the same on all ranks.
        most_in_decode: tokens of a batch that only decodes, at most; vllm-ascend's own bound between its stages.
    """
    return True, "prefill" if int(tokens_of_engines.max()) > most_in_decode else "decode"


class ReceivedTokens(LoadRecorder):
    """A recorder whose counters the layers add to after dispatch, recording or not: what they add meanwhile is dropped
    before the next recorded step."""

    def begin_step(self, placement: Placement, *, record: bool, phase: str = "all") -> None:
        if not self._is_recording:
            self.counts.zero_()
        elif not record or (self.phases != ("all",) and phase not in self.phases):
            self.flush(placement)
        super().begin_step(placement, record=record, phase=phase)


def placement_of(global_expert_maps: list[np.ndarray], slots_per_rank: int) -> Placement:
    """The placement that vllm-ascend's expert maps describe.

    Args:
        global_expert_maps: per layer int [R, E]: the local slot of each expert on each rank, -1 where it has none.
        slots_per_rank: S.

    Raises:
        PlacementError: an expert has no copy.
    """
    ranks, experts = global_expert_maps[0].shape
    slots = np.full((len(global_expert_maps), ranks * slots_per_rank), EMPTY, dtype=np.int32)
    for layer, expert_map in enumerate(global_expert_maps):
        rank, expert = np.nonzero(expert_map >= 0)
        slots[layer, rank * slots_per_rank + expert_map[rank, expert]] = expert
    return Placement(slots, experts, ranks)


def ranks_own_their_tokens() -> bool:
    """Whether every token is routed by one rank only, for batches of any size (MC2, All2All)."""
    from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

    return bool(get_ascend_device_type() == AscendDeviceType.A3)


def rows_ahead(rank: int) -> int:
    """How many rows further on a rank's tables begin. Where each rank routes its own tokens they differ by rank, so
    that those with few tokens take different copies of an expert; elsewhere they must agree."""
    return rank * 40503 if ranks_own_their_tokens() else 0


class AscendAdaptor(EplbAdaptor):
    """The MoE layers of a vllm-ascend model on this rank, and behind them those of its drafter.

    Args:
        layers: vllm-ascend's adaptor, which knows the layers and, by quantisation, the tensors of an expert.
        config: the settings.

    Raises:
        AscendError: the layers are not alike.
    """

    def __init__(self, layers: Any, config: EplbConfig) -> None:
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group
        from vllm_ascend.distributed.parallel_state import get_dynamic_eplb_group

        group, expert_parallel = get_dynamic_eplb_group(), get_ep_group()
        self.name = type(layers.model).__name__
        stages = pipeline_parts(get_pp_group().world_size)
        self.part = stages[get_pp_group().rank_in_group] if stages else ""
        self.rank = int(group.rank_in_group)
        self.control_group, self.device_group = group.cpu_group, group.device_group
        self.transfer_group = expert_parallel.cpu_group
        moe_layers = list(layers.moe_layers)
        size = int(layers.num_local_experts)
        maps = [layer.global_expert_map.cpu().numpy() for layer in moe_layers]
        if any(each.shape != maps[0].shape or layer.local_num_experts != size for each, layer in zip(maps, moe_layers)):  # noqa: B905
            raise AscendError(
                f"the MoE layers of {self.name} differ in experts or slots: "
                f"{sorted({(*each.shape, layer.local_num_experts) for each, layer in zip(maps, moe_layers)})}; "  # noqa: B905
                "set dynamic_eplb to false for this model"
            )
        self.placement = placement_of(maps, size)
        num_ranks = self.placement.num_ranks
        if maps_itself(moe_layers[0]):
            experts = self.placement.num_experts
            if self.placement != Placement.initial(len(maps), experts, num_ranks, self.placement.num_slots - experts):
                raise AscendError(
                    f"the experts of {self.name} were loaded in vLLM's order, and the layers' maps say otherwise; "
                    "leave eplb_config.expert_map_path out"
                )
        hosts = exchange_bytes(self.control_group, num_ranks, host_identity().encode())
        self.topology = Topology(tuple(hosts.index(host) for host in hosts))
        self.num_groups = max(1, int(getattr(layers.config, "n_group", 1) or 1))
        self.device = moe_layers[0].moe_load.device
        stage = config.eplb_heat_collection_stage
        self.recorder = ReceivedTokens(
            self.placement.num_layers,
            self.placement.num_experts,
            self.placement.num_slots,
            self.device,
            phases=("all",) if stage == "all" else (stage,),
        )
        redundant = self.placement.num_slots - self.placement.num_experts
        self._maps = DispatchMaps(self.placement, self.device, width=redundant + 1)
        self._weights = layers.expert_param_per_layer
        first = self.rank * size
        local = torch.full((self.placement.num_slots,), -1, dtype=torch.int32)
        local[first : first + size] = torch.arange(size, dtype=torch.int32)
        local = local.to(self.device)
        offset = rows_ahead(self.rank)
        for number, layer in enumerate(moe_layers):
            layer.moe_load = self.recorder.counts[number, first : first + size]
            route_by(layer, SlotTable(self._maps, number, local, offset))

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [
            [[tensor.data for tensor in expert] for expert in self._weights[layer]] for layer in sorted(self._weights)
        ]

    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        self._maps.prepare(placement, layers)

    def commit_maps(self) -> None:
        self._maps.commit()

    def forget_prepared_maps(self) -> None:
        self._maps.forget_prepared()
