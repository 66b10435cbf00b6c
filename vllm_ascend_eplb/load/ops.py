# SPDX-License-Identifier: Apache-2.0
"""The op inside every MoE layer's forward: choose a replica for every routed token, and count it.

``map_and_record`` turns logical ids [N, K] into physical ids through a layer's dispatch table, before dispatch, and
counts the physical ids in the same pass. It is a torch custom op, ``torch.ops.vllm_ascend_eplb.map_and_record``: opaque
to torch.compile (no graph break), safe under graph capture (no synchronisation; every number that changes between
replays is read from a tensor on the device).

**Kernels.** ``_ops.so``, built from ``csrc/ops``, holds a CPU kernel and, where nvcc was present, a CUDA kernel. It is
built without torch and finds torch's stable C interface when it is loaded, so one build serves torch 2.10 and later.
Every other device, and a torch that does not fit the library, runs the same op as ATen operators, defined here.
:func:`kernel_for` names the kernel of a device, :data:`why_not` the reason why a kernel is not in use. Servers on CPUs
run the op; on CUDA and on Ascend the engines count with operators of their own.

**Which replica.** Row ``e`` of a dispatch table holds ``V = replica_count[e]`` valid entries (slots). Token ``n`` takes
entry ``floor(V * u)``, where ``u = frac(n / phi + e * (sqrt(2) - 1))`` in 16-bit fixed point; ``n`` is the token's row
in the batch and ``phi`` the golden ratio. The choice depends on nothing else. So ranks that route the same tokens
agree, and a token that two ranks route differently does not shift any other token. The golden-ratio sequence spreads
evenly for any ``V`` and over any run of neighbouring tokens, which tend to use the same experts. The term in ``e``
prevents the few tokens of a small batch from all taking their experts' first replicas. A repeated entry gets a larger
share; for few tokens the shares hold best if equal entries of a row stand side by side, in any order.
"""

from __future__ import annotations

import ctypes
import logging
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


_map_and_record = torch.ops.vllm_ascend_eplb.map_and_record.default


def map_and_record(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps logical to physical expert ids and, if ``record`` is true, adds one to ``counts`` for each.

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
        RuntimeError: a tensor has the wrong dtype, shape or device.
    """
    out: torch.Tensor = _map_and_record(topk_ids, dispatch_table, replica_count, counts, record, num_unpadded)
    return out


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


def map_and_record_aten(
    topk_ids: torch.Tensor,
    dispatch_table: torch.Tensor,
    replica_count: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor,
    num_unpadded: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op in torch operators; torch calls it with the arguments of :func:`map_and_record`."""
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
    # Uncounted ids add 0 to slot 0, because shapes must not depend on data under graph capture.
    counts.scatter_add_(0, (slots * counted).reshape(-1), counted.reshape(-1).to(counts.dtype))
    return torch.where(known, slots, ids).to(topk_ids.dtype)


def _map_and_record_fake(topk_ids: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return topk_ids.new_empty(topk_ids.shape)


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


_definitions.impl("map_and_record", map_and_record_aten, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


torch.library.register_fake("vllm_ascend_eplb::map_and_record", _map_and_record_fake, lib=_definitions)


def _register(path: Path, devices: tuple[str, ...]) -> dict[str, str]:
    """Registers the library's kernels with the op; returns the reason for each device that has none."""
    if not path.exists():
        return dict.fromkeys(devices, f"{path} is missing; reinstall the package")
    failed = {}
    try:
        library = ctypes.CDLL(str(path))
        for device in devices:
            register = library[f"eplb_register_{device}"]
            register.restype = ctypes.c_char_p
            if why := register().decode():
                failed[device] = f"{why} ({path.name} beside torch {torch.__version__})"
    except (OSError, AttributeError) as error:
        return dict.fromkeys(devices, f"{path} does not load: {error}; reinstall the package")
    return failed


def kernel_for(device: torch.device | str) -> str:
    """The kernel that the op runs on a device: ``"cpu"`` or ``"cuda"`` from the library, or ``"aten"``."""
    kind = torch.device(device).type
    key = kind.upper()
    if key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "vllm_ascend_eplb::map_and_record", key
    ):
        return kind
    return "aten"


why_not = _register(_LIBRARY, ("cpu", "cuda") if torch.version.cuda is not None else ("cpu",))
"""Reasons why the op has no kernel of the library, by device: ``"cpu"`` and, with a torch for CUDA, ``"cuda"``."""


if "cpu" in why_not:
    logger.warning("EPLB records expert load by ATen operators, which is slower: %s", why_not["cpu"])
