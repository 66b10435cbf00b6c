# SPDX-License-Identifier: Apache-2.0
"""Readers of weights are refused while experts are moved, for every method of vLLM's workers that reads weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ascend_eplb.adaptors.ascend.runner import RunnerUpdator
from vllm_ascend_eplb.adaptors.readers import (
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
    "reload_weights": "goes back to the start placement first",
    "reset_weights": "writes zeros to every slot",
    "sleep": "goes back to the start placement first, where the contents go",
    "wake_up": "puts back what sleep has kept",
    "_get_sleep_parameters": "sleep goes back to the start placement first",
    "_save_sleep_parameters": "sleep goes back to the start placement first",
    "compile_or_warm_up_model": "looks for compiled modules",
    "_compile_or_warm_up_model": "looks for compiled modules",
    "__init__": "sets a field",
    "supports_draft_weight_updates": "asks for a draft model",
    "_set_draft_weight_update_target": "a draft model with experts is refused beside --weight-transfer-config",
    "_check_weight_transfer_engine": "asks for the engine",
    "init_weight_transfer_engine": "connects the engine; it reads no weights, except through guarded methods",
    "shutdown_weight_transfer_engine": "ends the engine",
    "_start_weight_update": "start_weight_update goes back to the start placement first",
    "update_weights": "comes after start_weight_update, which holds the start placement",
    "finish_weight_update": "comes after start_weight_update, which holds the start placement",
    "shutdown": "ends the engine of a weight transfer",
}
"""Methods of vLLM's workers that touch the model or weights and need no check, with the reason."""


class Where:
    """A stand-in for a balancer: the placement in force."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.arange(4.0)[:, None], requires_grad=False)


class Model(torch.nn.Module):
    """A vision part, and a language part with a layer of experts, as multimodal models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch.nn.Linear(2, 2)
        self.language = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "experts": Experts()})

    @property
    def experts(self) -> Any:
        return self.language["experts"]


def order_of(model: Model, where: Where) -> LoadedOrder:
    """The order of a model whose one weight of experts is moved by a balancer."""
    made = LoadedOrder()
    weight = model.experts.w13_weight
    made.add(LOADED, where, by_map=False, experts=[[[weight.data[slot]] for slot in range(4)]])  # type: ignore[arg-type]
    return made


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
    state = VllmEplbState(SimpleNamespace(data_parallel_size=1, num_ubatches=0), torch.device("cpu"))
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


READS: dict[str, Callable[[Any], object]] = {
    "parameters": lambda model: list(model.parameters()),
    "named_parameters": lambda model: dict(model.named_parameters()),
    "named_parameters, duplicates kept": lambda model: dict(model.named_parameters(remove_duplicate=False)),
    "named_parameters with a prefix": lambda model: dict(model.named_parameters("model")),
    "state_dict": lambda model: model.state_dict(),
    "state_dict as variables": lambda model: model.state_dict(keep_vars=True),
    "get_parameter": lambda model: model.get_parameter("language.experts.w13_weight"),
    "of a part": lambda model: dict(model.language.named_parameters()),
    "of the layer": lambda model: list(model.experts.parameters()),
    "state_dict of the layer": lambda model: model.experts.state_dict(),
    "get_parameter of a part": lambda model: model.language.get_parameter("experts.w13_weight"),
}
"""Ways in which functions that run by collective_rpc read weights."""


@pytest.mark.parametrize("way", READS)
def test_model_readers_are_refused_while_experts_moved(way: str) -> None:
    """Negative control: a model that was not guarded is read."""
    where, model, unguarded = Where(LOADED), Model(), Model()
    guard_model(model, order_of(model, where))
    guard_model(model, order_of(model, where))  # the second has no effect
    READS[way](model)
    where.placement = MOVED
    with pytest.raises(MovedExpertsError, match="of the model reads weights by slot"):
        READS[way](model)
    READS[way](unguarded)
    assert torch.equal(model.experts.w13_weight, unguarded.experts.w13_weight)  # serving reads attributes
    where.placement = LOADED
    READS[way](model)


def test_serving_reads_what_does_not_move() -> None:
    """Some multimodal models ask for the dtype of the first parameter with each image, and vLLM's hooks for tracing ask
    each module for its own parameters. An error there would end the engine."""
    where, model = Where(MOVED), Model()
    guard_model(model, order_of(model, where))
    assert next(model.parameters()).dtype == torch.float32
    assert next(model.named_parameters())[0] == "vision.weight"
    assert list(model.named_parameters(recurse=False)) == []
    assert len(list(model.vision.parameters())) == 2
    assert set(model.vision.state_dict()) == {"weight", "bias"}
    assert model.get_parameter("vision.bias") is model.vision.bias
    with pytest.raises(MovedExpertsError):
        list(model.experts.named_parameters(recurse=False))


def test_guarded_modules_compile() -> None:
    """torch.compile asks the readers of a module for ``__func__``, as methods have it."""
    model = Model()
    guard_model(model, order_of(model, Where(MOVED)))
    layer = model.language
    layer.forward = lambda rows: rows * layer.experts.w13_weight.sum()  # type: ignore[method-assign]
    rows = torch.ones(3)
    assert torch.equal(torch.compile(layer, backend="eager")(rows), layer.forward(rows))
    for name in ("named_parameters", "state_dict", "get_parameter"):
        assert getattr(layer, name).__func__ is not getattr(torch.nn.Module, name)
        assert getattr(layer, name).__self__ is layer


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
