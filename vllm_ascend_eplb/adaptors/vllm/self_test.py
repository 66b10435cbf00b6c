# SPDX-License-Identifier: Apache-2.0
"""Checks in the sources of a vLLM everything that the adaptor relies on.

It checks the names of the patch points (``patch_points.py``), the order of calls around the point of
``forward_before``, parameters, and the attributes that runners use of the state. A vLLM that passes can be balanced
although the end-to-end tests did not run on it (``versions.py``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

from .patch_points import points_on
from .sources import SourceError, attributes_of, calls, look_up, parameters, tree

_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
_CONTROLLER = "vllm.v1.worker.gpu.eplb_utils"
_LAYERS = "vllm.model_executor.models.interfaces"
_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"

KNOWN_OF_STATE = {
    "add_model",
    "is_async",
    "prepare_forward",
    "should_record_tensor",
    "start_async_loop",
    "step",
    "update_mapping",  # with --enable-elastic-ep only, which is refused
}
"""Attributes that a runner may use of its EPLB state."""

MAPPING_PARAMETERS = {
    "topk_ids",
    "expert_load_view",
    "logical_to_physical_map",
    "logical_replica_count",
    "record_enabled",
    "num_unpadded_tokens",
}
"""Parameters of the mapping op; routers may pass any of them."""


_OF_LAYERS = {"expert_load_view", "logical_to_physical_map", "logical_replica_count"}


def differences(root: Path, platform: str) -> list[str]:
    """Differences of the vLLM in a folder from the one that the adaptor knows, one line for each; empty if it fits.

    Args:
        root: the folder that holds the package ``vllm``.
        platform: device type (cuda, cpu, npu).
    """
    found = []
    for point in points_on(platform):
        try:
            look_up(root, point.module, point.name)
        except SourceError as error:
            found.append(f"{error} ({point.use})")
    for check in (_first_runner, _second_runner, _interfaces):
        found += _lines_of(check, root)
    return found


def _lines_of(check: Callable[[Path], Iterator[str]], root: Path) -> list[str]:
    try:
        return list(check(root))
    except SourceError as error:
        return [str(error)]


def _first_runner(root: Path) -> Iterator[str]:
    """V1 calls the point once in real and dummy forwards, after the data-parallel collective, before the model."""
    point = "self._determine_batch_execution_and_padding"
    for name in ("execute_model", "_dummy_run"):
        called = calls(look_up(root, _V1, f"GPUModelRunner.{name}"))
        runs = [index for index, call in enumerate(called) if call in ("self._model_forward", "self.model")]
        if called.count(point) != 1 or not runs or called.index(point) > min(runs):
            yield f"{_V1}.{name} does not call {point} once before the model"
    if "coordinate_batch_across_dp" not in calls(look_up(root, _V1, f"GPUModelRunner.{point.partition('.')[2]}")):
        yield f"{_V1}: {point} does not call coordinate_batch_across_dp"
    if not {"skip_eplb", "is_profile"} <= parameters(look_up(root, _V1, "GPUModelRunner._dummy_run")):
        yield f"{_V1}._dummy_run lacks skip_eplb or is_profile"
    if "self.eplb_state.step" not in calls(look_up(root, _V1, "GPUModelRunner.eplb_step")):
        yield f"{_V1}.eplb_step does not call self.eplb_state.step"
    unknown = attributes_of(tree(root, _V1), "self.eplb_state") - KNOWN_OF_STATE
    if unknown:
        yield f"{_V1} uses of its state: {', '.join(sorted(unknown))}"


def _second_runner(root: Path) -> Iterator[str]:
    """V2 calls the point once, after the data-parallel collective, before the model; a dummy run reaches it, too."""
    execute, dummy = (look_up(root, _V2, f"GPUModelRunner.{name}") for name in ("execute_model", "_dummy_run"))
    called, point = calls(execute), "self.eplb.prepare_forward"
    order = ("dispatch_cg_and_sync_dp", point, "self.model", "self.cudagraph_manager.run_fullgraph")
    if called.count(point) != 1 or any(call not in called for call in order):
        yield f"{_V2}.execute_model does not call each of {', '.join(order)}"
    elif not called.index(order[0]) < called.index(point) < min(called.index(order[2]), called.index(order[3])):
        yield f"{_V2}.execute_model does not call {point} between {order[0]} and the model"
    if "dummy_run" not in parameters(execute) or calls(dummy).count("self.execute_model") != 1:
        yield f"{_V2}._dummy_run does not call execute_model(dummy_run=True) once"
    if not {"skip_eplb", "is_profile"} <= parameters(dummy):
        yield f"{_V2}._dummy_run lacks skip_eplb or is_profile"
    for name, decorator in (
        ("_dummy_run", "step_eplb_after(is_dummy=True)"),
        ("sample_tokens", "step_eplb_after()"),
        ("pool", "step_eplb_after()"),
    ):
        if decorator not in _decorators(look_up(root, _V2, f"GPUModelRunner.{name}")):
            yield f"{_V2}.{name} is not decorated with {decorator}"
    for name, call in (
        ("prepare_load", "EplbState"),
        ("step", "self.state.step"),
        ("prepare_forward", "self.state.prepare_forward"),
    ):
        if call not in calls(look_up(root, _CONTROLLER, f"EPLBController.{name}")):
            yield f"{_CONTROLLER}.{name} does not call {call}"
    if "decode_query_len" not in attributes_of(tree(root, _V2), "self"):
        yield f"{_V2} has no decode_query_len"
    unknown = attributes_of(tree(root, _CONTROLLER), "self.state") - KNOWN_OF_STATE
    if unknown:
        yield f"{_CONTROLLER} uses of its state: {', '.join(sorted(unknown))}"


def _interfaces(root: Path) -> Iterator[str]:
    """The parameters of the functions between vLLM and the adaptor are the known ones."""
    for module, name, needed in (
        (_LAYERS, "MixtureOfExperts.set_eplb_state", _OF_LAYERS),
        (_ROUTER, "eplb_map_to_physical_and_record", MAPPING_PARAMETERS),
    ):
        given = parameters(look_up(root, module, name)) - {"self"}
        if given != needed:
            yield f"{module}.{name} has the parameters {', '.join(sorted(given))}"


def _decorators(function: ast.AST) -> list[str]:
    return [ast.unparse(decorator) for decorator in getattr(function, "decorator_list", ())]
