# SPDX-License-Identifier: Apache-2.0
"""The worker of vllm-ascend with the balancer in it, for its first model runner."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

from ...settings.fit import read_start_placement
from ...values.placement import Placement
from ..handed_over import settings_of
from ..parts import has_experts
from ..patching import patch_once
from ..readers import guard_model, guard_worker
from ..vllm.loading import LoadOrder, loading_by
from ..vllm.worker import order_of_vllm
from .hand_over import IN_VLLMS_ORDER, installed_version, second_runner, switch_on
from .routing import knows_own_batch_only
from .runner import RUNNER, RunnerUpdator, take_over


def hook_worker(module: ModuleType) -> Any:
    """Puts a balanced worker in place of vllm-ascend's in its module, and returns it; idempotent."""
    return patch_once(module, "NPUWorker", balanced)


def balanced(base: type) -> type:
    """A subclass of the worker of vllm-ascend that balances where the settings ask for it."""

    class EplbNPUWorker(base):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            prepare(vllm_config)
            super().__init__(vllm_config, *args, **kwargs)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            updator = updator_of(self)
            if updator is not None:
                load_format = str(self.vllm_config.load_config.load_format)
                settings = settings_of(self.vllm_config.additional_config)
                updator.configure(settings, load_format, knows_own_batch_only(self.vllm_config))
            with _loading(self.vllm_config, updator):
                super().load_model(*args, **kwargs)

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            updator = updator_of(self)
            if updator is not None:
                guard_model(self.get_model(), updator.loaded)
                updator.begin()
            return result

        def shutdown(self) -> None:
            updator = updator_of(self)
            if updator is not None:
                updator.shutdown()
            super().shutdown()

    guard_worker(EplbNPUWorker, _require_loaded_order)
    return EplbNPUWorker


def _require_loaded_order(worker: Any, what: str) -> None:
    updator = updator_of(worker)
    if updator is not None:
        updator.loaded.require(what)


def _loading(vllm_config: Any, updator: RunnerUpdator | None) -> contextlib.AbstractContextManager[None]:
    """The context in which a model is loaded: by the map of the settings, where vllm-ascend does not heed one."""
    if updator is None or installed_version() not in IN_VLLMS_ORDER:
        return contextlib.nullcontext()
    return loading_by(Orders(vllm_config))


class Orders:
    """Gives each model that a worker loads the order of its layers: the model, and then a draft model with experts.

    A map has the layers of the model, and may have those of the draft model behind them. Layers that are in no map are
    loaded in vLLM's order. With redundant experts that order is given explicitly: vLLM does not know of the redundancy
    here, and models that load their experts by themselves would leave the slots of copies empty.

    Args:
        vllm_config: the configuration of the worker, with ``eplb_config`` in vllm-ascend's form.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._config = settings_of(vllm_config.additional_config)
        self._redundant = int(vllm_config.additional_config["eplb_config"]["num_redundant_experts"])
        self._drafts = has_experts(vllm_config.speculative_config)
        self._taken = 0

    def __call__(self, num_layers: int, num_experts: int, model_config: Any) -> LoadOrder | None:
        """The order of the next model; see :func:`~vllm_ascend_eplb.adaptors.vllm.loading.loading_by`.

        Raises:
            EplbConfigError: the map file was changed since the front end checked it.
        """
        from vllm.distributed.parallel_state import get_ep_group

        num_ranks, first, end = get_ep_group().world_size, self._taken, self._taken + num_layers
        self._taken = end
        read = functools.partial(read_start_placement, self._config, num_experts=num_experts, num_ranks=num_ranks)
        start = read(num_layers=None)
        if start is None or start.num_layers == first:
            return order_of_vllm(num_layers, num_experts, num_ranks, self._redundant)
        if start.num_layers < end or not (self._drafts and first == 0):
            read(num_layers=end)  # raises if the map has another number of layers
        rows = start.physical_to_logical[first:end]
        return LoadOrder(Placement(rows, num_experts, num_ranks), by_map=True)


def updator_of(worker: Any) -> RunnerUpdator | None:
    """The balancer of a worker's model runner; None where vllm-ascend's own runs, or none."""
    updator = getattr(getattr(worker, "model_runner", None), "eplb_updator", None)
    return updator if isinstance(updator, RunnerUpdator) else None


def prepare(vllm_config: Any) -> None:
    """Replaces the EPLB classes of vllm-ascend if the settings turn the balancer on; in the process of a worker, before
    its runner is built."""
    config = settings_of(vllm_config.additional_config)
    if not config.active or second_runner():
        return
    switch_on()  # a worker on another host has not inherited it
    take_over(importlib.import_module(RUNNER))
