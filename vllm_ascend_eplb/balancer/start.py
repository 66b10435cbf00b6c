# SPDX-License-Identifier: Apache-2.0
"""How a balancer starts: all ranks tell each other how they were started, then build it together."""

from __future__ import annotations

from .. import __version__
from ..agreement.exchange import require_equal
from ..files.map_recorder import MapRecorder
from ..observe.stats_file import StatsFile, stats_path
from ..planning.process import EplbProcess
from ..settings.config import EplbConfig
from .orders import OrderBox, orders_path
from .served_model import EplbAdaptor
from .updator import EplbUpdator, logger


def start_balancer(adaptor: EplbAdaptor, config: EplbConfig) -> EplbUpdator:
    """The balancer of one model, built on all ranks together, once they have told each other that they were started
    alike. EP rank 0 gets the planner's process and the statistics file.

    Raises:
        StartError: the ranks were started differently; names rank and field.
    """
    require_equal_start(adaptor, config)
    first = adaptor.rank == 0
    path = stats_path(adaptor.part) if first else None
    record = config.expert_map_record_path if first else None
    if first:
        topology = adaptor.topology
        logger.info("%s: %d ranks on %d nodes share the experts", adaptor.title, topology.num_ranks, topology.num_nodes)
    return EplbUpdator(
        adaptor,
        config,
        EplbProcess() if first else None,
        StatsFile(path) if path is not None else None,
        OrderBox(orders_path(path)) if path is not None else None,
        MapRecorder(record) if record is not None else None,
    )


def require_equal_start(adaptor: EplbAdaptor, config: EplbConfig) -> None:
    """Makes sure that all ranks were started alike; all call it together.

    Raises:
        StartError: they were not; names rank and field.
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
            "initial placement": f"{placement.digest:016x}",
        },
    )
