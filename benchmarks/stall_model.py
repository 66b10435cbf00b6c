# SPDX-License-Identifier: Apache-2.0
"""The model of benchmarks/stall.py: MoE layers on one rank, as the balancer sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.adaptors.engine_adaptor import EngineAdaptor
from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadRecorder
from vllm_ascend_eplb.routing.maps import DispatchMaps
from vllm_ascend_eplb.values.topology import Topology


@dataclass(frozen=True)
class Size:
    """The model and the loop.

    Attributes:
        layers: MoE layers.
        experts, slots: logical experts of a layer, and slots of a rank.
        hidden, inner: widths of an expert.
        tokens, top_k: tokens of a rank per step, and experts per token.
        segment, segments: steps of one segment, and segments of each kind.
    """

    layers: int
    experts: int
    slots: int
    hidden: int
    inner: int
    tokens: int
    top_k: int
    segment: int
    segments: int

    def expert_bytes(self, dtype: torch.dtype) -> int:
        return 3 * self.hidden * self.inner * dtype.itemsize + 4 * 2 * self.inner


def sizes(device: str, ranks: int, quick: bool) -> Size:
    """A step of about 20 ms; experts of 44 MB on a GPU."""
    slots = 16
    experts = ranks * (slots - 2)
    if device == "cuda":
        return Size(30, experts, slots, 7168, 1024, 64, 8, *((60, 3) if quick else (100, 5)))
    return Size(4, experts, slots, 128, 64, 32, 4, *((40, 3) if quick else (150, 7)))


class Model(EngineAdaptor):
    """MoE layers on one rank. The weights of an expert are made from its id."""

    def __init__(self, size: Size, rank: int, num_ranks: int, device: torch.device, groups: dict[str, Any]) -> None:
        self.name, self.rank, self.device, self.size = "stall", rank, device, size
        self.topology, self.num_groups = Topology.even(num_ranks), 1
        self.control_group, self.transfer_group = groups["control"], groups["transfer"]
        self.device_group, self._compute_group = groups["device"], groups["compute"]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        redundant = num_ranks * size.slots - size.experts
        self.placement = spread(Placement.initial(size.layers, size.experts, num_ranks, redundant))
        shape = (size.slots, size.hidden, 2 * size.inner)
        self.w13 = [torch.empty(shape, dtype=self.dtype, device=device) for _ in range(size.layers)]
        self.w2 = [
            torch.empty((size.slots, size.inner, size.hidden), dtype=self.dtype, device=device)
            for _ in range(size.layers)
        ]
        self.scale = [torch.empty((size.slots, 2 * size.inner), device=device) for _ in range(size.layers)]
        self.maps = DispatchMaps(self.placement, device, num_ranks)
        self.switched = [self.maps]
        self.fill()
        self.recorder = LoadRecorder(size.layers, size.experts, num_ranks * size.slots, device)
        rng = np.random.default_rng(rank)
        ids = np.argsort(rng.random((size.layers, size.tokens, size.experts)), axis=-1)[..., : size.top_k]
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.start = torch.randn((size.tokens, size.hidden), generator=torch.Generator().manual_seed(rank)).to(
            device, self.dtype
        )
        self.result = torch.zeros_like(self.start)
        self._ones = torch.ones_like(self.recorder.recording)

    def fill(self) -> None:
        """Weights and maps of the first placement."""
        for layer in range(self.size.layers):
            for slot in range(self.size.slots):
                pairs = zip(self._tensors(layer, slot), self.expert(layer, self._held(layer, slot)), strict=True)
                for target, value in pairs:
                    target.copy_(value)
        self.maps.prepare(self.placement, list(range(self.size.layers)))
        self.maps.commit()

    def _held(self, layer: int, slot: int) -> int:
        return int(self.placement.physical_to_logical[layer, self.rank * self.size.slots + slot])

    def _tensors(self, layer: int, slot: int) -> list[torch.Tensor]:
        return [self.w13[layer][slot], self.w2[layer][slot], self.scale[layer][slot]]

    def expert(self, layer: int, expert: int) -> list[torch.Tensor]:
        """The weights of a logical expert; the same on every rank."""
        size = self.size
        generator = torch.Generator(self.device).manual_seed(100_003 * layer + expert)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        return [
            draw(size.hidden, 2 * size.inner) * size.hidden**-0.5,
            draw(size.inner, size.hidden) * size.inner**-0.5,
            draw(2 * size.inner).float(),
        ]

    # what the balancer needs

    def expert_tensors(self) -> list[list[list[torch.Tensor]]]:
        return [[self._tensors(layer, slot) for slot in range(self.size.slots)] for layer in range(self.size.layers)]

    # the forward

    def forward(self, mapped: bool) -> None:
        """One step. Without mapping, expert e is computed in slot e of the unreplicated layout, wherever it lies: the
        same work without redundancy."""
        x = self.start
        for layer in range(self.size.layers):
            ids = self.ids[layer]
            if mapped:
                slots = ops.map_and_record(
                    ids,
                    self.maps.logical_to_physical[layer],
                    self.maps.replica_count[layer],
                    self.recorder.counts[layer],
                    self.recorder.recording,
                )
                per_rank = self.size.slots
            else:
                slots, per_rank = ids, self.size.experts // self.topology.num_ranks
            x = x + self._experts(layer, x, slots, per_rank)
            x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        self.result.copy_(x)

    def _experts(self, layer: int, x: torch.Tensor, slots: torch.Tensor, per_rank: int) -> torch.Tensor:
        ranks, (tokens, top_k) = self.topology.num_ranks, slots.shape
        capacity = tokens * top_k  # whatever the routing, it fits: shapes must not depend on data in a graph
        flat = slots.reshape(-1).long()
        to = flat // per_rank
        nth = (torch.nn.functional.one_hot(to, ranks).cumsum(0) - 1).gather(1, to[:, None])[:, 0]
        place = to * capacity + nth
        sent = x.new_zeros((ranks * capacity, x.shape[1])).index_copy_(0, place, x.repeat_interleave(top_k, 0))
        sent_slot = torch.full((ranks * capacity,), per_rank, dtype=torch.int32, device=x.device)
        sent_slot.index_copy_(0, place, (flat % per_rank).int())
        got, got_slot = self._all_to_all(sent), self._all_to_all(sent_slot)
        order = got_slot.argsort(stable=True)
        y = self._grouped(layer, got[order], got_slot[order])
        back = self._all_to_all(torch.empty_like(y).index_copy_(0, order, y))
        return back[place].view(tokens, top_k, -1).mean(1)

    def _all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor, group=self._compute_group)
        return out

    def _grouped(self, layer: int, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Each row through the expert in its slot; rows beyond the last slot are padding."""
        count, inner = self.size.slots, self.size.inner
        ends = torch.searchsorted(slots, torch.arange(count, dtype=torch.int32, device=x.device), right=True).int()
        real = (slots < count)[:, None]
        scale = self.scale[layer][slots.clamp(max=count - 1).long()].to(x.dtype)
        if x.device.type == "cuda":
            h = torch._grouped_mm(x, self.w13[layer], offs=ends) * (1 + 1e-3 * scale)
            h = torch.where(real, torch.nn.functional.silu(h[:, :inner]) * h[:, inner:], 0)
            return torch.where(real, torch._grouped_mm(h, self.w2[layer], offs=ends), 0)
        y, first = torch.zeros_like(x), 0
        for slot, end in enumerate(ends.tolist()):
            if end > first:
                h = x[first:end] @ self.w13[layer][slot] * (1 + 1e-3 * scale[first:end])
                y[first:end] = torch.nn.functional.silu(h[:, :inner]) * h[:, inner:] @ self.w2[layer][slot]
            first = end
        return y

    # checks

    def wrong_slots(self, placement: Placement) -> int:
        """Slots of this rank that do not hold bit for bit what ``placement`` says."""
        wrong, first = 0, self.rank * self.size.slots
        for layer in range(self.size.layers):
            for slot in range(self.size.slots):
                expert = int(placement.physical_to_logical[layer, first + slot])
                pairs = zip(self._tensors(layer, slot), self.expert(layer, expert), strict=True)
                wrong += not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        return wrong


def spread(placement: Placement) -> Placement:
    """The same experts laid out so that redundant copies are on another rank than the originals."""
    slots, ranks, size = placement.physical_to_logical, placement.num_ranks, placement.slots_per_rank
    out = np.empty_like(slots)
    own = placement.num_experts // ranks
    for layer, row in enumerate(slots):
        extra = np.roll(np.sort(row[placement.num_experts :]), layer)
        for rank in range(ranks):
            out[layer, rank * size : rank * size + own] = np.arange(rank * own, (rank + 1) * own)
            spare = size - own
            out[layer, rank * size + own : (rank + 1) * size] = extra[rank * spare : (rank + 1) * spare]
    return Placement(out, placement.num_experts, ranks)
