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
from types import ModuleType
from typing import Any

import torch

from ...balancer.start import require_equal_start, start_balancer
from ...balancer.updator import EplbUpdator, Stage
from ...settings.config import EplbConfig
from ..post_import import after_import
from .adaptor import AscendAdaptor, AscendError, require_loaded_copies
from .hand_over import CHECKED_VERSIONS, installed_version
from .routing import DISPATCHER, forward_of_all, look_up_slots

logger = logging.getLogger("vllm.eplb")


RUNNER = "vllm_ascend.worker.model_runner_v1"


FORWARD_CONTEXT = "vllm_ascend.ascend_forward_context"


CALLS = {
    "eplb_loader": {"set_adator"},
    "eplb_process": {"_launch_process"},
    "eplb_updator": {"set_adaptor", "warm_up_eplb", "forward_before", "forward_end", "adaptor.clear_all_moe_loads"},
}
"""What the runner calls on the objects that are replaced. A runner that calls more is left alone."""


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
    runner.EplbUpdator = RunnerUpdator  # type: ignore[attr-defined]
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
            "reload_weights fills slots by the initial placement, which may no longer be in force; restart the server "
            "with the other weights"
        )

    runner.execute_model, runner._dummy_run, runner.reload_weights = execute_model, dummy_run, reload_weights
    runner._determine_batch_execution_and_padding = determine_then_step


def count_in_every_forward(context: ModuleType) -> None:
    """Lets the layers count whatever runs them; the recorder knows what is to be kept. vllm-ascend leaves a drafter's
    dummy batches out, in which the slots of an idle engine receive the other engines' tokens; idempotent."""
    type(context._EXTRA_CTX).eplb_heat_collection_status = property(lambda self: True)


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


class RunnerUpdator:
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
