# SPDX-License-Identifier: Apache-2.0
"""Engine: the interface of the front end to vLLM, and to vllm-ascend with one of its two model runners."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from ..files.expert_map import ExpertMapError, read_expert_map
from ..settings.config import EplbConfig
from .parts import draft_layers, has_experts


class Verdict(NamedTuple):
    """Whether the installed version of an engine is balanced.

    Attributes:
        balances: whether balancing is on.
        warning: a line for the log; may be empty.
    """

    balances: bool
    warning: str = ""


class Engine(ABC):
    """One engine, as the front end sees it: how its configuration is checked and switched to balancing.

    Attributes:
        draft_layers_without_map: a map of the model alone is taken beside a draft model with at most so many layers;
            None for any number. The experts of the draft model are then spread as without a map.
    """

    draft_layers_without_map: int | None = None

    @abstractmethod
    def verdict(self, config: EplbConfig) -> Verdict:
        """Whether the installed version is balanced."""

    def without_balancing(self, engine_args: Any) -> Any:
        """The arguments of the engine if balancing stays off."""
        return engine_args

    @abstractmethod
    def with_balancing(self, engine_args: Any, config: EplbConfig) -> Any:
        """The arguments of the engine in the form that its own checks accept; a changed copy, or the same object.

        Raises:
            EplbConfigError: a setting cannot work, or the environment contradicts it.
        """

    def layers_of_map(self, config: EplbConfig, layers: int | None, speculative: Any) -> int | None:
        """How many layers ``expert_map_path`` must have: those of the model, and after them those of a draft model with
        experts, as a server records them. A map of the model alone is taken, too.

        Args:
            config: the settings.
            layers: layers with experts of the model; None where that is not known.
            speculative: vLLM's speculative configuration, or None; a dictionary where vLLM has not read it yet.

        Returns:
            None where that is not known.
        """
        if isinstance(speculative, dict):
            return None
        if config.expert_map_path is None or layers is None or not has_experts(speculative):
            return layers
        further = draft_layers(speculative)
        if further is None:
            return None
        most = self.draft_layers_without_map
        alone = most is None or further <= most
        return layers if alone and _layers_in(config.expert_map_path) == layers else layers + further

    @abstractmethod
    def refuse_unsupported(self, vllm_config: Any, config: EplbConfig) -> None:
        """Checks the complete configuration.

        Raises:
            EplbConfigError: an unsupported option, the first one, with the way out.
        """

    @abstractmethod
    def switch_on(self, vllm_config: Any, num_redundant: int) -> None:
        """Changes the complete configuration so that the workers balance."""

    @abstractmethod
    def is_on(self, vllm_config: Any) -> bool:
        """Whether workers that get this configuration balance."""

    @abstractmethod
    def parts(self, vllm_config: Any) -> list[str]:
        """Names of the balancers of the server; empty if there is one."""


def eplb_config_for(given: Any, num_redundant: int, *, use_async: bool) -> Any:
    """A copy of vLLM's settings of its own balancer, with the values that this balancer needs.

    Args:
        given: vLLM's ``EPLBConfig``; other code holds the same object.
        num_redundant: redundant experts per layer.
        use_async: vLLM's flag of that name.
    """
    made = copy.copy(given)
    made.num_redundant_experts = num_redundant
    made.use_async = use_async
    made.communicator = made.communicator or "torch_gloo"
    return made


def let_workers_balance(vllm_config: Any, num_redundant: int, worker_cls: str, *, use_async: bool) -> None:
    """Sets vLLM's own switch and the worker class in a complete configuration.

    The models build redundant slots, and routers with a placement, only with that switch. vLLM has validated the
    configuration by now, so that the switch can also be set on a CPU, where the validation refuses it.
    """
    parallel = vllm_config.parallel_config
    parallel.eplb_config = eplb_config_for(parallel.eplb_config, num_redundant, use_async=use_async)
    parallel.enable_eplb = True
    parallel.worker_cls = worker_cls


def _layers_in(path: str) -> int | None:
    """The number of layers of a map file; None if it cannot be read, which the check of the settings tells better."""
    try:
        return read_expert_map(path, allow_duplicates=True).num_layers
    except ExpertMapError:
        return None
