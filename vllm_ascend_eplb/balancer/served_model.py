# SPDX-License-Identifier: Apache-2.0
"""EplbAdaptor: the interface of a served model to the balancer; the balancer uses nothing else of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..load.recorder import LoadRecorder
from ..routing.weighted import DispatchTables
from ..values.placement import Placement
from ..values.topology import Topology
from .calibration import LayerRuns


class EplbAdaptor(ABC):
    """One model on one rank, as the balancer sees it.

    Attributes:
        name: name of the model, for the log.
        part: name of this balancer if a server has several (a pipeline stage, a draft model), for the log and the
            statistics; empty otherwise.
        channel: number of this balancer among the balancers that share its process groups, 0..CHANNELS-1.
        rank, topology: this rank in the expert-parallel group, and the node of each rank of the group.
        num_groups: groups of experts that the model routes by; 1 without groups.
        placement: the placement by which the weights were loaded, the same on all ranks.
        recorder: counts the load where the model routes.
        control_group: CPU process group of all ranks; nothing else uses it while serving.
        transfer_group: process group with a CPU backend, for weights that travel through the host; nothing else uses it
            while serving. None for a single rank.
        device_group: process group with the device's backend, or None; nothing else uses it.
        device: device of the weights.
        cooperative_kernels: whether the engine launches kernels that need all cores of a GPU at once.
        dispatch: the tables that the routers read if tokens are split by planned shares; None if they are split evenly.
            The updator changes them, with the maps and between placements.
    """

    name: str
    part: str = ""
    channel: int = 0
    rank: int
    topology: Topology
    num_groups: int
    placement: Placement
    recorder: LoadRecorder
    control_group: Any
    transfer_group: Any
    device_group: Any
    device: torch.device
    cooperative_kernels: bool = False
    dispatch: DispatchTables | None = None

    @property
    def title(self) -> str:
        """First words of log lines."""
        return f"EPLB {self.part}".rstrip()

    def layer_runs(self) -> LayerRuns | None:
        """Runs of the model's MoE layers with given expert ids, to time them; None if that is not possible."""
        return None

    @abstractmethod
    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        """[L][S] lists of tensors: all tensors of the expert in a slot (weights, scales, biases), as views of the
        memory that the model computes with. Number, shapes and dtypes are equal on all ranks."""

    @abstractmethod
    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        """Computes everything that the commit of ``placement`` needs for the changed layers. May raise. May be called
        for several commits ahead, in order, from another thread."""

    @abstractmethod
    def commit_maps(self) -> None:
        """Switches the routing to the oldest prepared placement. Only enqueues work; changes tensors in place."""

    @abstractmethod
    def forget_prepared_maps(self) -> None:
        """Drops what was prepared and not committed."""
