# SPDX-License-Identifier: Apache-2.0
"""Checks that the settings fit the map file, the model and the server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..files.disk import FileError, check_place, show
from ..files.expert_map import ExpertMapError, read_expert_map
from ..files.map_recorder import load_path
from ..values.placement import Placement
from .beside import left_over, moved_from_vllm
from .config import EplbConfig
from .messages import EplbConfigError, show_value


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that settings depend on.

    Attributes:
        num_experts: logical experts in each MoE layer, E; None or 0 for a model without MoE layers.
        num_layers: MoE layers, L; None if unknown: then only the workers compare it with the map.
    """

    num_experts: int | None
    num_layers: int | None = None


@dataclass(frozen=True)
class ServerShape:
    """The properties of a server that settings depend on.

    Attributes:
        ep_size: ranks of the expert-parallel group, R.
        expert_parallel: whether vLLM's ``--enable-expert-parallel`` is given.
    """

    ep_size: int
    expert_parallel: bool = True


def fit(config: EplbConfig, model: ModelShape, server: ServerShape) -> int:
    """Checks the settings against the model and the server. Does nothing unless the settings are active.

    Returns:
        Redundant experts per layer: ``num_redundant_experts``, or those of the map to start from.

    Raises:
        EplbConfigError: a setting cannot work; the message has the way out.
    """
    if not config.active:
        return config.num_redundant_experts
    num_experts, ep_size = model.num_experts, server.ep_size
    if not num_experts:
        raise EplbConfigError(
            "eplb_config is given for a model without experts (no MoE layers found in its configuration); leave "
            "eplb_config out, or serve a Mixture-of-Experts model"
        )
    if not server.expert_parallel:
        raise EplbConfigError(
            "eplb_config needs expert parallelism, which is off; add --enable-expert-parallel, or leave eplb_config out"
        )
    if ep_size < 2:
        raise EplbConfigError(
            f"the expert-parallel size is {ep_size}; balancing needs 2 or more ranks: raise "
            f"--tensor-parallel-size or --data-parallel-size, or leave eplb_config out"
        )
    start = read_start_placement(config, num_layers=model.num_layers, num_experts=num_experts, num_ranks=ep_size)
    redundant = config.num_redundant_experts
    if start is None:
        _check_redundancy(redundant, num_experts, ep_size)
    else:
        redundant = start.num_slots - num_experts
    _check_speed(config, ep_size)
    if config.expert_map_record_path is not None:
        _check_record_path(config.expert_map_record_path)
    return redundant


def refuse_vllms_own(config: EplbConfig, enable_eplb: bool, eplb_config: object) -> None:
    """Refuses options of vLLM's own balancer beside this one. Does nothing unless the settings are active.

    Args:
        enable_eplb: whether ``--enable-eplb`` is given.
        eplb_config: vLLM's ``EPLBConfig`` as ``--eplb-config`` made it.

    Raises:
        EplbConfigError: an option of vLLM's own balancer is given.
    """
    if not config.active:
        return
    if enable_eplb:
        raise EplbConfigError(
            "--enable-eplb turns on vLLM's own balancer, and eplb_config turns on this one; only one may run: "
            "leave out --enable-eplb, or eplb_config"
        )
    given = left_over(eplb_config)
    if given:
        raise EplbConfigError(
            f"--eplb-config sets {', '.join(sorted(given))} of vLLM's own balancer, which is not the one that runs; "
            f"leave out --eplb-config, and write --additional-config '{moved_from_vllm(given)}'"
        )


def read_start_placement(
    config: EplbConfig, *, num_layers: int | None, num_experts: int, num_ranks: int
) -> Placement | None:
    """The placement of ``expert_map_path``, checked against the model; None where no map is given.

    Args:
        num_layers: MoE layers, L; None accepts any number.
        num_experts: logical experts per layer, E.
        num_ranks: ranks of the expert-parallel group, R.

    Raises:
        EplbConfigError: the file is not a map for this model and server; the message names layer, device and slot.
    """
    if config.expert_map_path is None:
        return None
    where = "eplb_config.expert_map_path"
    try:
        # maps of other balancers may hold an expert twice on a device: that wastes a slot but is correct
        placement = read_expert_map(
            config.expert_map_path,
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=num_ranks,
            allow_duplicates=True,
        )
    except ExpertMapError as error:
        raise EplbConfigError(f"{where}: {error}") from None
    name = show(config.expert_map_path)
    redundant, most = placement.num_slots - num_experts, num_experts * (num_ranks - 1)
    if redundant > most:
        raise EplbConfigError(
            f"{where}: {name} has {placement.num_slots} slots per layer, more than {num_experts + most}, which "
            f"hold each of {num_experts} experts on each of {num_ranks} ranks; use a map with at most {most} "
            f"redundant experts"
        )
    if "num_redundant_experts" in config.model_fields_set and config.num_redundant_experts != redundant:
        raise EplbConfigError(
            f"{where}: {name} has {redundant} redundant experts per layer, eplb_config.num_redundant_experts is "
            f"{config.num_redundant_experts}; leave the number out, or use a map made for it"
        )
    return placement


def _check_speed(config: EplbConfig, ep_size: int) -> None:
    if config.rank_speed is None:
        return
    if len(config.rank_speed) != ep_size:
        raise EplbConfigError(
            f"eplb_config.rank_speed has {len(config.rank_speed)} numbers, the expert-parallel size is {ep_size}; "
            "give one for each rank, or leave it out"
        )
    if config.policy_name != "incremental" or config.weighted_dispatch:
        beside = "weighted_dispatch" if config.weighted_dispatch else f"the policy {config.policy_name}"
        raise EplbConfigError(
            f"eplb_config.rank_speed = {show_value(config.rank_speed)} is not supported together with {beside}; "
            'leave one of the two out (allowed: "policy": "incremental" without "weighted_dispatch")'
        )


def _check_redundancy(redundant: int, num_experts: int, ep_size: int) -> None:
    most = num_experts * (ep_size - 1)
    if redundant > most:
        raise EplbConfigError(
            f"eplb_config.num_redundant_experts = {redundant} is more than {most}, which puts each of "
            f"{num_experts} experts on each of {ep_size} ranks; allowed are {most % ep_size}..{most} "
            f"in steps of {ep_size}"
        )
    excess = (num_experts + redundant) % ep_size
    if excess:
        lower, upper = redundant - excess, redundant - excess + ep_size
        works = f"{lower} or {upper}" if lower >= 0 else f"{upper}"
        raise EplbConfigError(
            f"eplb_config.num_redundant_experts = {redundant}: {num_experts} experts + {redundant} cannot be "
            f"shared evenly by {ep_size} ranks; nearest that works: {works}"
        )


def refuse_options(options: Iterable[tuple[str, object, object, str]], engine: str = "") -> None:
    """Refuses options of an engine that are unsupported together with balancing.

    Args:
        options: for each option its name, value, allowed value and way out.
        engine: name of the engine, if the option is unsupported there only.

    Raises:
        EplbConfigError: an option does not have its allowed value.
    """
    beside = f" with {engine}" if engine else ""
    for name, value, allowed, way_out in options:
        if value != allowed:
            raise EplbConfigError(
                f"eplb_config together with {name} {value} is not supported{beside} in this version (allowed: "
                f"{allowed}); {way_out}, or leave eplb_config out"
            )


def _check_record_path(path: str) -> None:
    try:
        check_place(path)
        check_place(load_path(path))
    except FileError as error:
        raise EplbConfigError(f"eplb_config.expert_map_record_path: {error}") from None
