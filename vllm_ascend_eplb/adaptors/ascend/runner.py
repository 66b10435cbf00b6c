# SPDX-License-Identifier: Apache-2.0
"""The balancer under the first model runner of vllm-ascend.

vllm-ascend has an EPLB of its own. Only its model runner uses the four classes of it, by names that it imports. In a
worker whose settings turn the balancer on, these names stand for the classes below, which accept the calls of the
runner::

    D2DExpertWeightLoader(), EplbProcess(...)   nothing: EplbUpdator owns both
    VllmEplbAdaptor(model=)                     the layers and their expert tensors, by vllm-ascend's own class
    EplbUpdator(...), warm_up_eplb()            builds the balancer in the profile run, when the weights are loaded

The steps come from the same point of real and dummy forwards::

    _determine_batch_execution_and_padding returned ──> forward_before   (after the data-parallel collective)
    the runner's own call of forward_end            ──> forward_end

**Routing.** vllm-ascend turns a logical expert into a slot by ``log2phy[ids]``, with one slot per expert and rank. Here
``log2phy`` is a :class:`SlotTable`, an object that is indexed the same way and spreads the tokens of an expert over all
replicas. Where ranks may gather tokens before routing (AllGather), every rank maps a token alike, so each pair is
computed once; the tables of vllm-ascend differ between ranks there.

**Slots under AllGather.** The AllGather dispatcher looks slots up in a map that is indexed by logical experts, which
fails with redundant experts. ``look_up_slots`` gives it a map that is indexed by slots. Since 0.30 layers map experts
themselves and the dispatchers see slots only; there ``route_by`` gives the layers such a map.

**Loading.** Since 0.30 weights are loaded in vLLM's own order, experts 0..E-1 and then the copies, or by
``expert_map_path`` with the loader of this package; the layers' own maps are not used. The start checks that copies are
equal.

**Load** comes from ``moe_load`` of the layers, which counts the tokens that the slots of a rank received, from any
rank. It is made a view of the counters of the recorder, and added to in every forward.

**A draft model with experts** registers its layers after those of the model: all are layers of one placement. It runs
between the two calls of a step, so by the same maps and into the same load.

**Pipeline stages** have a balancer each: the expert-parallel groups of vllm-ascend, and the layers that it registers,
are those of one stage.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ...balancer.start import require_equal_start, start_balancer
from ...balancer.updator import EplbUpdator, Stage
from ...settings.config import EplbConfig
from ..engine_adaptor import require_loaded_copies
from ..errors import UnsupportedError
from ..patching import patch_once
from ..post_import import after_import
from ..readers import LoadedOrder
from .adaptor import AscendAdaptor
from .hand_over import CHECKED_VERSIONS, installed_version
from .routing import DISPATCHER, forward_of_all, look_up_slots, stage_of_all

logger = logging.getLogger("vllm.eplb")


RUNNER = "vllm_ascend.worker.model_runner_v1"


FORWARD_CONTEXT = "vllm_ascend.ascend_forward_context"


CALLS = {
    "eplb_loader": {"set_adator"},
    "eplb_process": {"_launch_process"},
    "eplb_updator": {"set_adaptor", "warm_up_eplb", "forward_before", "forward_end", "adaptor.clear_all_moe_loads"},
}
"""Methods that the runner calls on the replaced objects. A runner that calls others keeps its own classes."""


def differences(runner: ModuleType) -> list[str]:
    """How the module of the runner differs from the one that these classes fit; empty where they fit."""
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
    """Puts our classes in place of vllm-ascend's four in the module of its model runner; idempotent. A runner that they
    do not fit keeps its own classes, and the log says why."""
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
    patch_once(runner, "D2DExpertWeightLoader", lambda stock: _Loader)
    patch_once(runner, "EplbProcess", lambda stock: _Process)
    patch_once(runner, "EplbUpdator", lambda stock: RunnerUpdator)
    patch_once(runner, "VllmEplbAdaptor", _layers_class)
    runner.Manager = _Manager  # type: ignore[attr-defined]
    _hook_runner(runner.NPUModelRunner)
    after_import(DISPATCHER, look_up_slots)
    count_in_every_forward(importlib.import_module(FORWARD_CONTEXT))


def _hook_runner(runner: Any) -> None:
    """Notes the kind of forward that begins, and steps at the right point of it; idempotent."""
    patch_once(runner, "execute_model", _real)
    patch_once(runner, "_dummy_run", _dummy)
    patch_once(runner, "_determine_batch_execution_and_padding", _then_step)
    runner.reload_weights = _refuse_reload


def _begun(runner: Any, forward: Callable[[], Any], serving: bool, stage: Stage) -> Any:
    runner.eplb_forward = (serving, stage)
    try:
        return forward()
    finally:
        runner.eplb_forward = None


def _real(execute: Any) -> Any:
    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
        stage: Stage = "prefill" if most > self.uniform_decode_query_len else "decode"
        return _begun(self, lambda: execute(self, scheduler_output, *args, **kwargs), True, stage)

    return execute_model


def _dummy(run: Any) -> Any:
    @functools.wraps(run)
    def dummy_run(self: Any, *args: Any, skip_eplb: bool = False, is_profile: bool = False, **kwargs: Any) -> Any:
        def forward() -> Any:
            return run(self, *args, skip_eplb=skip_eplb, is_profile=is_profile, **kwargs)

        return forward() if skip_eplb or is_profile else _begun(self, forward, False, "decode")

    return dummy_run


def _then_step(determine: Any) -> Any:
    @functools.wraps(determine)
    def determine_then_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = determine(self, *args, **kwargs)
        forward = getattr(self, "eplb_forward", None)
        if forward is not None and getattr(self, "dynamic_eplb", False):
            self.eplb_forward = None
            across = result[3]  # int [D], tokens of each data-parallel engine; None where there is one
            if across is not None:
                forward = forward_of_all(across, self.eplb_pd_thresholds)
            self.eplb_updator.step(*forward)
        return result

    return determine_then_step


def _refuse_reload(runner: Any, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        "reload_weights fills slots by the start placement, which may no longer be in force; restart the server with "
        "the new weights, or leave eplb_config out"
    )


def count_in_every_forward(context: ModuleType) -> None:
    """Lets the layers count in all forwards; the recorder knows which counts are kept. vllm-ascend does not count in
    dummy batches of a draft model, in which the slots of an idle engine receive tokens of the other engines.
    Idempotent."""
    type(context._EXTRA_CTX).eplb_heat_collection_status = property(lambda self: True)


class _Manager:
    """Makes the dictionary that vllm-ascend shares with its planner; nothing reads it here."""

    def dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return values


class _Loader:
    def set_adator(self, adaptor: Any) -> None:
        """Accepts the call of the runner, which names the method so."""


class _Process:
    """Starts no process: EplbUpdator of expert-parallel rank 0 owns the planner of all ranks."""

    pid = None

    def __init__(self, shared_dict: Any, policy_type: int, enable_d2d: bool = True, tp_size: int | None = None) -> None:
        self.shared_dict = shared_dict

    def _launch_process(self) -> _Process:
        return self

    def is_alive(self) -> bool:
        return False


def _layers_class(stock: type) -> type:
    """The adaptor of vllm-ascend without its buffers: the loader has staging of its own."""

    class EplbLayers(stock):  # type: ignore[misc]
        def init_buffer_tensor(self, num_buffer_tensor: int) -> None:
            """Does not allocate buffers of the size of all experts of a rank."""

    return EplbLayers


class RunnerUpdator:
    """EplbUpdator under the calls of the runner of vllm-ascend."""

    def __init__(self, eplb_config: Any, loader: Any, eplb_process: Any, process: Any) -> None:
        self.adaptor: Any = None
        self.balancer: EplbUpdator | None = None
        self._settings = EplbConfig()
        self._load_format = "auto"
        self._agrees_on_stage = False
        self._began = False
        self.loaded = LoadedOrder()

    def configure(self, settings: EplbConfig, load_format: str, own_batch_only: bool = False) -> None:
        """Takes the settings, which the runner does not pass on. The worker calls it before it loads the model.

        Args:
            load_format: vLLM's ``--load-format``.
            own_batch_only: whether the runner may know no batch but that of its own engine. If one stage is counted,
                ranks then agree on the stage of every forward.
        """
        self._settings, self._load_format = settings, load_format
        self._agrees_on_stage = own_batch_only and settings.eplb_heat_collection_stage != "all"

    def set_adaptor(self, adaptor: Any) -> None:
        self.adaptor = adaptor

    def warm_up_eplb(self) -> None:
        """Builds the balancer, or with a static placement its tables only. Called in the profile run, on all ranks
        together."""
        # The profile run is in inference mode; tensors made here are changed outside of it, too.
        with torch.inference_mode(False), torch.no_grad():
            adaptor = AscendAdaptor(self.adaptor, self._settings)
            if self._settings.dynamic:
                self.balancer = start_balancer(adaptor, self._settings)
                require_loaded_copies(self.balancer.differing, self._load_format)
            else:
                require_equal_start(adaptor, self._settings)
            by_map, experts = self._settings.expert_map_path is not None, adaptor.expert_tensors()
            self.loaded.add(adaptor.placement, self.balancer, by_map=by_map, experts=experts)

    def begin(self) -> None:
        """Counts steps from now on: warm-up is over on this rank."""
        self._began = True

    def forward_before(self) -> None:
        """Does nothing. The runner calls it after the data-parallel collective of real forwards and before that of
        dummy forwards; ``step`` is called at the same point of both."""

    def step(self, serving: bool, stage: Stage) -> None:
        """Does one step of the balancer."""
        if self.balancer is None or not self._began:
            return
        if self._agrees_on_stage:
            stage = stage_of_all(stage, self.balancer.parts.adaptor.control_group)
        self.balancer.forward_before(serving=serving, stage=stage)

    def forward_end(self, eplb_heat_collection_status: bool = True) -> None:
        if self.balancer is not None and self._began:
            self.balancer.forward_end()

    def shutdown(self) -> None:
        if self.balancer is not None:
            self.balancer.close()
