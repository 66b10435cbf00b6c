# SPDX-License-Identifier: Apache-2.0
"""The cycles of test_transfer.py with weights on GPUs, over every transport. Two ranks share a GPU if there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vllm_ascend_eplb.agreement.phases import Phase
from vllm_ascend_eplb.load.ops import map_and_record
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.routing.maps import DispatchMaps

from .model import Driver, Outcome, Trouble, expert_tensors
from .ranks import Ranks, run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_driver(ranks: Ranks, transport: str, options: dict[str, Any]) -> Driver:
    device = f"cuda:{ranks.rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    group = None
    if transport == "nccl":
        from vllm_ascend_eplb.transfer.collective import bounded_nccl_options

        group = dist.new_group(backend="nccl", pg_options=bounded_nccl_options())
    trouble = Trouble(step_delay=0.002, message_delay=0.004, planner_steps=4, damage=0.02)
    values = {"seed": 3, "lag": 1, "buffers": 2, **options}
    return Driver(ranks, (4, 10, 8), trouble, device=device, transport=transport, device_group=group, **values)


def drive(ranks: Ranks, transport: str, options: dict[str, Any]) -> tuple[str, Outcome]:
    driver = make_driver(ranks, transport, options)
    return driver.loader.transport, driver.run(4)


@pytest.mark.parametrize(
    ("transport", "options"),
    [
        ("auto", {}),
        ("auto", {"own_streams": False}),
        ("gloo", {"own_streams": False}),
        ("pull", {"budget_bytes": 8192}),
        ("gloo", {}),
        ("gloo", {"budget_bytes": 8192, "buffers": 1}),
        ("nccl", {}),
        ("nccl", {"budget_bytes": 8192, "lag": 2}),
    ],
)
def test_commits_bring_the_right_weights_on_gpus(transport: str, options: dict[str, Any]) -> None:
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU per rank")
    results = run_ranks(2, drive, transport, options)
    outcomes = [outcome for _, outcome in results]
    if transport != "auto":
        assert results[0][0] == transport
    for outcome in outcomes:
        assert outcome.wrong == ""
        assert outcome.history == outcomes[0].history
    assert outcomes[0].commits >= 10


def drive_graph(ranks: Ranks) -> tuple[int, str]:
    driver = make_driver(ranks, "auto", {})
    sums = [torch.zeros(driver.slots.size, device="cuda") for _ in driver.slots.stacked]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out, layer in zip(sums, driver.slots.stacked, strict=True):
            out.copy_(layer[0].flatten(1).double().sum(1))
    while driver.outcome.cycles < 3 and driver.state.phase is not Phase.OFF:
        driver.step()
        graph.replay()
        for layer, out in enumerate(sums):
            first = ranks.rank * driver.slots.size
            held = driver.placement.physical_to_logical[layer, first : first + driver.slots.size]
            want = torch.tensor([expert_tensors(layer, int(expert))[0].double().sum() for expert in held]).float()
            if not torch.allclose(out.cpu(), want, rtol=1e-4, atol=1e-3):
                return driver.outcome.commits, f"step {driver.state.step}, layer {layer}"
    off = driver.state.phase is Phase.OFF
    return driver.outcome.commits, f"off after step {driver.state.step}: {driver.state.failure.name}" if off else ""


def test_captured_graph_sees_every_commit() -> None:
    for commits, wrong in run_ranks(2, drive_graph):
        assert wrong == ""
        assert commits >= 5


class MoELayers:
    """Layers whose experts are the first tensors of a driver's slots. One captured graph maps routed ids by the op and
    computes this rank's part of every layer's answer."""

    TOKENS, TOP_K, WIDTH = 64, 3, 512

    def __init__(self, driver: Driver) -> None:
        self.driver, placement = driver, driver.placement
        self.first = driver.ranks.rank * driver.slots.size
        self.maps = DispatchMaps(placement, "cuda", placement.num_slots)
        self.recorder = LoadRecorder(placement.num_layers, placement.num_experts, placement.num_slots, "cuda")
        self.recorder.begin_step(placement, record=True)
        self.x = torch.zeros((self.TOKENS, self.WIDTH), device="cuda")
        self.ids = torch.zeros((placement.num_layers, self.TOKENS, self.TOP_K), dtype=torch.int32, device="cuda")
        self.forward()  # warm-up
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.parts = self.forward()

    def forward(self) -> list[torch.Tensor]:
        """Per layer [N, K, A]: the answers of this rank's slots, and zero for choices that other ranks compute."""
        parts = []
        for layer, (weights, *_) in enumerate(self.driver.slots.stacked):
            slots = map_and_record(
                self.ids[layer],
                self.maps.logical_to_physical[layer],
                self.maps.replica_count[layer],
                self.recorder.counts[layer],
                self.recorder.recording,
            )
            local = slots.long() - self.first
            mine = (local >= 0) & (local < len(weights))
            answers = torch.einsum("nkah,nh->nka", weights[local.clamp(0, len(weights) - 1)], self.x)
            parts.append(answers * mine[..., None])
        return parts

    def commit(self) -> None:
        """Switch the maps to the weights that were just committed."""
        self.maps.prepare(self.driver.placement, list(range(self.driver.placement.num_layers)))
        self.maps.commit()

    def wrong(self, step: int) -> str:
        """Replay the graph for other tokens. Returns the first layer whose answer, summed over the ranks, is not that
        of the routed experts, or whose tokens were not counted once; empty if there is none."""
        generator = torch.Generator().manual_seed(step)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.ids.copy_(torch.randint(self.driver.placement.num_experts, self.ids.shape, generator=generator))
        self.recorder.counts.zero_()
        self.graph.replay()
        for layer, part in enumerate(self.parts):
            total = part.cpu()
            dist.all_reduce(total, group=self.driver.ranks.control)
            ids = self.ids[layer].cpu().long()
            experts = torch.stack([expert_tensors(layer, expert)[0] for expert in range(int(ids.max()) + 1)])
            wanted = torch.einsum("nkah,nh->nka", experts[ids], self.x.cpu())
            if not torch.allclose(total, wanted, rtol=1e-4, atol=1e-3):
                return f"step {step}, layer {layer}: another answer"
            if int(self.recorder.counts[layer].sum()) != ids.numel():
                return f"step {step}, layer {layer}: another count"
        return ""


