# SPDX-License-Identifier: Apache-2.0
"""Common parts of the adaptors of all engines: topology, recorder, switched maps, and the check of the copies."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..agreement.exchange import exchange_bytes
from ..balancer.served_model import EplbAdaptor
from ..load.recorder import LoadRecorder
from ..routing.maps import DispatchMaps, RoutingTables
from ..settings.config import EplbConfig
from ..values.placement import Placement
from ..values.topology import Topology, host_identity
from .errors import UnsupportedError

Recorder = TypeVar("Recorder", bound=LoadRecorder)


class EngineAdaptor(EplbAdaptor):
    """An adaptor of an engine whose routers read maps from the device.

    Attributes:
        switched: the maps that a commit switches to another placement, in this order.
    """

    switched: list[DispatchMaps | RoutingTables]

    def prepare_maps(self, placement: Placement, layers: list[int]) -> None:
        for maps in self.switched:
            maps.prepare(placement, layers)

    def commit_maps(self) -> None:
        for maps in self.switched:
            maps.commit()

    def forget_prepared_maps(self) -> None:
        for maps in self.switched:
            maps.forget_prepared()


def topology_of(control_group: Any, num_ranks: int) -> Topology:
    """The host of each rank; all ranks of the CPU process group call it together."""
    hosts = exchange_bytes(control_group, num_ranks, host_identity().encode())
    return Topology(tuple(hosts.index(host) for host in hosts))


def recorder_for(
    kind: type[Recorder],
    placement: Placement,
    device: torch.device,
    config: EplbConfig,
    *,
    contributes: bool = True,
    dtype: torch.dtype = torch.int64,
) -> Recorder:
    """The recorder that the settings ask for: stages kept apart, entries of the load series, and the stream.

    Args:
        kind: the class of the recorder.
        placement: the loaded placement; gives layers, experts and slots.
        device: device of the counters.
        config: the settings.
        contributes: whether the counts of this rank enter the sum over ranks.
        dtype: dtype of the layers' counters, int32 or int64.
    """
    stage = config.eplb_heat_collection_stage
    return kind(
        placement.num_layers,
        placement.num_experts,
        placement.num_slots,
        device,
        contributes=contributes,
        phases=("all",) if stage == "all" else (stage,),
        num_entries=config.load_entries,
        steps_per_entry=-(-config.expert_heat_collection_interval // config.load_entries),
        dtype=dtype,
        own_stream=config.mode != "sync",
    )


def require_loaded_copies(differing: int, load_format: str) -> None:
    """Ends start-up if redundant slots were left without weights, because their tokens would be answered wrongly.

    vLLM leaves them empty if a checkpoint has all experts of a layer in one tensor, and so do models that load their
    experts by themselves.

    Args:
        differing: number of experts whose copies differ after the model is loaded.
        load_format: vLLM's ``--load-format``; with "dummy" every slot has weights of its own, and copies may differ.

    Raises:
        UnsupportedError: copies differ.
    """
    if differing and load_format != "dummy":
        raise UnsupportedError(
            f"copies of {differing} experts differ from each other once the weights are loaded, so tokens would be "
            "answered wrongly: the loader of this model, or this form of checkpoint (all experts of a layer in one "
            "tensor), does not fill redundant slots; set num_redundant_experts to 0, or leave eplb_config out"
        )
