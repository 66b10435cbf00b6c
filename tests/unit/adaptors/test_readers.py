# SPDX-License-Identifier: Apache-2.0
"""Readers of weights are refused while experts are moved, for every method of vLLM's workers that reads weights."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend.runner import RunnerUpdator
from vllm_ascend_eplb.adaptors.readers import (
    MODEL_READERS,
    WORKER_READERS,
    LoadedOrder,
    MovedExpertsError,
    guard_model,
    guard_worker,
    require_loaded_order,
)
from vllm_ascend_eplb.adaptors.vllm.sources import calls, installed_root, look_up
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState
from vllm_ascend_eplb.values.placement import Placement

LOADED = Placement.initial(2, 4, 2, 2)
MOVED = Placement(np.roll(LOADED.physical_to_logical, 1, axis=1), 4, 2)

OTHER_METHODS = {
    "get_model": "gives the module to code in the same process",
    "get_model_inspection": "shows modules, no weights",
    "load_model": "balancing starts after it",
    "reload_weights": "goes back to the initial placement first",
    "reset_weights": "writes zeros to every slot",
    "sleep": "goes back to the initial placement first, where the contents go",
    "wake_up": "puts back what sleep has kept",
    "_get_sleep_parameters": "sleep goes back to the initial placement first",
    "_save_sleep_parameters": "sleep goes back to the initial placement first",
    "compile_or_warm_up_model": "looks for compiled modules",
    "_compile_or_warm_up_model": "looks for compiled modules",
    "__init__": "sets a field",
    "supports_draft_weight_updates": "asks for a draft model",
    "_set_draft_weight_update_target": "a draft model with experts is refused beside --weight-transfer-config",
    "_check_weight_transfer_engine": "asks for the engine",
    "init_weight_transfer_engine": "connects the engine; it reads no weights, except through guarded methods",
    "shutdown_weight_transfer_engine": "ends the engine",
    "_start_weight_update": "start_weight_update goes back to the initial placement first",
    "update_weights": "comes after start_weight_update, which holds the initial placement",
    "finish_weight_update": "comes after start_weight_update, which holds the initial placement",
    "shutdown": "ends the engine of a weight transfer",
}
"""Methods of vLLM's workers that touch the model or weights and need no check, with the reason."""


class Where:
    """A stand-in for a balancer: the placement in force."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement


def loaded_order(where: Where, by_map: bool = False) -> LoadedOrder:
    made = LoadedOrder()
    made.add(LOADED, where, by_map=by_map)  # type: ignore[arg-type]
    return made


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)


def test_error_names_slots_and_way_out() -> None:
    require_loaded_order("save_sharded_state", LOADED, LOADED, by_map=False)
    with pytest.raises(MovedExpertsError) as raised:
        require_loaded_order("save_sharded_state", MOVED, LOADED, by_map=False)
    assert re.search(r"save_sharded_state reads .* 12 of 12 slots .*allowed: 0.* control restore$", str(raised.value))
    with pytest.raises(MovedExpertsError, match=r"expert_map_path, .*allowed: null.*; restart the server without"):
        require_loaded_order("save_sharded_state", LOADED, LOADED, by_map=True)


@pytest.mark.parametrize("reader", WORKER_READERS)
def test_worker_readers_are_refused_while_experts_moved(reader: str) -> None:
    """Readers of both adaptors' workers are refused, and work again when the experts are back."""
    state = VllmEplbState(SimpleNamespace(data_parallel_size=1), torch.device("cpu"))
    for holder in (state, RunnerUpdator(None, None, None, None)):
        where, check = Where(LOADED), holder.loaded.require
        holder.loaded.add(LOADED, where, by_map=False)  # type: ignore[arg-type]
        base = type("Worker", (), {reader: lambda self, value: value, "other": lambda self: "other"})
        guard_worker(base, lambda worker, what, check=check: check(what))
        guard_worker(base, lambda worker, what: None)  # the second guard has no effect
        worker: Any = base()
        assert getattr(worker, reader)(7) == 7
        where.placement = MOVED
        with pytest.raises(MovedExpertsError, match=reader):
            getattr(worker, reader)(7)
        assert worker.other() == "other"
        where.placement = LOADED
        assert getattr(worker, reader)(7) == 7


