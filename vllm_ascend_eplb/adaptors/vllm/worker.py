# SPDX-License-Identifier: Apache-2.0
"""The worker that vLLM runs in place of its own while the balancer is on: the same class, with the balancer in it.

vLLM finds its worker by name (``parallel_config.worker_cls``). ``worker_class_name`` gives a name in this module that
stands for a worker class of vLLM's, or of anybody's, and is resolved in the worker's process only.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from ...settings.fit import read_start_placement
from ...values.placement import Placement
from ..handed_over import settings_of
from ..parts import is_drafter
from . import cpu as vllm_cpu
from .seams import SeamError, missing_seams
from .state import VllmEplbState

logger = logging.getLogger("vllm.eplb")


_PREFIX = "Eplb:"


def worker_class_name(base: str) -> str:
    """A name for ``worker_cls`` that stands for the class ``base`` (qualified name) with the balancer in it."""
    return base if base.startswith(__name__) else f"{__name__}.{_PREFIX}{base.replace('.', '/')}"


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return _balanced(resolve_obj_by_qualname(name.removeprefix(_PREFIX).replace("/", ".")))


@functools.cache
def _balanced(base: type) -> type:
    """A subclass of the worker class ``base`` that balances."""

    class EplbWorker(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            take_over()
            super().__init__(*args, **kwargs)

        def init_device(self) -> None:
            from .runner import hook_runner

            super().init_device()
            hook_runner(self.model_runner)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            from .loading import loading_by
            from .runner import require_known_slice
            from .worker import ensure_state, start_placement

            with loading_by(functools.partial(start_placement, self.vllm_config)):
                super().load_model(*args, **kwargs)
            ensure_state(self.model_runner, self.vllm_config)
            require_known_slice(self.model_runner)
            self.model_runner.eplb_state.calibrate()

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            state = getattr(self.model_runner, "eplb_state", None)
            if state is not None:
                state.begin()
            return result

        def reload_weights(self, *args: Any, **kwargs: Any) -> None:
            with self.model_runner.eplb_state.new_weights():
                super().reload_weights(*args, **kwargs)

        def shutdown(self) -> None:
            state = getattr(getattr(self, "model_runner", None), "eplb_state", None)
            if state is not None:
                state.close()
            super().shutdown()

    EplbWorker.__name__ = EplbWorker.__qualname__ = f"Eplb{base.__name__}"
    return EplbWorker


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
        from ..ascend import second_runner as ascend_v2

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
    return read_start_placement(config, num_layers=num_layers, num_experts=num_experts, num_ranks=num_ranks)


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
