# SPDX-License-Identifier: Apache-2.0
"""One rank of a balancer whose ranks run on several hosts: ``python -m tests.distributed.host_rank RANK RANKS ADDRESS
PORT FOLDER STEPS``. It steps as an engine does, and writes its current step and its observations to FOLDER."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vllm_ascend_eplb.agreement.exchange import StartError, exchange_bytes
from vllm_ascend_eplb.balancer.start import start_balancer
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.values.topology import Topology, host_identity

from .ranks import Ranks
from .routing_model import REDUNDANT, RoutingModel


def main(rank: int, num_ranks: int, address: str, port: int, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(address, port, num_ranks, rank == 0, timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    everyone = list(range(num_ranks))
    ranks = Ranks(rank, num_ranks, dist.new_group(everyone, backend="gloo"), dist.new_group(everyone, backend="gloo"))
    model = RoutingModel(ranks)
    hosts = exchange_bytes(ranks.control, num_ranks, host_identity().encode())
    model.topology = Topology(tuple(hosts.index(host) for host in hosts))
    settings = json.loads((folder / f"settings{rank}.json").read_text())
    config = EplbConfig(dynamic_eplb=True, num_redundant_experts=REDUNDANT, policy="random", **settings)
    seen: dict[str, object] = {"nodes": model.topology.node_of_rank, "error": "", "wrong": ""}
    try:
        updator = start_balancer(model, config)
    except StartError as error:
        seen["error"] = str(error)
    else:
        history = []
        for step in range(steps):
            updator.forward_before()
            model.forward()
            updator.forward_end()
            history.append([updator.state.phase.name, updator.placement.digest])
            seen["wrong"] = seen["wrong"] or model.slots.wrong(updator.placement)
            dist.barrier()
            (folder / f"step{rank}").write_text(str(step))
            time.sleep(0.01)
        stats = updator.stats.stats()
        seen |= {"history": history, "cycles_done": stats.cycles_done, "cycles_failed": stats.cycles_failed}
        updator.close()
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    dist.barrier()  # no rank closes its sockets while another rank still uses them


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]))
