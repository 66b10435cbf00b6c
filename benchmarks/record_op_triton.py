# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that benchmarks/record_op.py compares the op with."""

import torch
import triton
import triton.language as tl


@triton.jit
def _map_and_record_kernel(
    ids,
    out,
    table,
    replicas,
    counts,
    record,
    num_unpadded,
    num_entries,
    top_k,
    row_stride,
    num_experts,
    num_slots,
    BLOCK: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_entries
    expert = tl.load(ids + at, mask=inside, other=-1).to(tl.int64)
    known = (expert >= 0) & (expert < num_experts)
    valid = tl.load(replicas + expert, mask=known, other=1).to(tl.uint32)
    token = at // top_k
    token_step = tl.full((BLOCK,), 2654435769, tl.uint32)
    expert_step = tl.full((BLOCK,), 1779033703, tl.uint32)
    fraction = (token.to(tl.uint32) * token_step + expert.to(tl.uint32) * expert_step) >> 16
    entry = (fraction * valid) >> 16
    slot = tl.load(table + expert * row_stride + entry.to(tl.int64), mask=known, other=-1)
    tl.store(out + at, tl.where(known, slot, expert), mask=inside)
    real = token < tl.load(num_unpadded)
    counted = known & real & (slot >= 0) & (slot < num_slots) & (tl.load(record) != 0)
    tl.atomic_add(counts + slot, tl.full((BLOCK,), 1, counts.dtype.element_ty), mask=counted, sem="relaxed")


def launch(
    ids: torch.Tensor,
    table: torch.Tensor,
    replicas: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """ops.map_and_record, one program per ``block`` entries."""
    out = torch.empty_like(ids)
    grid = (triton.cdiv(ids.numel(), block),)
    _map_and_record_kernel[grid](
        *(ids, out, table, replicas, counts, record, num_unpadded),
        *(ids.numel(), ids.shape[1], table.stride(0), table.shape[0], counts.shape[0]),
        BLOCK=block,
        num_warps=max(1, block // 64) if block < 512 else 8,
    )
    return out