def drive_layers(ranks: Ranks, maps_follow: bool) -> tuple[int, str]:
    driver = make_driver(ranks, "auto", {})
    layers, wrong, commits = MoELayers(driver), "", 0
    while driver.outcome.cycles < 3 and driver.state.phase is not Phase.OFF and not wrong:
        driver.step()
        if driver.outcome.commits > commits and maps_follow:
            layers.commit()
        commits = driver.outcome.commits
        wrong = layers.wrong(driver.state.step)
    return commits, wrong or ("off" if driver.state.phase is Phase.OFF else "")


def test_captured_graph_of_layers_is_right_across_commits() -> None:
    for commits, wrong in run_ranks(2, drive_layers, True):
        assert wrong == ""
        assert commits >= 5


def test_captured_graph_with_old_maps_is_found() -> None:
    """Negative control: the comparison above can fail."""
    assert all("another answer" in wrong for _, wrong in run_ranks(2, drive_layers, False))


def refuse(ranks: Ranks) -> list[str]:
    from vllm_ascend_eplb.transfer.collective import CollectiveTransport, bounded_nccl_options
    from vllm_ascend_eplb.transfer.loader import TransferError
    from vllm_ascend_eplb.transfer.transport import Streams

    device = torch.device("cuda", ranks.rank)
    torch.cuda.set_device(device)
    said = []
    unbounded = dist.new_group(backend="nccl")
    bounded = dist.new_group(backend="nccl", pg_options=bounded_nccl_options())
    for group, cooperative in ((unbounded, False), (bounded, True), (None, False)):
        try:
            CollectiveTransport(group, Streams(device), cooperative_kernels=cooperative)
            said.append("")
        except TransferError as error:
            said.append(str(error))
    CollectiveTransport(bounded, Streams(device))
    return said


def test_nccl_is_refused_where_it_could_deadlock() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU per rank")
    unbounded, cooperative, none = run_ranks(2, refuse)[0]
    assert "NCCL_MAX_CTAS" in unbounded
    assert "DeepEP" in cooperative
    assert "process group of its own" in none


def memory_while_serving(ranks: Ranks, transport: str) -> tuple[list[int], list[int], int]:
    """Bytes that torch reserved on the device and free bytes, after start-up and after every cycle; and the commits."""
    driver = make_driver(ranks, transport, {})
    held, free = [], []
    for cycles in range(6):
        driver.run(cycles)
        torch.cuda.synchronize()
        dist.barrier()
        held.append(torch.cuda.memory_reserved())
        free.append(torch.cuda.mem_get_info()[0])
        dist.barrier()
    return held, free, driver.outcome.commits


@pytest.mark.parametrize("transport", ["auto", "gloo", "nccl"])
def test_serving_takes_no_more_device_memory_than_start_up(transport: str) -> None:
    """An engine sizes its KV cache after start-up, so balancing must allocate all its memory before."""
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU per rank")
    for held, free, commits in run_ranks(2, memory_while_serving, transport):
        assert commits >= 10
        assert max(held) == held[0]
        assert min(free) >= free[0] - (2 << 20)  # one page of the driver
