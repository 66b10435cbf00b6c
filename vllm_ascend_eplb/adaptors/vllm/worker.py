# SPDX-License-Identifier: Apache-2.0
"""The worker that vLLM runs if the balancer is on: a subclass of its own worker class, with the balancer in it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ...files.disk import show
from ...settings.fit import read_start_placement
from ...settings.messages import EplbConfigError
from ...values.placement import Placement
from ..errors import PatchPointError, UnsupportedError
from ..handed_over import settings_of
from ..parts import has_experts, is_draft
from ..readers import guard_model, guard_worker
from ..worker_name import base_of
from . import cpu
from .loading import LoadOrder, loading_by
from .patch_points import missing_patch_points
from .runner import hook_runner, require_known_slice
from .state import VllmEplbState


def __getattr__(name: str) -> Any:
    base = base_of(__name__, name)  # before vLLM's import, which takes seconds: Python asks for __path__, too
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return balanced(resolve_obj_by_qualname(base), take_over)


@functools.cache
def balanced(base: type, prepare: Callable[[], None]) -> type:
    """A subclass of a worker class that balances.

    Args:
        base: the worker class.
        prepare: called before a worker is built, in its process.
    """

    class EplbWorker(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            prepare()
            super().__init__(*args, **kwargs)

        def init_device(self) -> None:
            super().init_device()
            hook_runner(self.model_runner)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            with loading_by(LoadOrders(self.vllm_config)):
                super().load_model(*args, **kwargs)
            ensure_state(self.model_runner, self.vllm_config)
            require_known_slice(self.model_runner)
            state = self.model_runner.eplb_state
            if state is not None:
                state.calibrate()
                guard_model(self.model_runner.get_model(), state.loaded)

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            state = getattr(self.model_runner, "eplb_state", None)
            if state is not None:
                state.begin()
            return result

        def reload_weights(self, *args: Any, **kwargs: Any) -> None:
            with self.model_runner.eplb_state.new_weights():
                super().reload_weights(*args, **kwargs)

        def sleep(self, level: int = 1) -> None:
            self.model_runner.eplb_state.fall_asleep(level)
            super().sleep(level)

        def wake_up(self, tags: list[str] | None = None) -> None:
            super().wake_up(tags)
            self.model_runner.eplb_state.wake_up(tags)

        def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
            begun = self.model_runner.eplb_state.begin_update()
            try:
                super().start_weight_update(*args, **kwargs)
            except BaseException:
                if begun:
                    self.model_runner.eplb_state.give_up_update()
                raise

        def finish_weight_update(self, *args: Any, **kwargs: Any) -> None:
            self.model_runner.eplb_state.come_together("finish_weight_update")
            try:
                super().finish_weight_update(*args, **kwargs)
            finally:
                self.model_runner.eplb_state.end_update()

        def shutdown(self) -> None:
            state = getattr(getattr(self, "model_runner", None), "eplb_state", None)
            if state is not None:
                state.close()
            super().shutdown()

    guard_worker(EplbWorker, _require_loaded_order)
    EplbWorker.__name__ = EplbWorker.__qualname__ = f"Eplb{base.__name__}"
    return EplbWorker


def _require_loaded_order(worker: Any, what: str) -> None:
    state = getattr(getattr(worker, "model_runner", None), "eplb_state", None)
    if state is not None:
        state.loaded.require(what)


def take_over() -> None:
    """Puts our state and, on a CPU, our kernels in place of vLLM's, in the process of this worker; idempotent.

    Raises:
        PatchPointError: vLLM is missing a patch point; the message names all that are missing.
    """
    import vllm
    from vllm.platforms import current_platform

    missing = missing_patch_points(current_platform.device_type)
    if missing:
        raise PatchPointError(
            f"vLLM {vllm.__version__} is missing patch points that the balancer needs; leave eplb_config out, or use a "
            f"version that it was checked against: {'; '.join(missing)}"
        )
    for runner in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.eplb_utils"):  # V1, V2
        importlib.import_module(runner).EplbState = VllmEplbState  # type: ignore[attr-defined]
    if current_platform.is_cpu():
        from vllm.config import parallel
        from vllm.distributed.device_communicators import cpu_communicator
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe

        cpu.replace_experts(cpu_moe.CPUUnquantizedExperts)
        cpu.replace_router_mapping()
        cpu.add_collectives(cpu_communicator.CpuCommunicator)
        cpu.let_configurations_be_copied(parallel)


class LoadOrders:
    """The orders in which the models of a worker are loaded: the model, then a draft model with experts. All workers
    call this together.

    A map has all layers of the model; a pipeline stage takes its layers of the map. The layers of a draft model come
    after those of the model. If the map does not have them, they are loaded in vLLM's order.

    With redundant experts vLLM's own order is given explicitly, because vLLM leaves the slots of copies empty if a
    checkpoint has all experts of a layer in one tensor; vLLM 0.32 also does with some draft models (GLM's).

    Args:
        vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self._model_layers = 0

    def __call__(self, num_layers: int, num_experts: int, model_config: Any) -> LoadOrder | None:
        """The order of the next model; None if vLLM's own loader is left alone.

        Args:
            num_layers: layers with experts of the model, or of this pipeline stage.
            num_experts: logical experts per layer.
            model_config: vLLM's configuration of the model.

        Raises:
            EplbConfigError: the map file does not fit the models, or was changed since the front end checked it.
        """
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group

        config, num_ranks = settings_of(self._vllm_config.additional_config), get_ep_group().world_size
        redundant = self._vllm_config.parallel_config.eplb_config.num_redundant_experts
        in_order = order_of_vllm(num_layers, num_experts, num_ranks, redundant)
        if config.expert_map_path is None:
            return in_order
        if drafts := is_draft(self._vllm_config, model_config):
            first = self._model_layers
            all_layers = first + num_layers
        else:
            counts = _layers_of_stages(num_layers)
            first, all_layers = sum(counts[: get_pp_group().rank_in_group]), sum(counts)
            self._model_layers = all_layers
        known = None if has_experts(self._vllm_config.speculative_config) else all_layers
        start = read_start_placement(config, num_layers=known, num_experts=num_experts, num_ranks=num_ranks)
        assert start is not None
        if drafts and start.num_layers == self._model_layers:  # given explicitly, so that the adaptor finds an order
            return LoadOrder(Placement.initial(num_layers, num_experts, num_ranks, redundant), by_map=False)
        if start.num_layers < all_layers or (drafts and start.num_layers != all_layers):
            both = f" ({all_layers})" if drafts else ""
            raise EplbConfigError(
                f"eplb_config.expert_map_path: {show(config.expert_map_path)} has {start.num_layers} layers; use a map "
                f"with those of the model ({self._model_layers}), or with those of model and draft model{both}"
            )
        mine = start.physical_to_logical[first : first + num_layers]
        return LoadOrder(Placement(mine, num_experts, num_ranks), by_map=True)


def order_of_vllm(num_layers: int, num_experts: int, num_ranks: int, redundant: int) -> LoadOrder | None:
    """vLLM's own order; None without redundant experts, where vLLM's own loader is left alone."""
    if not redundant:
        return None
    return LoadOrder(Placement.initial(num_layers, num_experts, num_ranks, redundant), by_map=False)


def _layers_of_stages(num_layers: int) -> list[int]:
    """The number of layers with experts of each pipeline stage, in order.

    Args:
        num_layers: layers of this stage.
    """
    import torch
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    if group.world_size == 1:
        return [num_layers]
    counts = torch.zeros(group.world_size, dtype=torch.int64)
    counts[group.rank_in_group] = num_layers
    torch.distributed.all_reduce(counts, group=group.cpu_group)
    return [int(count) for count in counts]


def ensure_state(runner: Any, vllm_config: Any) -> None:
    """Builds the state of a runner that builds none of its own (the CPU's).

    Raises:
        UnsupportedError: the model does not implement the MixtureOfExperts protocol.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    if runner.device.type == "cpu":
        cpu.replace_router_mapping()  # the modules of the model are imported by now
    if runner.eplb_state is not None:
        return
    model = get_mixture_of_experts_model(runner.get_model())
    if model is None:
        raise UnsupportedError(
            f"{type(runner.get_model()).__name__} has experts but does not implement vLLM's MixtureOfExperts protocol, "
            "which balancing needs; leave eplb_config out"
        )
    with set_current_vllm_config(vllm_config):
        state = VllmEplbState(vllm_config.parallel_config, runner.device)
        state.add_model(model, runner.model_config)
        _add_draft_model(runner, vllm_config, state)
    runner.eplb_state, runner._moe_model = state, model


def _add_draft_model(runner: Any, vllm_config: Any, state: VllmEplbState) -> None:
    """Balances a draft model with experts, as vLLM's runner for GPUs does."""
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

    drafter = getattr(runner, "drafter", None)
    if drafter is None or not hasattr(drafter, "model"):
        return
    model = get_mixture_of_experts_model(drafter.model)
    if model is not None:
        config = vllm_config.speculative_config.draft_model_config
        state.add_model(model, config, f"{config.model} (draft)")
        drafter.set_eplb_state(state)
