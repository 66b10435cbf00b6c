# SPDX-License-Identifier: Apache-2.0
"""The candidates of benchmarks/record_op.py, their inputs, and the expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_ascend_eplb.load import ops

TOP_K, NUM_EXPERTS, NUM_SLOTS, WIDTH = 8, 256, 288, 16


INPUT_SETS = 8
"""Batches that calls take in turn, so that no predictor learns one of them by heart."""


Call = Callable[[int], torch.Tensor | None]
"""Runs a candidate on one of the input sets; returns the physical ids where it makes them."""


@dataclass
class Inputs:
    """A layer's tables and the batches that are routed through it."""

    ids: list[torch.Tensor]
    table: torch.Tensor
    replicas: torch.Tensor
    counts: torch.Tensor
    record: torch.Tensor
    num_unpadded: torch.Tensor


def make_inputs(num_tokens: int, device: str, dtype: torch.dtype, table: str, skew: float, seed: int) -> Inputs:
    """Fresh inputs. ``table``: "replicas" (1 to 3 entries per expert, then -1), "uneven" (1 to 11: counts without a
    small common multiple) or "weighted" (all used); ``skew``: exponent of the experts' popularity, 0 for even."""
    rng = np.random.default_rng(seed)
    popularity = np.log(np.arange(1, NUM_EXPERTS + 1.0) ** -skew)
    noise = rng.gumbel(size=(INPUT_SETS, num_tokens, NUM_EXPERTS))
    ids = np.argpartition(-(noise + popularity), TOP_K, axis=-1)[..., :TOP_K]
    entries = rng.integers(0, NUM_SLOTS, (NUM_EXPERTS, WIDTH))
    most = {"replicas": 3, "uneven": 11}.get(table)
    replicas = np.full(NUM_EXPERTS, WIDTH) if most is None else rng.integers(1, most + 1, NUM_EXPERTS)
    entries[np.arange(WIDTH) >= replicas[:, None]] = -1
    return Inputs(
        [torch.tensor(batch, dtype=dtype, device=device) for batch in ids],
        torch.tensor(entries, device=device),
        torch.tensor(replicas, device=device),
        torch.zeros(NUM_SLOTS, dtype=torch.int64, device=device),
        torch.ones(1, dtype=torch.bool, device=device),
        torch.tensor([num_tokens], dtype=torch.int32, device=device),
    )


def expected(inputs: Inputs, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Physical ids and counts of one input set, in NumPy."""
    ids = inputs.ids[which].cpu().numpy().astype(np.int64)
    rows = np.arange(len(ids))[:, None]
    fraction = (rows * 2654435769 + ids * 1779033703) % 2**32 >> 16
    entries = fraction * inputs.replicas.cpu().numpy()[ids] >> 16
    out = inputs.table.cpu().numpy()[ids, entries]
    real = out[: int(inputs.num_unpadded)]
    return out, np.bincount(real.ravel(), minlength=NUM_SLOTS)


def op(inputs: Inputs) -> Call:
    arguments = inputs.table, inputs.replicas, inputs.counts, inputs.record, inputs.num_unpadded
    return lambda i: ops.map_and_record(inputs.ids[i], *arguments)


def op_switched_off(inputs: Inputs) -> Call:
    off = torch.zeros_like(inputs.record)
    arguments = inputs.table, inputs.replicas, inputs.counts, off, inputs.num_unpadded
    return lambda i: ops.map_and_record(inputs.ids[i], *arguments)


def op_by_aten(inputs: Inputs) -> Call:
    arguments = inputs.table, inputs.replicas, inputs.counts, inputs.record, inputs.num_unpadded
    return lambda i: ops.map_and_record_aten(inputs.ids[i], *arguments)


def choose_index_bincount(inputs: Inputs) -> Call:
    """The same work as a torch user would write it: choose an entry, index the table, bincount, add."""
    positions = torch.arange(len(inputs.ids[0])).unsqueeze(1) * ops.TOKEN_STEP

    def call(i: int) -> torch.Tensor:
        ids = inputs.ids[i]
        fraction = ((positions + ids * ops.EXPERT_STEP) & 0xFFFFFFFF) >> 16
        out = inputs.table[ids, (fraction * inputs.replicas[ids]) >> 16]
        inputs.counts.add_(torch.bincount(out.view(-1), minlength=NUM_SLOTS))
        return out

    return call


def index_bincount(inputs: Inputs) -> Call:
    """Less work: every expert's first replica. One index, one bincount."""
    first = inputs.table[:, 0].contiguous()

    def call(i: int) -> None:
        inputs.counts.add_(torch.bincount(first[inputs.ids[i]].view(-1), minlength=NUM_SLOTS))

    return call


def identity_bincount(inputs: Inputs) -> Call:
    """Less still: no mapping at all, bincount of the logical ids."""

    def call(i: int) -> None:
        inputs.counts.add_(torch.bincount(inputs.ids[i].view(-1), minlength=NUM_SLOTS))

    return call


def bincount_alone(inputs: Inputs) -> Call:
    """Only the bincount, without using its result."""

    def call(i: int) -> None:
        torch.bincount(inputs.ids[i].view(-1), minlength=NUM_SLOTS)

    return call


CPU_CANDIDATES: dict[str, Callable[[Inputs], Call]] = {
    "op": op,
    "op, not recording": op_switched_off,
    "op by ATen": op_by_aten,
    "choose + index + bincount": choose_index_bincount,
    "index + bincount": index_bincount,
    "identity + bincount": identity_bincount,
    "bincount alone": bincount_alone,
}


def triton_peer(block: int) -> Callable[[Inputs], Call]:
    """One Triton kernel of the same function, one entry per lane, adding to ``counts`` by relaxed atomics."""
    from benchmarks.record_op_triton import launch

    def make(inputs: Inputs) -> Call:
        arguments = inputs.table, inputs.replicas, inputs.counts, inputs.record, inputs.num_unpadded
        return lambda i: launch(inputs.ids[i], *arguments, block)

    return make
