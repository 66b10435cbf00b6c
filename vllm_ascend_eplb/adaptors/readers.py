# SPDX-License-Identifier: Apache-2.0
"""Refuses readers of weights by slot while experts are not in the slots where a checkpoint has them.

Once experts have moved, slot s of a rank holds another expert than after loading, and a file or a copy that is made
by slots would silently hold wrong weights. The methods of a worker that read weights check this first. Functions that
run by ``collective_rpc`` call ``named_parameters``, ``state_dict`` or ``get_parameter`` of the model or of a module in
it: those check each tensor that they give, and refuse a weight that moves. All others they give, because serving asks
for the first parameter, too: some multimodal models ask for its dtype with each image. The way out of the error moves
every expert back.

Expert ids that vLLM returns (``--enable-return-routed-experts``) need no check: routers note logical ids, before they
map them to slots.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..balancer.updator import EplbUpdator
from ..values.placement import Placement
from .patching import patch_once

WORKER_READERS = ("save_sharded_state", "save_tensorized_model", "compute_weight_checksums", "apply_model")
"""Methods of vLLM's workers that read weights, or hand the model to a function of the user."""


class MovedExpertsError(RuntimeError):
    """Weights would be read from slots that hold other experts than a checkpoint has there."""


def require_loaded_order(what: str, in_force: Placement, loaded: Placement, *, by_map: bool) -> None:
    """Checks that every expert is where a checkpoint has it.

    Args:
        what: the reader, for the error message.
        in_force: the placement in force.
        loaded: the placement that the weights were loaded by.
        by_map: whether that was a map of the user; then no checkpoint has this order.

    Raises:
        MovedExpertsError: an expert is in another slot; the message has the number of such slots and the way out.
    """
    moved = int((in_force.physical_to_logical != loaded.physical_to_logical).sum())
    if moved:
        raise MovedExpertsError(
            f"{what} reads weights by slot, but {moved} of {in_force.physical_to_logical.size} slots hold another "
            "expert than when they were loaded (allowed: 0); first move all experts back and pause, with: "
            "vllm-ascend-eplb control restore"
        )
    if by_map:
        raise MovedExpertsError(
            f"{what} reads weights by slot, but they were loaded in the order of eplb_config.expert_map_path, which no "
            "checkpoint has (allowed: null); restart the server without expert_map_path"
        )


class LoadedOrder:
    """The placements by which the models of a worker were loaded, with the balancers that move their experts."""

    def __init__(self) -> None:
        self._models: list[tuple[Placement, EplbUpdator | None]] = []
        self._moving: set[int] = set()
        self._by_map = False

    def add(
        self,
        loaded: Placement,
        balancer: EplbUpdator | None,
        *,
        by_map: bool,
        experts: Iterable[Iterable[Iterable[torch.Tensor]]] = (),
    ) -> None:
        """Adds a model.

        Args:
            loaded: the placement that the weights were loaded by.
            balancer: None for a static placement.
            by_map: whether ``loaded`` is a map of the user.
            experts: [L][S] tensors of the expert in each slot, as :meth:`EplbAdaptor.expert_tensors` gives them.
        """
        self._models.append((loaded, balancer))
        self._by_map |= by_map
        self._moving |= {tensor.data_ptr() for layer in experts for slot in layer for tensor in slot} - {0}

    def moves(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter begins where an expert's weights are, which a balancer moves."""
        return tensor.data_ptr() in self._moving

    def require(self, what: str) -> None:
        """Refuses a reader of weights that would find experts in other slots than in a checkpoint.

        Args:
            what: the reader, for the error message.

        Raises:
            MovedExpertsError: experts have moved, or were loaded by a map.
        """
        self.require_unmoved(what)
        for loaded, _ in self._models[:1]:
            require_loaded_order(what, loaded, loaded, by_map=self._by_map)

    def require_unmoved(self, what: str) -> None:
        """Like :meth:`require`, for readers within the server, which a map does not disturb.

        Raises:
            MovedExpertsError: experts have moved.
        """
        for loaded, balancer in self._models:
            if balancer is not None:
                require_loaded_order(what, balancer.placement, loaded, by_map=False)


def guard_worker(worker: type, check: Callable[[Any, str], None]) -> None:
    """Lets the readers of a worker class check first; idempotent. Skips methods that this version lacks.

    Args:
        check: gets the worker and the name of the method, and raises if weights must not be read.
    """
    for name in WORKER_READERS:
        if hasattr(worker, name):
            patch_once(worker, name, functools.partial(_checked_method, name, check))


def guard_model(model: torch.nn.Module, loaded: LoadedOrder) -> None:
    """Lets the readers of a model check what they give, and those of every module in it that holds experts; idempotent.

    Args:
        model: on which ``loaded`` was built.
        loaded: knows which weights move, and whether they have.
    """
    for module in modules_with_experts(model, loaded):
        patch_once(module, "named_parameters", functools.partial(_method, module, _checked_parameters, loaded))
        patch_once(module, "state_dict", functools.partial(_method, module, _checked_state, loaded))
        patch_once(module, "get_parameter", functools.partial(_method, module, _checked_parameter, loaded))


def modules_with_experts(model: torch.nn.Module, loaded: LoadedOrder) -> list[torch.nn.Module]:
    """The modules of a model, itself included, that have a weight that moves in them."""
    holders = {id(module) for module in model.modules() if any(map(loaded.moves, module.parameters(recurse=False)))}
    return [module for module in model.modules() if any(id(inner) in holders for inner in module.modules())]


def _method(
    module: torch.nn.Module, checked: Callable[[LoadedOrder, Any], Any], loaded: LoadedOrder, original: Any
) -> types.MethodType:
    """A reader of one module as a method of it, because torch.compile takes no plain function in its place."""
    return types.MethodType(checked(loaded, original), module)


def _checked_method(name: str, check: Callable[[Any, str], None], original: Any) -> Any:
    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, name)
        return original(self, *args, **kwargs)

    return checked


def _checked_parameters(loaded: LoadedOrder, original: Any) -> Any:
    @functools.wraps(original)
    def named_parameters(_: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in original(*args, **kwargs):
            if loaded.moves(parameter):
                loaded.require_unmoved("named_parameters of the model")
            yield name, parameter

    return named_parameters


def _checked_state(loaded: LoadedOrder, original: Any) -> Any:
    @functools.wraps(original)
    def state_dict(_: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        if any(loaded.moves(value) for value in state.values() if isinstance(value, torch.Tensor)):
            loaded.require_unmoved("state_dict of the model")
        return state

    return state_dict


def _checked_parameter(loaded: LoadedOrder, original: Any) -> Any:
    @functools.wraps(original)
    def get_parameter(_: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Parameter:
        parameter: torch.nn.Parameter = original(*args, **kwargs)
        if loaded.moves(parameter):
            loaded.require_unmoved("get_parameter of the model")
        return parameter

    return get_parameter
