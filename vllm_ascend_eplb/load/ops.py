# SPDX-License-Identifier: Apache-2.0
"""The ops inside every MoE layer's forward: choose a replica for every routed token, and count it.

=======================  ==============================================================================================
``map_and_record``       before dispatch: logical ids [N, K] to physical ids through a layer's dispatch table, counting
                         physical ids in the same pass
``record_expert_tokens`` after dispatch: adds the counts (or prefix sums) of a rank's own slots that dispatch reports
=======================  ==============================================================================================

Both are torch custom ops, ``torch.ops.vllm_ascend_eplb.*``: opaque to torch.compile (no graph break), safe under graph
capture (no synchronisation; every number that changes between replays is read from a tensor on the device).

**Kernels.** ``_ops.so``, built from ``csrc/ops``, holds a CPU kernel and, where nvcc was present, a CUDA kernel. Every
other device, and a machine without that library, runs the same ops as a sequence of ATen operators, defined here.
:func:`kernel_for` says which one a device gets.

**Which replica.** Row ``e`` of a dispatch table holds ``V = replica_count[e]`` valid entries (slots). Token ``n`` takes
entry ``floor(V * u)``, where ``u = frac(n / phi + e * (sqrt(2) - 1))`` in 16-bit fixed point; ``n`` is the token's row
in the batch and ``phi`` the golden ratio. It depends on nothing else, so ranks that route the same tokens agree, and
one token that two ranks route differently does not shift any other. The golden-ratio sequence spreads evenly for any
``V`` and over any run of neighbouring tokens, which tend to want the same experts; the term in ``e`` keeps the few
tokens of a small batch from all taking their experts' first replicas. An entry that is repeated gets a larger share;
the shares hold best for few tokens if equal entries of a row stand side by side, whatever the order.
"""

from __future__ import annotations

import logging
import mmap
from pathlib import Path

import torch

logger = logging.getLogger("vllm.eplb")


TOKEN_STEP = 2654435769
"""2^32 / golden ratio; csrc/ops/index_rule.h holds the same constants."""


EXPERT_STEP = 1779033703
"""2^32 * (sqrt(2) - 1)."""


MAX_WIDTH = 65535
"""Most entries of a row of a dispatch table."""


_LIBRARY = Path(__file__).parents[1] / "_ops.so"


_definitions = torch.library.Library("vllm_ascend_eplb", "DEF")  # type: ignore[no-untyped-call]


