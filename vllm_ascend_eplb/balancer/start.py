# SPDX-License-Identifier: Apache-2.0
"""Start of a balancer: all ranks compare how they were started, then build it together."""

from __future__ import annotations

import logging

from .. import __version__
from ..agreement.channel import ControlChannel
from ..agreement.exchange import require_equal
from ..agreement.phases import CycleSettings, early
from ..files.map_recorder import DraftMapRecorder, MapRecorder
from ..observe.keeper import StatsKeeper
from ..observe.stats_file import StatsFile, stats_path
from ..planning.message import most_plan_bytes
from ..planning.process import EplbProcess
from ..settings.config import EplbConfig
from ..transfer.loader import D2DExpertWeightLoader
from ..transfer.slots import default_buffer_experts
from .orders import OrderBox, orders_path
from .served_model import EplbAdaptor
from .updator import EplbUpdator
from .work import Parts

logger = logging.getLogger("vllm.eplb")


LEAST_PLAN_AGE = 200
"""Least steps that the planner has, also with very short intervals in tests and trials."""


LISTEN_STEPS = 64
"""Steps between two steps at which all ranks learn of orders. Each time costs lag + 1 posts of facts."""


def start_balancer(
    adaptor: EplbAdaptor, config: EplbConfig, recorder: MapRecorder | DraftMapRecorder | None = None
) -> EplbUpdator:
    """Builds the balancer of one model on all ranks together, after a check that they were started alike. EP rank 0
    gets the planner's process and the statistics file.

    Args:
        adaptor: the model.
        config: the settings.
        recorder: records the placement in force on EP rank 0; None makes one, if ``config`` asks for it.

    Raises:
        StartError: the ranks were started differently; the message names rank and field.
    """
    require_equal_start(adaptor, config)
    if adaptor.rank != 0:
        return build_updator(adaptor, config)
    topology = adaptor.topology
    logger.info("%s: %d ranks on %d nodes share the experts", adaptor.title, topology.num_ranks, topology.num_nodes)
    path = stats_path(adaptor.part)
    return build_updator(
        adaptor,
        config,
        EplbProcess(),
        StatsFile(path) if path is not None else None,
        OrderBox(orders_path(path)) if path is not None else None,
        recorder or map_recorder(config),
    )


def map_recorder(config: EplbConfig) -> MapRecorder | None:
    """The recorder that the settings ask for. It starts nothing before its first record."""
    return None if config.expert_map_record_path is None else MapRecorder(config.expert_map_record_path)


def require_equal_start(adaptor: EplbAdaptor, config: EplbConfig) -> None:
    """Checks that all ranks were started alike; all ranks call it together.

    Raises:
        StartError: the ranks were started differently; the message names rank and field.
    """
    placement = adaptor.placement
    require_equal(
        adaptor.control_group,
        placement.num_ranks,
        {
            "package version": __version__,
            "part of the server": adaptor.part or "all",
            **{f"eplb_config.{key}": value for key, value in config.model_dump().items()},
            "layers, experts, slots": (placement.num_layers, placement.num_experts, placement.num_slots),
            "start placement": f"{placement.digest:016x}",
        },
    )


def build_updator(
    adaptor: EplbAdaptor,
    config: EplbConfig,
    planner: EplbProcess | None = None,
    stats_file: StatsFile | None = None,
    orders: OrderBox | None = None,
    map_recorder: MapRecorder | DraftMapRecorder | None = None,
) -> EplbUpdator:
    """Builds the balancer from given parts; all ranks together, in the engine's profile run.

    Args:
        adaptor: the served model.
        config: the settings, equal on all ranks.
        planner, stats_file, orders, map_recorder: parts of EP rank 0 only; see ``Parts``.
    """
    topology, lag = adaptor.topology, 0 if config.mode == "sync" else config.control_lag
    if adaptor.rank == 0 and topology.num_blocks != topology.num_nodes:
        logger.warning(
            "EPLB plans as if all %d ranks were on one node: its %d nodes do not share them evenly and in a row, "
            "so copies of an expert may end up on any of them (nodes of the ranks: %s)",
            topology.num_ranks,
            topology.num_nodes,
            topology.node_of_rank,
        )
    control = ControlChannel(adaptor.control_group, adaptor.rank, topology.num_ranks, lag)
    loader = _loader(adaptor, config)
    control.reserve(most_plan_bytes(adaptor.placement))
    loader.warm_up()
    if adaptor.rank == 0:
        logger.info("%s %s", adaptor.title, loader.describe())
    return EplbUpdator(
        Parts(
            adaptor,
            config,
            _clock(config, loader.num_buffers),
            control,
            loader,
            StatsKeeper(__version__, config.policy_name, config.mode),
            loader.learn_checksums(adaptor.placement),
            planner,
            stats_file,
            orders,
            map_recorder,
        )
    )


def _loader(adaptor: EplbAdaptor, config: EplbConfig) -> D2DExpertWeightLoader:
    placement = adaptor.placement
    return D2DExpertWeightLoader(
        adaptor.expert_tensors(),
        adaptor.transfer_group,
        adaptor.rank,
        config.transfer_buffer_experts
        or default_buffer_experts(placement.num_layers, placement.slots_per_rank, config.control_lag),
        config.transport,
        topology=adaptor.topology,
        device_group=adaptor.device_group,
        budget_bytes=int((config.transfer_budget_mb_per_step or 0) * 1e6),
        channel=adaptor.channel,
        cooperative_kernels=adaptor.cooperative_kernels,
        own_streams=config.mode != "sync",
    )


def _clock(config: EplbConfig, buffers: int) -> CycleSettings:
    return CycleSettings(
        collect_steps=config.expert_heat_collection_interval,
        execution_steps=config.algorithm_execution_interval,
        first_collect_steps=early(config.expert_heat_collection_interval),
        max_failures=config.max_failures,
        buffers=buffers,
        least_plan_age=LEAST_PLAN_AGE,
        cut_after=LEAST_PLAN_AGE,
        listen_steps=LISTEN_STEPS,
        audit_steps=config.audit_interval,
        synchronous=config.mode == "sync",
    )