def test_weights_loaded_by_a_map_are_never_exported() -> None:
    """No checkpoint has the order of a map. Within the server the model may be read."""
    order = LoadedOrder()
    order.require("apply_model")  # before a model is loaded
    order.add(LOADED, None, by_map=True)
    with pytest.raises(MovedExpertsError, match="expert_map_path"):
        order.require("save_sharded_state")
    order.require_unmoved("named_parameters of the model")
    order.add(LOADED, None, by_map=False)  # a draft model
    with pytest.raises(MovedExpertsError, match="expert_map_path"):
        order.require("apply_model")


def test_model_readers_are_refused_while_experts_moved() -> None:
    """Functions in collective_rpc call these readers. A model without a guard can be read."""
    where, model, unguarded = Where(LOADED), Model(), Model()
    guard_model(model, loaded_order(where).require_unmoved)
    readers = {name: (lambda m, name=name: list(getattr(m, name)())) for name in (*MODEL_READERS, "parameters")}
    for read in readers.values():
        assert len(read(model)) == 1
    where.placement = MOVED
    for name, read in readers.items():
        with pytest.raises(MovedExpertsError, match="of the model reads weights"):
            read(model)
        assert len(read(unguarded)) == 1, name
    assert torch.equal(model.w13_weight, torch.arange(4.0))  # serving reads attributes


def test_vllm_writes_no_file_of_moved_experts(tmp_path: Any) -> None:
    """vLLM's own writer and checksums are refused on a guarded model."""
    pytest.importorskip("vllm")
    from vllm.model_executor.model_loader import ShardedStateLoader

    where, model = Where(MOVED), Model()
    guard_model(model, loaded_order(where).require_unmoved)
    readers: list[Any] = [lambda: ShardedStateLoader._filter_subtensors(model.state_dict())]
    try:
        from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    except ImportError:  # since 0.32
        pass
    else:
        readers.append(lambda: compute_tensor_digests(model))
    for read in readers:
        with pytest.raises(MovedExpertsError):
            read()
    where.placement = LOADED
    for read in readers:
        assert list(read()) == ["w13_weight"]


def test_every_worker_method_that_reads_weights_is_known() -> None:
    """This test fails if a new vLLM adds a reader, so that a person decides about it."""
    root = installed_root()
    if root is None:
        pytest.skip("no vLLM here")
    reads = re.compile(
        r"get_model\(|model_runner\.model\b|state_dict|named_parameters|\.parameters\(|weight_transfer_engine|"
        r"zero_weights|save_model|tensor_digests|_weights\b"
    )
    found = {
        method.name
        for module, name in (("worker_base", "WorkerBase"), ("gpu_worker", "Worker"), ("cpu_worker", "CPUWorker"))
        for method in look_up(root, f"vllm.v1.worker.{module}", name).body  # type: ignore[attr-defined]
        if isinstance(method, ast.FunctionDef) and reads.search(ast.unparse(method))
    }
    assert {"save_sharded_state", "apply_model"} <= found
    assert found <= {*WORKER_READERS, *OTHER_METHODS}, "guard the new readers, or list them with a reason"


def test_returned_expert_ids_are_logical() -> None:
    """Routers record ids before they map them to slots."""
    root = installed_root()
    if root is None:
        pytest.skip("no vLLM here")
    for module, function in (
        ("vllm.model_executor.layers.fused_moe.router.base_router", "BaseRouter._select_experts"),
        ("vllm.models.deepseek_v4.nvidia.model", None),
        ("vllm.models.kimi_k3.nvidia.model", None),
    ):
        called = calls(look_up(root, module, function) if function else _tree(root, module))
        mapping = "self._apply_eplb_mapping" if function else "eplb_map_to_physical_and_record"
        assert called.index("self.capture_fn") < called.index(mapping)


def _tree(root: Any, module: str) -> ast.AST:
    from vllm_ascend_eplb.adaptors.vllm.sources import tree

    return tree(root, module)