_definitions.define(  # type: ignore[no-untyped-call]
    "map_and_record(Tensor topk_ids, Tensor dispatch_table, Tensor replica_count, Tensor(a!) counts, Tensor record, "
    "Tensor? num_unpadded=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_definitions.define(  # type: ignore[no-untyped-call]
    "record_expert_tokens(Tensor expert_tokens, Tensor(a!) counts, Tensor record, bool prefix_sums=False, "
    "int first_slot=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_map_and_record = torch.ops.vllm_ascend_eplb.map_and_record.default


_record_expert_tokens = torch.ops.vllm_ascend_eplb.record_expert_tokens.default


def map_and_record(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps logical to physical expert ids and, where ``record`` holds, adds one to ``counts`` for each.

    All tensors are on one device.

    Args:
        topk_ids: int32 or int64 [N, K], logical experts of each token. Ids outside 0..E-1 pass through unchanged and
            are not counted.
        dispatch_table: int64 [E, W], W <= 65535, rows contiguous: the slots that take an expert's tokens, in turn
            (module docstring). Entries beyond ``replica_count`` are never read.
        replica_count: int32 or int64 [E]: valid entries of each row, 1..W (more than W count as W).
        counts: int32 or int64 [P], **changed in place**: tokens per slot. int32 holds 2**31 - 1 tokens per slot.
            Mapped ids outside 0..P-1 are returned, not counted. On the CPU no two threads may record into one
            ``counts`` at a time; on a GPU concurrent streams may.
        record: bool [1], the switch.
        num_unpadded: int32 or int64, the rows that hold real tokens: one number n (rows 0..n-1) or two (rows
            first..end-1, for a rank whose tokens are a part of the batch). None: all rows. All rows are mapped.

    Returns:
        Physical ids [N, K] of the dtype of ``topk_ids``, contiguous, a new tensor.

    Raises:
        RuntimeError: a tensor has another dtype, shape or device than described.
    """
    out: torch.Tensor = _map_and_record(topk_ids, dispatch_table, replica_count, counts, record, num_unpadded)
    return out


def record_expert_tokens(
    expert_tokens: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    prefix_sums: bool = False,
    first_slot: int = 0,
) -> None:
    """Where ``record`` holds, adds the tokens that a rank's slots received to ``counts``.

    Such counts come after dispatch and contain padding tokens, if the engine dispatches those.

    Args:
        expert_tokens: int32 or int64 [S], tokens of each local slot, or, with ``prefix_sums``, tokens of all slots up
            to and including it. (Ascend's grouped matmul calls the two forms group_list_type 1 and 0.)
        counts: int32 or int64 [P] or [S], **changed in place**.
        record: bool [1], the switch.
        prefix_sums: which form ``expert_tokens`` has.
        first_slot: the element of ``counts`` that belongs to the rank's first slot.

    Raises:
        RuntimeError: a tensor has another dtype, shape or device than described, or the slots are outside of
            ``counts``.
    """
    _record_expert_tokens(expert_tokens, counts, record, prefix_sums, first_slot)


def entries_of(tokens: torch.Tensor, experts: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """int64: the entry of its expert's row that each token takes (module docstring); the arguments broadcast.

    Args:
        tokens: int64, row of the token in the batch.
        experts: int64, logical expert.
        valid: int64, valid entries of the expert's row, 1..65535.
    """
    fraction = (tokens * TOKEN_STEP + experts * EXPERT_STEP) & 0xFFFFFFFF
    fraction = torch.div(fraction, 65536, rounding_mode="floor")
    return torch.div(fraction * valid, 65536, rounding_mode="floor")


def _map_and_record_aten(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_map_and_record(topk_ids, dispatch_table, replica_count, counts, record, num_unpadded)
    num_tokens = topk_ids.shape[0]
    num_experts, width = dispatch_table.shape
    ids = topk_ids.to(torch.int64)
    known = (ids >= 0) & (ids < num_experts)
    experts = ids * known
    rows = torch.arange(num_tokens, device=ids.device, dtype=torch.int64).unsqueeze(1)
    valid = replica_count.to(torch.int64).clamp(0, width)[experts]
    slots = dispatch_table.reshape(-1)[experts * width + entries_of(rows, experts, valid)]
    counted = known & (slots >= 0) & (slots < counts.shape[0]) & record.reshape(1)
    if num_unpadded is not None:
        bounds = num_unpadded.reshape(-1)
        counted = counted & (rows < bounds[-1:])
        if bounds.shape[0] == 2:
            counted = counted & (rows >= bounds[:1])
    # What does not count adds 0 to slot 0: shapes must not depend on data under graph capture.
    counts.scatter_add_(0, (slots * counted).reshape(-1), counted.reshape(-1).to(counts.dtype))
    return torch.where(known, slots, ids).to(topk_ids.dtype)


def _record_expert_tokens_aten(
    expert_tokens: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    prefix_sums: bool = False,
    first_slot: int = 0,
) -> None:
    _check_record_expert_tokens(expert_tokens, counts, record, first_slot)
    local = counts.narrow(0, first_slot, expert_tokens.shape[0])
    tokens = expert_tokens.to(counts.dtype) * record
    local.add_(tokens)
    if prefix_sums:
        local[1:].sub_(tokens[:-1])


def _map_and_record_fake(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None = None,
) -> torch.Tensor:
    return topk_ids.new_empty(topk_ids.shape)


def _record_expert_tokens_fake(
    expert_tokens: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    prefix_sums: bool = False,
    first_slot: int = 0,
) -> None:
    return None


_INTS = (torch.int32, torch.int64)


def _check_map_and_record(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None,
) -> None:
    if topk_ids.dtype not in _INTS or topk_ids.dim() != 2:
        raise RuntimeError(
            f"topk_ids has dtype {topk_ids.dtype} and shape {list(topk_ids.shape)}; "
            f"it is int32 or int64 [tokens, experts per token]"
        )
    if (
        dispatch_table.dtype != torch.int64
        or dispatch_table.dim() != 2
        or dispatch_table.stride(1) != 1
        or not 1 <= dispatch_table.shape[1] <= MAX_WIDTH
    ):
        raise RuntimeError(
            f"dispatch_table has dtype {dispatch_table.dtype} and shape {list(dispatch_table.shape)}; "
            f"it is int64 [experts, width] with contiguous rows and a width of 1..{MAX_WIDTH}"
        )
    if replica_count.dtype not in _INTS or replica_count.shape != dispatch_table.shape[:1]:
        raise RuntimeError(
            f"replica_count has dtype {replica_count.dtype} and shape {list(replica_count.shape)}; "
            f"it is int32 or int64 [{dispatch_table.shape[0]}], one number per row of dispatch_table"
        )
    _check_counts(counts)
    _check_record(record)
    if num_unpadded is not None and (num_unpadded.dtype not in _INTS or num_unpadded.numel() not in (1, 2)):
        raise RuntimeError(
            f"num_unpadded has dtype {num_unpadded.dtype} and shape {list(num_unpadded.shape)}; "
            f"it is an int32 or int64 tensor of one number (rows 0..n-1 are real) or two (rows first..end-1)"
        )


def _check_record_expert_tokens(
    expert_tokens: torch.Tensor, counts: torch.Tensor, record: torch.Tensor, first_slot: int
) -> None:
    if expert_tokens.dtype not in _INTS or expert_tokens.dim() != 1:
        raise RuntimeError(
            f"expert_tokens has dtype {expert_tokens.dtype} and shape {list(expert_tokens.shape)}; "
            f"it is a contiguous int32 or int64 vector with one element per local slot"
        )
    _check_counts(counts)
    _check_record(record)
    last = first_slot + expert_tokens.shape[0] - 1
    if first_slot < 0 or last >= counts.shape[0]:
        raise RuntimeError(f"slots {first_slot}..{last} are outside of counts, which has {counts.shape[0]} slots")


def _check_counts(counts: torch.Tensor) -> None:
    if counts.dtype not in _INTS or counts.dim() != 1:
        raise RuntimeError(
            f"counts has dtype {counts.dtype} and shape {list(counts.shape)}; "
            f"it is a contiguous int32 or int64 vector with one element per slot"
        )


def _check_record(record: torch.Tensor) -> None:
    if record.dtype != torch.bool or record.numel() != 1:
        raise RuntimeError(
            f"record has dtype {record.dtype} and shape {list(record.shape)}; it is a bool tensor of one element"
        )


_definitions.impl("map_and_record", _map_and_record_aten, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


_definitions.impl("record_expert_tokens", _record_expert_tokens_aten, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


torch.library.register_fake("vllm_ascend_eplb::map_and_record", _map_and_record_fake, lib=_definitions)


torch.library.register_fake("vllm_ascend_eplb::record_expert_tokens", _record_expert_tokens_fake, lib=_definitions)


def _load_library(path: Path) -> str | None:
    """Loads the kernels; returns why not, or None."""
    if not path.exists():
        return f"{path} is missing (install the package from source in an environment that has torch to build it)"
    mark = f"eplb-ops-built-for-torch:{torch.__version__};".encode()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            if contents.find(mark) < 0:
                return f"{path} was built for another torch than {torch.__version__}; reinstall the package"
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError) as error:
        return f"{path} does not load: {error.__cause__ or error}"
    return None


def kernel_for(device: torch.device | str) -> str:
    """Which kernel the ops run on a device: ``"cpu"`` or ``"cuda"`` from the library, or ``"aten"``."""
    kind = torch.device(device).type
    key = kind.upper()
    if key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "vllm_ascend_eplb::map_and_record", key
    ):
        return kind
    return "aten"


_why_not = _load_library(_LIBRARY)


if _why_not is not None:
    logger.warning("EPLB records expert load by ATen operators, which is slower: %s", _why_not)
elif torch.version.cuda is not None and kernel_for("cuda") == "aten":
    logger.warning("EPLB was built without nvcc: on CUDA it records expert load by ATen operators, which is slower")
