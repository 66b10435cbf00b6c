# SPDX-License-Identifier: Apache-2.0
"""The balancer inside a vLLM worker: vLLM's MixtureOfExperts protocol on one side, EplbUpdator on the other.

``VllmEplbState`` stands where vLLM's own ``EplbState`` would. The runner's calls become the two verbs of the updator::

    execute_model, _dummy_run ── say what kind of forward begins
    _determine_batch_execution_and_padding (V1), EPLBController.prepare_forward (V2) returned ──> forward_before
    eplb_step (V1), EPLBController.step (V2) ──> forward_end
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..config import EplbConfig
from ..eplb_state import MAX_MAP_WIDTH, EplbModelState, EplbState
from ..load import LoadRecorder
from ..maps import DispatchMaps, RoutingTables
from ..placement import Placement
from ..tables import DispatchTables
from ..topology import Topology, host_identity
from ..transfer import exchange_bytes
from ..updator import EplbUpdator, Stage, require_equal_start, start_balancer
from . import vllm_cpu
from .ascend_config import settings_of
from .base import EplbAdaptor
from .vllm_config import DRAFTER, pipeline_parts
from .vllm_loading import loading_anew, placement_loaded
from .vllm_seams import missing_seams

logger = logging.getLogger("vllm.eplb")


class SeamError(RuntimeError):
    """This vLLM lacks a place that the balancer takes hold of."""


def take_over() -> None:
    """Puts our state and, on a CPU, our kernels in place of vLLM's, in this worker's process.

    Raises:
        SeamError: vLLM lacks a place for them; names all that are missing.
    """
    import vllm
    from vllm.platforms import current_platform

    missing = missing_seams(current_platform.device_type)
    if missing:
        raise SeamError(
            f"vLLM {vllm.__version__} lacks what the balancer needs; leave eplb_config out, or use a version that it "
            f"was checked against: {'; '.join(missing)}"
        )
    for runner in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.eplb_utils"):  # V1, V2
        importlib.import_module(runner).EplbState = VllmEplbState  # type: ignore[attr-defined]
    if current_platform.device_type == "npu":
        from . import ascend_v2

        ascend_v2.take_over()
    if current_platform.is_cpu():
        from vllm.config import parallel
        from vllm.distributed.device_communicators import cpu_communicator
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe

        vllm_cpu.replace_experts(cpu_moe.CPUUnquantizedExperts)
        vllm_cpu.replace_router_mapping()
        vllm_cpu.add_collectives(cpu_communicator.CpuCommunicator)
        vllm_cpu.let_configurations_be_copied(parallel)


def start_placement(vllm_config: Any, num_layers: int, num_experts: int, model_config: Any) -> Placement | None:
    """The placement that a worker's model is to be loaded by; None for vLLM's own. For a drafter it is vLLM's own, too,
    but said: vLLM loads one slot for each expert of a drafter (GLM's, in 0.32) and leaves those of copies empty.

    Raises:
        EplbConfigError: the map file, which the front end has checked, is another here.
    """
    from vllm.distributed.parallel_state import get_ep_group

    config, num_ranks = settings_of(vllm_config.additional_config), get_ep_group().world_size
    if is_drafter(vllm_config, model_config):
        redundant = vllm_config.parallel_config.eplb_config.num_redundant_experts
        return Placement.initial(num_layers, num_experts, num_ranks, redundant)
    return config.read_start_placement(num_layers=num_layers, num_experts=num_experts, num_ranks=num_ranks)


def is_drafter(vllm_config: Any, model_config: Any) -> bool:
    """Whether this is the configuration of the drafter, not of the model. A drafter without weights has the model's."""
    speculative = vllm_config.speculative_config
    if speculative is None or model_config is vllm_config.model_config:
        return False
    return model_config is speculative.draft_model_config


def ensure_state(runner: Any, vllm_config: Any) -> None:
    """Builds the state of a runner that builds none of its own (the CPU's)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    if runner.device.type == "cpu":
        vllm_cpu.replace_router_mapping()  # the model's own modules are imported by now
    if runner.eplb_state is not None:
        return
    model = get_mixture_of_experts_model(runner.get_model())
    if model is None:
        raise SeamError(
            f"{type(runner.get_model()).__name__} has experts but does not implement vLLM's MixtureOfExperts protocol, "
            "which balancing needs; leave eplb_config out"
        )
    with set_current_vllm_config(vllm_config):
        state = VllmEplbState(vllm_config.parallel_config, runner.device)
        state.add_model(model, runner.model_config)
        _add_drafter(runner, vllm_config, state)
    runner.eplb_state, runner._moe_model = state, model


def _add_drafter(runner: Any, vllm_config: Any, state: VllmEplbState) -> None:
    """Balances a drafter that has experts of its own, too, as vLLM's runner for GPUs does."""
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    drafter = getattr(runner, "drafter", None)
    if drafter is None or not hasattr(drafter, "model"):
        return
    model = get_mixture_of_experts_model(drafter.model)
    if model is not None:
        config = vllm_config.speculative_config.draft_model_config
        state.add_model(model, config, f"{config.model} (draft)")
        drafter.set_eplb_state(state)


def require_known_slice(runner: Any) -> None:
    """The V2 runner does not say how long a batch is with padding, so nobody knows which slice of it is whose.

    Raises:
        SeamError: MoE layers are sequence-parallel with that runner.
    """
    state = runner.eplb_state
    if state is not None and state.slice.parts > 1 and not hasattr(runner, "_determine_batch_execution_and_padding"):
        raise SeamError(
            "--tensor-parallel-size with --data-parallel-size is not supported with vLLM's V2 model runner in this "
            "version; set VLLM_USE_V2_MODEL_RUNNER=0, or use one of the two"
        )


def hook_runner(runner: Any) -> None:
    """Calls ``forward_before`` at the one right point of real and dummy forwards of a runner.

    The point is behind vLLM's data-parallel collective of that forward, so that the communicators are entered in the
    same order on ranks with and without requests, and before the model runs. In V1 it is directly behind
    ``_determine_batch_execution_and_padding``, in V2 behind ``EPLBController.prepare_forward``.

    Raises:
        SeamError: the runner is of neither kind.
    """
    forwards = _Forwards(runner)
    if hasattr(runner, "_determine_batch_execution_and_padding"):
        runner._determine_batch_execution_and_padding = forwards.step_after(
            runner._determine_batch_execution_and_padding
        )
    elif hasattr(getattr(runner, "eplb", None), "prepare_forward"):
        runner.eplb.prepare_forward = forwards.step_after(runner.eplb.prepare_forward)
    else:
        raise SeamError(
            f"{type(runner).__name__} is neither vLLM's V1 nor its V2 runner; balancing others is not supported: leave "
            "eplb_config out"
        )
    runner.execute_model = forwards.real(runner.execute_model)
    runner._dummy_run = forwards.dummy(runner._dummy_run)


class _Forwards:
    """Knows, from the runner's two ways in, what forward has begun and has not reached the point of its step yet."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._begun: tuple[bool, Stage] | None = None
        self._in_dummy = False

    def step_after(self, original: Any) -> Any:
        """``original``, and after it one step of the balancer if a forward has begun."""

        @functools.wraps(original)
        def then_step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            begun, self._begun = self._begun, None
            if begun is not None and self._runner.eplb_state is not None:
                serving, stage = begun
                rows = getattr(result[1], "num_tokens", 0) if isinstance(result, tuple) else 0  # V2 does not say
                self._runner.eplb_state.forward_before(serving=serving, stage=stage, rows=rows)
            return result

        return then_step

    def real(self, execute: Any) -> Any:
        @functools.wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self._in_dummy:  # V2's dummy run is an execute_model of its own
                return execute(scheduler_output, *args, **kwargs)
            with self._forward(True, _stage_of(scheduler_output, self._decode_tokens())):
                return execute(scheduler_output, *args, **kwargs)

        return execute_model

    def dummy(self, original: Any) -> Any:
        @functools.wraps(original)
        def dummy_run(*args: Any, skip_eplb: bool = False, is_profile: bool = False, **kwargs: Any) -> Any:
            if self._runner.eplb_state is not None:
                self._runner.eplb_state.count_nothing()
            self._in_dummy = True
            try:
                if skip_eplb or is_profile:  # profiling, warm-up and capturing are no steps
                    return original(*args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)
                with self._forward(False, "decode"):
                    return original(*args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)
            finally:
                self._in_dummy = False

        return dummy_run

    @contextlib.contextmanager
    def _forward(self, serving: bool, stage: Stage) -> Iterator[None]:
        self._begun = (serving, stage)
        try:
            yield
        finally:
            self._begun = None

    def _decode_tokens(self) -> int:
        """Tokens of a request in a decode step; V1 and V2 have different names for it."""
        runner = self._runner
        v1 = getattr(runner, "uniform_decode_query_len", None)
        return int(v1 if v1 is not None else runner.decode_query_len)


def _stage_of(scheduler_output: Any, decode_tokens: int) -> Stage:
    """A batch in which no request has more tokens than a decode step gives it only decodes."""
    most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
    return "prefill" if most > decode_tokens else "decode"


@dataclass(frozen=True)
class Slice:
    """The part of a batch that this rank routes: number ``part`` of ``parts`` of equal length, the last one padded."""

    part: int = 0
    parts: int = 1

    def real(self, tokens: int, rows: int) -> int:
        """How many of a batch's first ``tokens`` of ``rows`` rows, the others being padding, lie in this part."""
        if self.parts == 1:
            return tokens
        length = -(-rows // self.parts)
        return min(max(tokens - self.part * length, 0), length)


class VllmAdaptor(EplbAdaptor):
    """A vLLM model with the MixtureOfExperts protocol.

    With pipeline stages, each stage is a balancer of its own: vLLM's expert-parallel groups, and the layers that a
    model reports, are those of one stage.

    Maps are the same on all ranks. Who counts depends on who routes what: data-parallel ranks route their own tokens
    (the *owned* regime), so each counts, and dispatch tables may begin at another entry on each. Within a
    tensor-parallel group all ranks route the same tokens (the *replicated* regime), so the first of them counts, and
    tables are the same; but where the MoE layers are sequence-parallel, each routes a slice of the batch, so that it
    counts its own.

    Attributes:
        slice: the part of a batch that this rank routes.
        counts_received: whether layers count what a rank's slots received, after dispatch, and not what it routes.
    """

    counts_received = False

    def __init__(
        self, model: Any, name: str, device: torch.device, config: EplbConfig, *, is_drafter: bool = False
    ) -> None:
        from vllm.distributed.parallel_state import (
            get_ep_group,
            get_eplb_group,
            get_pp_group,
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        group = get_eplb_group()
        self.name = name
        stages = pipeline_parts(get_pp_group().world_size)
        self.part = stages[get_pp_group().rank_in_group] if stages else DRAFTER if is_drafter else ""
        self.channel = int(is_drafter)  # they share the process groups
        self.rank = get_ep_group().rank_in_group
        self.device = device
        self.control_group = group.cpu_group
        on_host = device.type == "cpu"
        self.transfer_group = group.device_group if on_host else get_ep_group().cpu_group
        self.device_group = None if on_host else group.device_group
        num_ranks = get_ep_group().world_size
        hosts = exchange_bytes(group.cpu_group, num_ranks, host_identity().encode())
        self.topology = Topology(tuple(hosts.index(host) for host in hosts))
        self.num_groups = max(1, model.num_expert_groups or 1)
        if not self.counts_received:
            _require_routing_of_own_tokens(model)
        # Where slots are counted it does not matter who routes what.
        sequence_parallel = not self.counts_received and _is_sequence_parallel(model)
        tp_rank = get_tensor_model_parallel_rank()
        self.slice = Slice(tp_rank, get_tensor_model_parallel_world_size()) if sequence_parallel else Slice()
        loaded = placement_loaded(model, self.rank)
        if loaded is None and config.expert_map_path is not None:
            raise SeamError(
                "the weights were not loaded by eplb_config.expert_map_path: this --load-format builds models in a way "
                "of its own; use another, or leave expert_map_path out"
            )
        self.placement = loaded or Placement.initial(
            model.num_moe_layers, model.num_logical_experts, num_ranks, model.num_redundant_experts
        )
        self.recorder = LoadRecorder(
            self.placement.num_layers,
            self.placement.num_experts,
            self.placement.num_slots,
            device,
            contributes=self.counts_received or sequence_parallel or tp_rank == 0,
            phases=("all",) if config.eplb_heat_collection_stage == "all" else (config.eplb_heat_collection_stage,),
            num_entries=config.load_entries,
            steps_per_entry=-(-config.expert_heat_collection_interval // config.load_entries),
            dtype=torch.int64 if device.type == "cpu" else torch.int32,  # vLLM's own kernel counts in int32
            own_stream=config.mode != "sync",
        )
        self._maps = DispatchMaps(self.placement, device, width=min(MAX_MAP_WIDTH, model.num_redundant_experts + 1))
        self._switched: list[DispatchMaps | RoutingTables] = [self._maps]
        self._let_route(model, config, sequence_parallel)
        self._weights = model.expert_weights

    def _let_route(self, model: Any, config: EplbConfig, sequence_parallel: bool) -> None:
        """Gives the layers the counters, and maps or dispatch tables."""
        from vllm.distributed.parallel_state import get_dp_group, get_ep_group

        maps = self._maps.logical_to_physical, self._maps.replica_count
        if config.weighted_dispatch:
            routing = get_ep_group() if sequence_parallel else get_dp_group()  # whose ranks route different tokens
            turn = {"rank": routing.rank_in_group, "num_ranks": routing.world_size}
            self.dispatch = DispatchTables(self.placement, self.device, config.dispatch_table_entries, **turn)
            maps = self.dispatch.table, self.dispatch.count
        model.set_eplb_state(self.recorder.counts, *maps)

    def model_state(self, model: Any, in_force: Callable[[], Placement]) -> EplbModelState:
        """The model's maps and counters as vLLM's own EPLB shows them; ``in_force`` gives the placement."""

        def slots() -> torch.Tensor:
            return torch.from_numpy(in_force().physical_to_logical.astype(np.int64)).to(self.device)

        return EplbModelState(model, self.name, self._maps, self.recorder.counts, slots)

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        slots = range(self.placement.slots_per_rank)
        return [[[tensor.data[slot] for tensor in layer] for slot in slots] for layer in self._weights]

    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        for its in self._switched:
            its.prepare(placement, layers)

    def commit_maps(self) -> None:
        for its in self._switched:
            its.commit()

    def forget_prepared_maps(self) -> None:
        for its in self._switched:
            its.forget_prepared()


@dataclass(frozen=True)
class _Drafter:
    """A second model that runs in the same forwards.

    Attributes:
        model_config: by which its forwards are told from the model's.
        num_unpadded_tokens: int32 [], tokens of its coming forward that are no padding.
        updator: its balancer; None where its placement stays as it is.
    """

    model_config: Any
    num_unpadded_tokens: torch.Tensor
    updator: EplbUpdator | None


def require_loaded_copies(differing: int, load_format: str) -> None:
    """vLLM leaves slots of redundant experts without weights where a checkpoint has all experts of a layer in one
    tensor; tokens that are sent there would be answered wrongly.

    Args:
        differing: experts whose copies differ from each other once the model is loaded.
        load_format: with vLLM's "dummy" every slot gets weights of its own, which is no fault.

    Raises:
        SeamError: copies differ that should not.
    """
    if differing and load_format != "dummy":
        raise SeamError(
            f"copies of {differing} experts differ from each other once the weights are loaded, so tokens would be "
            "answered wrongly: vLLM does not fill redundant slots from a checkpoint with all experts of a layer in one "
            "tensor; set num_redundant_experts to 0, or leave eplb_config out"
        )


def _require_routing_of_own_tokens(model: Any) -> None:
    """Where tokens are gathered from other ranks before they are routed, every rank would count everybody's, padding
    included; where a kernel routes by itself, nobody counts and no map is heeded.

    Raises:
        SeamError: a layer does so.
    """
    for module in model.modules():
        if getattr(module, "do_naive_dispatch_combine", False):
            raise SeamError(
                f"{type(module).__name__} gathers the tokens of all ranks before it routes them, as vLLM does for this "
                "quantisation; balancing that is not supported in this version: leave eplb_config out, or use "
                "--tensor-parallel-size alone"
            )
        if getattr(module, "is_monolithic", False):
            raise SeamError(
                f"{type(module).__name__} routes inside of its kernel, where no expert can be counted or moved; choose "
                "another --moe-backend, or leave eplb_config out"
            )


def _is_sequence_parallel(model: Any) -> bool:
    """Whether each tensor-parallel rank routes a slice of the batch; all MoE layers of a model do, or none."""
    configs = [module.moe_config for module in model.modules() if hasattr(module, "moe_config")]
    return any(config.is_sequence_parallel for config in configs)


class VllmEplbState(EplbState):
    """What a vLLM runner takes for its ``EplbState``: maps and views as there, and the balancer that changes them.

    A drafter with experts is a second model: with maps, counters and a balancer of its own, which steps with the
    model's, since both run in the same forward of the engine.

    Attributes:
        should_record_tensor: bool [1], read by every router of the model.
        num_unpadded_tokens: int32, the tokens that are no padding, of those that this rank routes; one per
            micro-batch.
        slice: the part of each batch that this rank routes.
        updator: the model's balancer; None before a model was added, and where its placement stays as it is.
        drafter: the drafter's; None where there is none with experts.
    """

    is_async = False
    adaptor_class = VllmAdaptor

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        super().__init__(parallel_config, device)
        self.should_record_tensor: torch.Tensor | None = None
        self.num_unpadded_tokens = [torch.zeros((), dtype=torch.int32, device=device)]
        self.updator: EplbUpdator | None = None
        self.drafter: _Drafter | None = None
        self.slice = Slice()
        self._model: Any = None
        self._adaptor: VllmAdaptor | None = None
        self._rows = 0
        self._began = False
        self._loading = False

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Takes a model in, once its weights are loaded; all ranks together.

        Raises:
            StartError: the ranks were started differently; names rank and field.
            EpConfigurationError: a drafter has another number of experts than the model.
            SeamError: there is such a model already, or redundant slots were left without weights.
        """
        from vllm.config import get_current_vllm_config
        from vllm.distributed.eplb.eplb_state import EplbLayerState

        self.validate_ep_configuration(model)
        vllm_config = get_current_vllm_config()
        name, drafts = model_name or model_config.model, is_drafter(vllm_config, model_config)
        if (self.drafter if drafts else self._adaptor) is not None:
            raise SeamError(
                f"{name} is a second model with experts of its kind; balancing it is not supported in this version: "
                "leave eplb_config or that model out"
            )
        config = settings_of(vllm_config.additional_config)
        adaptor = self.adaptor_class(model, name, self.device, config, is_drafter=drafts)
        tokens = self.num_unpadded_tokens
        if drafts:
            tokens = [torch.zeros((), dtype=torch.int32, device=self.device)]
        for layer in model.moe_layers:
            layer_state = getattr(layer, "eplb_state", None)
            if isinstance(layer_state, EplbLayerState):
                layer_state.should_record_tensor = adaptor.recorder.recording
                layer_state.num_unpadded_tokens_tensors = tokens
        updator = None
        if config.dynamic:
            updator = start_balancer(adaptor, config)
            require_loaded_copies(updator.differing, str(vllm_config.load_config.load_format))
            self.guard(model)
        else:
            require_equal_start(adaptor, config)
        if drafts:
            self.drafter = _Drafter(model_config, tokens[0], updator)
        else:
            self._model, self._adaptor, self.updator = model, adaptor, updator
            self.should_record_tensor = adaptor.recorder.recording
            self.slice = adaptor.slice
        self.model_states[model_config.compute_hash()] = adaptor.model_state(
            model, lambda: adaptor.placement if updator is None else updator.placement
        )

    def update_mapping(self, model_config: Any, expanded_physical_to_logical: torch.Tensor) -> None:
        """Refused: the weights of a served model are where the balancer put them.

        Raises:
            SeamError: always.
        """
        raise SeamError(
            f"the placement of {model_config.model} cannot be set from outside while it is served, because its weights "
            "would stay where they are; start with expert_map_path, or let the balancer move them"
        )

    def begin(self) -> None:
        """Warm-up is over on this rank: what comes now are steps. The engine calls it on all ranks before it serves."""
        self._began = True

    def forward_before(self, *, serving: bool, stage: Stage, rows: int) -> None:
        """One step of the balancer, on every rank, before each real or dummy forward of ``rows`` tokens, padding
        included."""
        self._rows = rows
        if not self._began:
            return
        if not serving:
            self._no_tokens()
        # The runner works in inference mode; tensors made here live longer than that.
        with torch.inference_mode(False), torch.no_grad():
            for updator in self._updators():
                updator.forward_before(serving=serving, stage=stage)

    def count_nothing(self) -> None:
        """What follows serves nobody."""
        self._no_tokens()
        for updator in self._updators():
            updator.pause_recording()

    def _no_tokens(self) -> None:
        self.num_unpadded_tokens[0].fill_(0)
        if self.drafter is not None:
            self.drafter.num_unpadded_tokens.fill_(0)

    def _updators(self) -> list[EplbUpdator]:
        both = (self.updator, self.drafter.updator if self.drafter is not None else None)
        return [updator for updator in both if updator is not None]

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: list[Any] | None = None
    ) -> None:
        """How many tokens of the coming batch are no padding; called by the runner, and by its drafter for each of its
        forwards, for real batches."""
        if self.drafter is not None and model_config is self.drafter.model_config:
            self.drafter.num_unpadded_tokens.fill_(num_unpadded_tokens)
            return
        self.num_unpadded_tokens[0].fill_(self.slice.real(num_unpadded_tokens, self._rows))

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        """A forward is over. In a profile run nothing is to be done: staging, checksums and maps were allocated, and
        every connection was used once, when the model was added, so vLLM finds that memory taken when it sizes its KV
        cache. No expert moves there."""
        if self._began and not is_profile:
            for updator in self._updators():
                updator.forward_end()

    @contextlib.contextmanager
    def new_weights(self) -> Iterator[None]:
        """Around vLLM's loading of other weights, on all workers of an engine.

        Raises:
            RuntimeError: the server has several engines: each gets the call at another step, so their ranks, which
                share the experts, cannot go back to the initial placement together. Or there is a drafter with
                experts, which vLLM does not load anew.
        """
        if self.drafter is not None:
            raise RuntimeError(
                "reload_weights with a drafter that has experts is not supported together with balancing; restart the "
                "server, or leave eplb_config out"
            )
        if self.parallel_config.data_parallel_size > 1:
            raise RuntimeError(
                f"reload_weights with --data-parallel-size {self.parallel_config.data_parallel_size} is not supported "
                "together with balancing (allowed: 1); restart the server, or leave eplb_config out"
            )
        anew = contextlib.nullcontext() if self._adaptor is None else loading_anew(self._model, self._adaptor.rank)
        with contextlib.nullcontext() if self.updator is None else self.updator.new_weights(), anew:
            self._loading = True
            try:
                yield
            finally:
                self._loading = False

    def guard(self, model: Any) -> None:
        """From now on refuses weights that come past ``new_weights``: vLLM would load them into the wrong slots."""
        load = model.load_weights

        @functools.wraps(load)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            if not self._loading:
                raise RuntimeError(
                    "weights were given to the model while its experts are being balanced, so they would get into "
                    "wrong slots: use the worker's reload_weights, or leave eplb_config out"
                )
            return load(*args, **kwargs)

        model.load_weights = load_weights

    def start_async_loop(self) -> None:
        """vLLM's own state starts a thread here; ours has what it needs."""

    def close(self) -> None:
        for updator in self._updators():
            updator.close()
