# SPDX-License-Identifier: Apache-2.0
"""Refuses readers of weights by slot while experts are not in the slots where a checkpoint has them.

After experts have moved, a slot holds another expert than after loading, and a file or copy made by slots would
silently hold wrong weights. So the methods of a worker that read weights check this first. ``named_parameters`` and
``state_dict`` of the model do the same, because functions that run by ``collective_rpc`` call them. The error names the
command that moves every expert back.

Expert ids that vLLM returns (``--enable-return-routed-experts``) need no check: routers note logical ids, before they
map them to slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..balancer.updator import EplbUpdator
from ..values.placement import Placement
from .patching import patch_once

WORKER_READERS = ("save_sharded_state", "save_tensorized_model", "compute_weight_checksums", "apply_model")
"""Methods of vLLM's workers that read weights, or hand the model to a function of the user."""

MODEL_READERS = ("named_parameters", "state_dict")
"""Methods of a model that read weights by name; ``parameters`` uses the first."""


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
        self._by_map = False

    def add(self, loaded: Placement, balancer: EplbUpdator | None, *, by_map: bool) -> None:
        """Adds a model.

        Args:
            loaded: the placement that the weights were loaded by.
            balancer: None for a static placement.
            by_map: whether ``loaded`` is a map of the user.
        """
        self._models.append((loaded, balancer))
        self._by_map |= by_map

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


def guard_model(model: Any, check: Callable[[str], None]) -> None:
    """Lets the readers of a model instance check first; idempotent.

    Args:
        check: gets the name of the method, and raises if weights must not be read.
    """
    for name in MODEL_READERS:
        if hasattr(model, name):
            patch_once(model, name, functools.partial(_checked_call, name, check))


def _checked_method(name: str, check: Callable[[Any, str], None], original: Any) -> Any:
    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, name)
        return original(self, *args, **kwargs)

    return checked


def _checked_call(name: str, check: Callable[[str], None], original: Any) -> Any:
    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(f"{name} of the model")
        return original(*args, **kwargs)

    return checked
