# SPDX-License-Identifier: Apache-2.0
"""EplbAdaptor: all that the balancer needs to know of a served model, and nothing else of the engine."""

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
        name: of the model, for the log.
        part: which of several balancers of one server this is (a pipeline stage, a draft model), for the log and the
            statistics; empty for the only one.
        channel: number of the balancer among those that share its process groups, 0..CHANNELS-1.
        rank, topology: this rank within the expert-parallel group, and the node of each of its ranks.
        num_groups: groups of experts as the model routes them; 1 where it does not.
        placement: the placement whose weights were loaded, the same on all ranks.
        recorder: counts the load where the model routes.
        control_group: CPU process group of all ranks; nobody else uses it while serving.
        transfer_group: process group with a CPU backend that nothing else uses while serving, for weights that travel
            through the host; None for a single rank.
        device_group: process group with the device's backend that nothing else uses, or None.
        device: where the weights live.
        cooperative_kernels: whether the engine launches kernels that need all cores of a GPU at once.
        dispatch: the tables that the routers read where tokens are split by planned shares; None where they are split
            evenly. The updator changes them, with the maps and between placements.
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
        """How lines in the log begin."""
        return f"EPLB {self.part}".rstrip()

    def layer_runs(self) -> LayerRuns | None:
        """How the model's MoE layers are run with expert ids from outside, to time them; None where they cannot be."""
        return None

    @abstractmethod
    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        """[L][S] lists of tensors: all that belongs to the expert in a slot (weights, scales, biases), as views of the
        memory that the model computes with. All ranks give the same number, shapes and dtypes."""

    @abstractmethod
    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        """Computes all that the commit of ``placement`` needs for the layers in which it differs. May raise; may be
        called ahead for several commits, in order, from another thread."""

    @abstractmethod
    def commit_maps(self) -> None:
        """Switches the routing over to the oldest prepared placement. Only enqueues work; changes tensors in place."""

    @abstractmethod
    def forget_prepared_maps(self) -> None:
        """Drops what was prepared and not committed."""
