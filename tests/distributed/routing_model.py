# SPDX-License-Identifier: Apache-2.0
"""A model that only routes, for EplbUpdator with its real parts, and the observations of a rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_ascend_eplb.adaptors.engine_adaptor import EngineAdaptor
from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.routing.weighted import DispatchTables
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.topology import Topology

from .model import Slots
from .ranks import Ranks

LAYERS, EXPERTS, REDUNDANT = 3, 12, 6


def redundant(num_ranks: int) -> int:
    """The number of redundant experts, rounded up so that the ranks have equally many slots."""
    return REDUNDANT + -(EXPERTS + REDUNDANT) % num_ranks


class RoutingModel(EngineAdaptor):
    """A model of slots and routers without an engine. Every rank routes the same tokens, and rank 0 counts them."""

    def __init__(
        self,
        ranks: Ranks,
        weighted: bool = False,
        *,
        layers: int = LAYERS,
        experts: int = EXPERTS,
        part: str = "",
        channel: int = 0,
    ) -> None:
        self.name, self.part, self.channel = "routing model", part, channel
        self.rank = ranks.rank
        self.topology = Topology.even(ranks.num_ranks)
        self.num_groups = 1
        self.placement = Placement.initial(layers, experts, ranks.num_ranks, redundant(ranks.num_ranks))
        self.device = torch.device("cpu")
        self.control_group, self.transfer_group, self.device_group = ranks.control, ranks.transfer, None
        self.recorder = LoadRecorder(layers, experts, self.placement.num_slots, "cpu", contributes=ranks.rank == 0)
        self.slots = Slots(self.placement, ranks.rank, first_layer=12 * channel)
        self.maps = DispatchMaps(self.placement, "cpu", width=redundant(ranks.num_ranks) + 1)
        self.switched = [self.maps]
        self.dispatch = DispatchTables(self.placement, "cpu", 32) if weighted else None
        self.rng = np.random.default_rng(7)
        self.routed = np.zeros((layers, experts), dtype=np.int64)

    def forward(self) -> None:
        """Route skewed tokens; the skew differs by layer."""
        layers, experts = self.routed.shape
        for layer in range(layers):
            share = 1.0 / (1 + (np.arange(experts) + 5 * layer) % experts)
            ids = self.rng.choice(experts, size=(64, 1), p=share / share.sum())
            np.add.at(self.routed[layer], ids.ravel(), 1)
            tables = self.dispatch
            ops.map_and_record(
                torch.from_numpy(ids),
                self.maps.logical_to_physical[layer] if tables is None else tables.table[layer],
                self.maps.replica_count[layer] if tables is None else tables.count[layer],
                self.recorder.counts[layer],
                self.recorder.recording,
            )

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return self.slots.views()


@dataclass
class Seen:
    """Observations of one rank.

    Attributes:
        history: digest of the placement after every step. tables: digest of the dispatch tables after every step.
        after: by cycle, the digests of the placement and of this rank's weights after the cycle.
    """

    history: list[int] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    after: dict[int, tuple[int, str]] = field(default_factory=dict)
    wrong: str = ""
    error: str = ""
    phase: str = ""
    final_par: float = 0.0
    first_par: float = 0.0
    final_load: list[float] = field(default_factory=list)
    stats: Any = None
    step: int = 0
    lines: list[tuple[Any, ...]] = field(default_factory=list)
    """(step, name, avg_tokens, max_tokens, balancedness, steps left) of each line about balancedness."""
    began: list[int] = field(default_factory=list)
    """The step at which each cycle began; the first step is 1."""
    forwards: list[Any] = field(default_factory=list)
    """Tokens per slot [L, P] of each forward."""
