# SPDX-License-Identifier: Apache-2.0
"""CostModel: the time of MoE layers and transfers, for a model on a machine.

The time of one MoE layer in one step is that of its slowest rank. It follows the (token, expert) pairs of each slot,
not their sum: a slot without a pair is not read, and kernels compute in tiles of rows. Reading the weights of a rank's
slots and computing their tiles overlap in part: the two times are added as a norm between their sum and a roofline
(Williams et al., 2009). On top come the dispatch and combine of the pairs over the kinds of link that they take. Rates
are nominal figures times what such transfers and kernels reach of them; give measured ones where you have them. The
model is meant for comparing settings, not for promising latency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..values.placement import FloatArray

LINK_EFFICIENCY = 0.6
"""Part of a link's nominal rate that copies of experts reach: 268 of 450 GB/s with batched sends on two H200s."""


TILE = 128
"""Rows that kernels compute at once."""


COMPUTE_EFFICIENCY = 0.62
"""Part of the nominal matrix throughput that grouped matrix products reach on whole tiles; fitted on one H200, as the
next three."""


MEMORY_EFFICIENCY = 0.74
"""Part of the nominal memory bandwidth that reading weights reaches."""


OVERLAP = 2.1
"""Exponent of the norm that adds reading and computing: 1 is one after the other, infinity a roofline."""


KERNEL_SECONDS = 50e-6
"""What a layer takes beside reading and computing. With these four the expected pairs of each slot met 1,485 cases of
``benchmarks/virtual_ep`` (DeepSeek-V3 at EP32 to EP320, Qwen3-235B at EP32, 1 to 4,096 tokens per rank, bf16) with a
median error of 5.5 %, nine in ten within 14 %, the worst by 49 %. On other machines they are an assumption."""


@dataclass(frozen=True)
class Machine:
    """A kind of device with its links; a rank is one device as the serving engine counts devices.

    Attributes:
        name: name on the command line.
        title: description.
        ranks_per_node: ranks that share the fast link.
        link: nominal bytes/s that a rank receives from ranks of its node.
        link_between: nominal bytes/s that a rank receives from other nodes.
        flops: nominal dense BF16 operations/s of a rank.
        memory: nominal bytes/s of a rank's memory.
        source: source of the figures.
    """

    name: str
    title: str
    ranks_per_node: int
    link: float
    link_between: float
    flops: float
    memory: float
    source: str


MACHINES: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            "a2",
            "Atlas 800T/800I A2, 8 Ascend 910B",
            8,
            196e9,
            25e9,
            313e12,
            1.6e12,
            "figures commonly given for the Ascend 910B3: HCCS full mesh, 392 GB/s both ways; 200 Gbit/s RoCE; 64 GB "
            "at 1.6 TB/s; not checked on a machine",
        ),
        Machine(
            "a3",
            "Atlas 800T/800I A3, 16 dies of Ascend 910C, nodes joined by RoCE",
            16,
            196e9,
            25e9,
            376e12,
            1.6e12,
            "per die, half of an Ascend 910C in 'Serving Large Language Models on Huawei CloudMatrix384' "
            "(arXiv 2506.12708): 752 TFLOPS BF16, 3.2 TB/s, 392 GB/s UB and 400 Gbit/s RDMA one way",
        ),
        Machine(
            "cloudmatrix384",
            "CloudMatrix384, 768 dies of Ascend 910C on one UB network",
            16,
            196e9,
            190e9,
            376e12,
            1.6e12,
            "arXiv 2506.12708: as a3, but nodes are joined by the UB plane, 392 GB/s one way per 910C, with less than "
            "3 % lost between nodes",
        ),
        Machine(
            "h200",
            "8 NVIDIA H200 with NVLink 4, nodes joined by 400 Gbit/s InfiniBand",
            8,
            450e9,
            50e9,
            989e12,
            4.8e12,
            "NVIDIA H200 data sheet: 900 GB/s NVLink both ways, 4.8 TB/s, 989 TFLOPS BF16 dense; one 400 Gbit/s "
            "adapter per GPU (DGX H200)",
        ),
    )
}


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a model's MoE layers.

    Attributes:
        name: of the model.
        num_layers: MoE layers, L.
        num_experts: logical experts per layer, E.
        top_k: experts per token.
        hidden: hidden size.
        width: intermediate size of one expert (gate, up and down matrices of hidden x width).
        source: where the figures come from.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    width: int
    source: str = "the model's config.json"

    def expert_bytes(self, bytes_per_weight: float) -> float:
        """Bytes of one expert in one layer."""
        return 3.0 * self.hidden * self.width * bytes_per_weight


