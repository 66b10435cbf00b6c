# SPDX-License-Identifier: Apache-2.0
"""Programs with the balancer's core on NPUs: recording, transfers over hccl, commits, whole cycles."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.distributed.model import Driver, Slots, Trouble, expert_tensors, random_placement
from tests.distributed.ranks import Ranks
from vllm_ascend_eplb.adaptors.engine_adaptor import EngineAdaptor
from vllm_ascend_eplb.balancer.start import build_updator
from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.planning.process import EplbProcess
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.transfer.loader import D2DExpertWeightLoader
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.rounds import Round
from vllm_ascend_eplb.values.topology import Topology

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _start(device: str = "npu") -> Ranks:
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,npu:hccl", timeout=timedelta(seconds=200))
    return Ranks(RANK, SIZE, dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))


def recorder() -> str:
    """LoadRecorder and map_and_record on an NPU and on a CPU, step by step over changing placements."""
    rng = np.random.default_rng(5)
    layers, experts, slots, tokens = 3, 10, 8, 40
    placements = [random_placement(rng, layers, experts, 2, slots) for _ in range(3)]
    taken: dict[str, list[Any]] = {"cpu": [], "npu": []}
    ids: dict[str, list[Any]] = {"cpu": [], "npu": []}
    for device in taken:
        draw = np.random.default_rng(6)
        load = LoadRecorder(
            layers, experts, 2 * slots, device, phases=("prefill", "decode"), num_entries=3, steps_per_entry=2
        )
        maps = DispatchMaps(placements[0], device, 2 * slots)
        unpadded = torch.zeros(2, dtype=torch.int32, device=device)
        for step in range(24):
            placement = placements[step // 5 % 3]
            if step % 5 == 0:
                load.flush(placements[(step // 5 - 1) % 3]) if step else None
                maps.prepare(placement, list(range(layers)))
                maps.commit()
            load.begin_step(placement, record=step % 7 != 3, phase="prefill" if step % 3 == 0 else "decode")
            unpadded.copy_(torch.tensor([step % 4, tokens - step % 5]))
            for layer in range(layers):
                topk = torch.from_numpy(draw.zipf(1.5, (tokens, 2)) % experts).to(torch.int32).to(device)
                ids[device].append(
                    ops.map_and_record(
                        topk,
                        maps.logical_to_physical[layer],
                        maps.replica_count[layer],
                        load.counts[layer],
                        load.recording,
                        unpadded,
                    ).cpu()
                )
            if step % 8 == 7:
                load.snapshot(placement)
                while not load.snapshot_ready():
                    pass
                taken[device].append(load.take())
    for number, (a, b) in enumerate(zip(ids["cpu"], ids["npu"], strict=True)):
        if not torch.equal(a, b):
            return f"mapped ids differ in call {number}"
    for number, (a, b) in enumerate(zip(taken["cpu"], taken["npu"], strict=True)):
        if not np.array_equal(a, b) or not a.any():
            return f"window {number} differs or is empty"
    return ""


def cycles(transport: str, options: dict[str, Any], count: int, trouble: dict[str, Any]) -> dict[str, Any]:
    """Whole cycles with random placements; every commit is compared bit for bit."""
    ranks = _start()
    group = dist.new_group(backend="hccl") if transport == "hccl" else None
    values = {"seed": 3, "lag": 1, "buffers": 2, **options}
    driver = Driver(
        ranks, (4, 10, 16 // SIZE), Trouble(**trouble), device="npu", transport=transport, device_group=group, **values
    )
    assert driver.loader.transport == transport, driver.loader.transport
    outcome = driver.run(count)
    torch.npu.synchronize()
    dist.barrier(ranks.control)
    return asdict(outcome)


def first_commit_without_weights() -> str:
    """The first slot that is wrong after a commit that switches the maps and leaves the weights; empty if none is."""
    ranks = _start()
    trouble = Trouble(leave_slots=True)
    group = dist.new_group(backend="hccl")
    driver = Driver(ranks, (4, 10, 16 // SIZE), trouble, 3, 1, 2, device="npu", transport="hccl", device_group=group)
    while not driver.outcome.commits:
        driver.step()
    torch.npu.synchronize()
    dist.barrier(ranks.control)
    return driver.outcome.wrong


def captured_graph(count: int) -> dict[str, Any]:
    """A captured graph reads the right weights after every commit."""
    ranks = _start()
    trouble = Trouble(step_delay=0.002, message_delay=0.004, planner_steps=4)
    driver = Driver(
        ranks,
        (4, 10, 16 // SIZE),
        trouble,
        3,
        1,
        2,
        device="npu",
        transport="hccl",
        device_group=dist.new_group(backend="hccl"),
    )
    sums = [torch.zeros(driver.slots.size, device="npu") for _ in driver.slots.stacked]
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        for out, layer in zip(sums, driver.slots.stacked, strict=True):
            out.copy_(layer[0].flatten(1).double().sum(1))
    wrong = ""
    while driver.outcome.cycles < count and not wrong:
        driver.step()
        graph.replay()
        for layer, out in enumerate(sums):
            held = driver.placement.physical_to_logical[
                layer, RANK * driver.slots.size : (RANK + 1) * driver.slots.size
            ]
            want = torch.tensor([expert_tensors(layer, int(expert))[0].double().sum() for expert in held]).float()
            if not torch.allclose(out.cpu(), want, rtol=1e-4, atol=1e-3):
                wrong = f"step {driver.state.step}, layer {layer}"
    torch.npu.synchronize()
    dist.barrier(ranks.control)
    return {"commits": driver.outcome.commits, "wrong": wrong}


class ToyModel:
    """MoE layers whose experts scale their input: out[n] = sum of x[n] * weight[expert] over the token's 2 experts.

    A sum of two summands and zeros has the same bits in any order, so the result must equal the reference exactly. All
    ranks have the same tokens; every rank computes the pairs of its own slots, and the results are summed over ranks.
    """

    LAYERS, EXPERTS, HIDDEN, TOKENS = 3, 12, 64, 48

    def __init__(self, device: str, spare: int, capture: bool) -> None:
        self.device = device
        self.placement = Placement.initial(self.LAYERS, self.EXPERTS, SIZE, spare)
        generator = torch.Generator().manual_seed(1)
        self.logical = torch.randn(self.LAYERS, self.EXPERTS, self.HIDDEN, generator=generator)
        size = self.placement.slots_per_rank
        mine = torch.from_numpy(self.placement.physical_to_logical[:, RANK * size : (RANK + 1) * size].copy()).long()
        self.weights = torch.stack([self.logical[i][mine[i]] for i in range(self.LAYERS)]).to(device)
        self.recorder = LoadRecorder(self.LAYERS, self.EXPERTS, self.placement.num_slots, device, contributes=RANK == 0)
        self.maps = DispatchMaps(self.placement, device, SIZE + spare)
        self.x = torch.zeros(self.TOKENS, self.HIDDEN, device=device)
        self.ids = torch.zeros(self.LAYERS, self.TOKENS, 2, dtype=torch.int64, device=device)
        self.out = torch.zeros(self.LAYERS, self.TOKENS, self.HIDDEN, device=device)
        self.graph: Any = None
        if capture:
            self._forward()
            torch.npu.synchronize()
            self.graph = torch.npu.NPUGraph()
            with torch.npu.graph(self.graph):
                self._forward()

    def _forward(self) -> None:
        size = self.placement.slots_per_rank
        for layer in range(self.LAYERS):
            slots = ops.map_and_record(
                self.ids[layer],
                self.maps.logical_to_physical[layer],
                self.maps.replica_count[layer],
                self.recorder.counts[layer],
                self.recorder.recording,
            )
            local = slots - RANK * size
            mine = (local >= 0) & (local < size)
            rows = self.weights[layer][local.clamp(0, size - 1)] * mine.unsqueeze(-1)
            result = (self.x.unsqueeze(1) * rows).sum(1)
            dist.all_reduce(result)
            self.out[layer].copy_(result)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.ids.copy_(ids)
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()
        return self.out.cpu()

    def reference(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x.unsqueeze(1) * self.logical[i][ids[i]]).sum(1) for i in range(self.LAYERS)])


class ToyAdaptor(EngineAdaptor):
    def __init__(self, model: ToyModel, ranks: Ranks) -> None:
        self.name, self.rank, self.topology, self.num_groups = "toy", RANK, Topology.even(SIZE), 1
        self.model, self.placement, self.recorder = model, model.placement, model.recorder
        self.switched = [model.maps]
        self.control_group, self.transfer_group = ranks.control, ranks.transfer
        self.device_group = dist.new_group(backend="hccl") if model.device == "npu" else None
        self.device = torch.device(model.device)

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [[[slot] for slot in layer] for layer in self.model.weights]


def updator(device: str, capture: bool, count: int, freeze_weights: bool) -> dict[str, Any]:
    """Run EplbUpdator with its planner process under a skewed, changing load, and compare every output.

    Args:
        capture: the forward is a captured graph that includes the collectives.
        freeze_weights: the negative control: maps switch, weights stay.
    """
    ranks = _start(device)
    model = ToyModel(device, spare=SIZE, capture=capture)
    config = EplbConfig.from_additional_config(
        {
            "eplb_config": {
                "dynamic_eplb": True,
                "num_redundant_experts": SIZE,
                "expert_heat_collection_interval": 12,
                "algorithm_execution_interval": 2,
                "transport": "auto" if device == "cpu" else "hccl",
            }
        }
    )
    balancer = build_updator(ToyAdaptor(model, ranks), config, EplbProcess() if RANK == 0 else None)
    if freeze_weights:
        commit, kept = balancer.parts.loader.commit, model.weights.clone()

        def commit_nothing(number: int) -> None:
            commit(number)
            model.weights.copy_(kept)

        balancer.parts.loader.commit = commit_nothing
    draw = np.random.default_rng(2)
    wrong, seen = 0, {balancer.placement.digest}
    step = 0
    while len(seen) <= count and step < 3000:
        # A few experts are hot; every 60 steps different ones.
        heat = np.random.default_rng(step // 60).dirichlet(np.full(model.EXPERTS, 0.3))
        ids = np.stack(
            [
                [draw.choice(model.EXPERTS, 2, replace=False, p=_positive(heat)) for _ in range(model.TOKENS)]
                for _ in range(model.LAYERS)
            ]
        )
        x = torch.from_numpy(draw.standard_normal((model.TOKENS, model.HIDDEN)).astype(np.float32))
        with torch.no_grad():
            balancer.forward_before()
            out = model.forward(x, torch.from_numpy(ids))
            balancer.forward_end()
        wrong += not torch.equal(out, model.reference(x, torch.from_numpy(ids)))
        seen.add(balancer.placement.digest)
        step += 1
    if device == "npu":
        torch.npu.synchronize()
    stats = balancer.stats.stats()
    balancer.close()
    dist.barrier(ranks.control)
    return {
        "wrong": wrong,
        "placements": len(seen),
        "steps": step,
        "digest": balancer.placement.digest,
        "phase": balancer.state.phase.name,
        "stats": str(stats)[:1500],
    }


def _positive(heat: np.ndarray) -> np.ndarray:
    heat = heat + 1e-3
    return heat / heat.sum()


def negative_control_of_slots() -> str:
    """Slots.wrong must find a wrong slot on an NPU, too."""
    placement = Placement.initial(2, 4, 1)
    slots = Slots(placement, 0, "npu")
    slots.stacked[1][1][2].add_(1)
    return slots.wrong(placement)


def bystander(transport: str) -> dict[str, Any]:
    """Rounds that concern only the first two ranks: a swap of two experts, twice. The other ranks send and receive
    nothing, but prepare, issue and commit."""
    ranks = _start()
    placement = Placement.initial(2, 6, SIZE)
    slots = Slots(placement, RANK, "npu")
    loader = D2DExpertWeightLoader(
        slots.views(),
        ranks.transfer,
        RANK,
        2,
        transport,
        topology=Topology.even(SIZE),
        device_group=dist.new_group(backend="hccl") if transport == "hccl" else None,
    )
    loader.warm_up()
    loader.learn_checksums(placement)
    wrong = ""
    for number in range(2):
        size = placement.slots_per_rank
        held = placement.physical_to_logical[0]
        swap = np.array([[0, 0, held[size], 0, size], [0, size, held[0], 0, 0]], dtype=np.int32)
        swapping = Round(number, swap, size, after=number - 1)
        loader.prepare(swapping)
        while not loader.ready(number):
            time.sleep(0.001)
        loader.issue(number)
        until = time.monotonic() + 60
        while loader.rounds_intact <= number and not loader.poisoned and time.monotonic() < until:
            time.sleep(0.001)
        if loader.rounds_intact <= number:
            return {"wrong": f"round {number} never arrived", "poisoned": loader.poisoned}
        loader.commit(number)
        placement = placement.with_moves(swap)
        torch.npu.synchronize()
        wrong = wrong or slots.wrong(placement)
    dist.barrier(ranks.control)
    poisoned = loader.poisoned
    loader.close()
    return {"wrong": wrong, "poisoned": poisoned, "received": loader.bytes_received}
