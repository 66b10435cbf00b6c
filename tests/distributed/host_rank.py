# SPDX-License-Identifier: Apache-2.0
"""One rank of a balancer whose ranks run on several hosts: ``python -m tests.distributed.host_rank RANK RANKS ADDRESS
PORT FOLDER STEPS``. It starts a balancer by every dictionary of settings in FOLDER, and writes its current step and its
observations to FOLDER."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vllm_ascend_eplb.agreement.exchange import StartError, exchange_bytes
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.balancer.updator import EplbUpdator
from vllm_ascend_eplb.files.disk import write_atomic
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.transport import Transport
from vllm_ascend_eplb.values.topology import Topology, host_identity

from .faulty import FaultyTransport, interpose
from .pace import make_planners_patient, settle, wait_for
from .ranks import Ranks
from .routing_model import REDUNDANT, RoutingModel

CUT_AT = 100
"""The step from which on a link is cut while experts are on their way."""


def main(rank: int, num_ranks: int, address: str, port: int, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(address, port, num_ranks, rank == 0, timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    everyone = list(range(num_ranks))
    ranks = Ranks(rank, num_ranks, dist.new_group(everyone, backend="gloo"), dist.new_group(everyone, backend="gloo"))
    model = RoutingModel(ranks)
    hosts = exchange_bytes(ranks.control, num_ranks, host_identity().encode())
    model.topology = Topology(tuple(hosts.index(host) for host in hosts))
    make_planners_patient()
    seen: dict[str, Any] = {"nodes": model.topology.node_of_rank, "errors": []}
    for settings in json.loads((folder / f"settings{rank}.json").read_text()):
        config = EplbConfig(dynamic_eplb=True, num_redundant_experts=REDUNDANT, policy="random", **settings)
        try:
            updator = start_balancer(model, config)
        except StartError as error:
            seen["errors"].append(str(error))
        else:
            seen |= serve(model, updator, folder, steps)
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    dist.barrier()  # no rank closes its sockets while another rank still uses them


class HeldUntilCut(FaultyTransport):
    """From step ``CUT_AT`` on, transfers begin only when the link is cut: the file ``held`` appears before, the file
    ``cut`` ends it."""

    def __init__(self, real: Transport, updator: EplbUpdator, folder: Path) -> None:
        super().__init__(real)
        self.updator, self.folder = updator, folder

    def running(self) -> None:
        if self.updator.state.step >= CUT_AT:
            (self.folder / "held").touch()
            wait_for((self.folder / "cut").exists, "the cut")


def serve(model: RoutingModel, updator: EplbUpdator, folder: Path, steps: int) -> dict[str, object]:
    """Step as an engine does, without a clock, and write every step to a file."""
    interpose(updator.parts.loader, HeldUntilCut, updator, folder)
    history, wrong = [], ""
    for step in range(steps):
        updator.forward_before()
        model.forward()
        updator.forward_end()
        history.append([updator.state.phase.name, updator.placement.digest])
        wrong = wrong or model.slots.wrong(updator.placement)
        dist.barrier()
        write_atomic(folder / f"step{model.rank}", str(step).encode())
        settle(updator)
    stats = updator.stats.stats()
    updator.close()
    return {"history": history, "wrong": wrong, "cycles_done": stats.cycles_done, "cycles_failed": stats.cycles_failed}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]))
    sys.stderr.flush()
    os._exit(0)  # in order, Gloo's groups would take seconds to end