MODELS: tuple[MoeShape, ...] = (
    MoeShape("DeepSeek-V3", 58, 256, 8, 7168, 2048),
    MoeShape("Kimi-K2", 60, 384, 8, 7168, 2048),
    MoeShape("Qwen3-235B-A22B", 94, 128, 8, 4096, 1536),
    MoeShape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768),
    MoeShape("tiny-moe", 6, 64, 4, 128, 32, "examples/tiny_moe/config.json"),
)


def model_of_shape(num_layers: int, num_experts: int) -> MoeShape | None:
    """The known model with this many MoE layers and experts."""
    return next((m for m in MODELS if (m.num_layers, m.num_experts) == (num_layers, num_experts)), None)


@dataclass(frozen=True)
class CostModel:
    """Seconds of steps and transfers.

    Attributes:
        machine, shape: the device, and the model's MoE layers.
        num_ranks: R. num_nodes: nodes that share the ranks evenly.
        batch: tokens that each rank brings into a step.
        bytes_per_weight: 1 for int8 and fp8, 2 for bf16.
    """

    machine: Machine
    shape: MoeShape
    num_ranks: int
    num_nodes: int
    batch: float
    bytes_per_weight: float

    @property
    def expert_bytes(self) -> float:
        return self.shape.expert_bytes(self.bytes_per_weight)

    @property
    def pairs_per_rank(self) -> float:
        """(token, expert) pairs of an average rank in one layer of one step."""
        return self.batch * self.shape.top_k

    def layer_seconds(self, slot_load: npt.ArrayLike) -> FloatArray:
        """Seconds of MoE layers in one step, [L].

        Args:
            slot_load: [L, P], how a window's tokens fell on the slots; a step's pairs are spread alike, and evenly in a
                layer without load.
        """
        load = np.asarray(slot_load, dtype=np.float64)
        total = load.sum(axis=1, keepdims=True)
        share = np.divide(load, total, out=np.full(load.shape, 1.0 / load.shape[1]), where=total > 0)
        pairs = (share * self.pairs_per_rank * self.num_ranks).reshape(len(load), self.num_ranks, -1)
        machine, shape = self.machine, self.shape
        busy = -np.expm1(-pairs)  # chance that a slot gets any
        tiles = np.maximum(busy, pairs / TILE + 0.5 * busy)  # the last one is half full on average
        # The slowest rank of a step reads more slots than on average: the largest of R normals is sqrt(2 ln R) off.
        spread = np.sqrt(2.0 * math.log(self.num_ranks) * (busy * (1.0 - busy)).sum(axis=2))
        read = np.minimum(pairs.shape[2], busy.sum(axis=2) + spread)
        reading = read * self.expert_bytes / (machine.memory * MEMORY_EFFICIENCY)
        flops = machine.flops * 2.0 / self.bytes_per_weight  # int8 and fp8 at twice the rate of bf16
        computing = (
            np.maximum(read, tiles.sum(axis=2))
            * TILE
            * (6.0 * shape.hidden * shape.width)
            / (flops * COMPUTE_EFFICIENCY)
        )
        both = (reading**OVERLAP + computing**OVERLAP) ** (1.0 / OVERLAP)
        wire = pairs.sum(axis=2) * self.seconds_per_pair_sent
        return np.asarray((KERNEL_SECONDS + both + wire).max(axis=1))

    @property
    def seconds_per_pair_sent(self) -> float:
        """Seconds of dispatch and combine of one pair: the hidden state there and back in bf16, evenly over ranks."""
        far = 1.0 - 1.0 / self.num_nodes
        machine = self.machine
        return (4.0 * self.shape.hidden / LINK_EFFICIENCY) * (far / machine.link_between + (1.0 - far) / machine.link)

    def receive_seconds(self, near: npt.ArrayLike, far: npt.ArrayLike) -> float:
        """Seconds until the last rank has received its experts.

        Args:
            near: [R] experts that each rank receives from its own node, far: [R] from other nodes.
        """
        machine = self.machine
        seconds = np.asarray(near) / machine.link + np.asarray(far) / machine.link_between
        return float(seconds.max(initial=0.0) * self.expert_bytes / LINK_EFFICIENCY)

    def commit_seconds(self, received: npt.ArrayLike) -> float:
        """Seconds that the busiest rank takes to copy received experts [R] from staging into slots (read, write)."""
        rate = self.machine.memory * MEMORY_EFFICIENCY
        return float(np.asarray(received).max(initial=0) * 2.0 * self.expert_bytes / rate)
