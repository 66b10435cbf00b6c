# SPDX-License-Identifier: Apache-2.0
"""Parts of vllm-ascend's second model runner: its Triton kernels, in Triton's interpreter, compared with the stand-ins
that replace them in tests of serving; and its own routing tables."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vllm_ascend_eplb.planning.options import PlanOptions
from vllm_ascend_eplb.planning.request import PlanRequest, Rebalance, plan_request

EXPERTS, SLOTS, TOP = 12, 16, 3


def _real(name: str) -> ModuleType:
    """Import a second copy of a module without our replacements."""
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_as_it_is", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels() -> dict[str, list[bool]]:
    """True if stand-ins and kernels give equal results."""
    import vllm_ascend

    vllm_ascend.register()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    import vllm_ascend.ops
    import vllm_ascend.vllm_ascend_C
    from vllm_ascend.ops.triton.triton_utils import init_device_properties_triton

    init_device_properties_triton()
    standin: Any = importlib.import_module("vllm_ascend.ops.triton.eplb")
    real: Any = _real("vllm_ascend.ops.triton.eplb")
    assert type(standin._map_to_physical_kernel).__name__ == "_Kernel"
    assert type(real._map_to_physical_kernel).__name__ == "InterpretedFunction"
    torch.manual_seed(0)
    return {
        "map": [_mapped_alike(real, standin, rows, dtype) for rows in (1, 24, 1500) for dtype in ("int32", "int64")],
        "record": [_recorded_alike(real, standin, kind, on) for kind in (0, 1) for on in (True, False)],
        "rope": [_turned_alike(neox, by_position) for neox in (True, False) for by_position in (True, False)],
    }


def _mapped_alike(real: Any, standin: Any, rows: int, dtype: str) -> bool:
    ids = torch.randint(-1, EXPERTS + 1, (rows, TOP), dtype=getattr(torch, dtype), device="npu")
    table = torch.randint(0, SLOTS, (1024, EXPERTS), dtype=torch.int32, device="npu")
    mapped = real.map_to_physical_triton(ids, table)
    assert ((mapped >= 0) == ((ids >= 0) & (ids < EXPERTS))).all()
    return torch.equal(mapped, standin.map_to_physical_triton(ids, table))


def _recorded_alike(real: Any, standin: Any, kind: int, on: bool) -> bool:
    tokens = torch.randint(0, 9, (SLOTS // 2,), device="npu")
    tokens = tokens if kind == 1 else tokens.cumsum(0)
    enabled = torch.tensor([on], device="npu")
    loads = []
    for module in (real, standin):
        load = torch.arange(SLOTS, dtype=torch.int32, device="npu")
        module.record_expert_tokens_triton(tokens, load, enabled, kind, SLOTS // 2)
        loads.append(load)
    total = int(tokens.sum() if kind == 1 else tokens[-1])
    assert int(loads[0].sum()) == SLOTS * (SLOTS - 1) // 2 + on * total
    return torch.equal(*loads)


def _turned_alike(neox: bool, by_position: bool) -> bool:
    """Compare in float32, where the last bit of a sum of products may differ."""
    rows, size, rotary = 5, 16, 8
    table, positions = torch.randn(32, rotary, device="npu"), torch.randint(0, 32, (rows,), device="npu")
    cos, sin = (part.contiguous() for part in table[positions].chunk(2, -1))
    where = {"cos_sin_cache": table, "positions": positions} if by_position else {"cos": cos, "sin": sin}
    results = []
    queries, keys = torch.randn(rows, 4, size, device="npu"), torch.randn(rows, 2, size, device="npu")
    for module in (_real("vllm_ascend.ops.triton.rope"), importlib.import_module("vllm_ascend.ops.triton.rope")):
        turned = module.rope_forward_triton(queries.clone(), keys.clone(), rope_dim=rotary, is_neox_style=neox, **where)
        results.append(torch.cat([part.flatten() for part in turned]))
    assert not torch.equal(results[0], torch.cat([queries.flatten(), keys.flatten()]))
    return torch.allclose(*results, rtol=0, atol=1e-6)


def tables() -> list[int]:
    """With one copy and with two copies of some experts: the number of rows that vllm-ascend's own tables send to
    different slots on two ranks."""
    from vllm_ascend.ops.fused_moe.eplb import build_expert_replica_routing_table

    differing = []
    for copies in (1, 2):
        slots = torch.full((EXPERTS, 2), -1)
        slots[:, 0] = torch.arange(EXPERTS)
        counts = torch.ones(EXPERTS, dtype=torch.int64)
        if copies == 2:
            slots[: SLOTS - EXPERTS, 1] = torch.arange(EXPERTS, SLOTS)
            counts[: SLOTS - EXPERTS] = 2
        first, second = (build_expert_replica_routing_table(slots, counts, rank) for rank in (0, 1))
        differing.append(int((first != second).any(dim=1).sum()))
    return differing


def one_move_per_rank() -> dict[str, list[float]]:
    """PAR of six layers with 64 experts on two ranks, each of which may receive one expert: at the start, after the
    best of all swaps of two experts, and with the plans of vllm-ascend's policy (STAIR) and of ours."""
    from vllm_ascend.ascend_config import StairConfig
    from vllm_ascend.distributed.eplb.policy.stair import StairEplbPolicy

    draw = np.random.default_rng(0)
    layers = [draw.permutation(1.0 / np.arange(1, 65) ** 1.2) for _ in range(6)]
    load = np.stack([draw.poisson(20_000 * layer, (12, 64)) for layer in layers], axis=1).astype(np.int64)
    start = np.arange(64, dtype=np.int32).reshape(2, 32)
    stair = StairEplbPolicy.plan_rebalance(
        load.astype(np.float64),
        np.stack([start] * 6),
        np.full(6, np.nan),
        np.zeros(2, dtype=np.int64),
        StairConfig(rank_transfer_limit=1),
    ).rank_expert_ids
    options = PlanOptions(max_moves_per_rank=1, target_par=1.0)
    found: dict[str, list[float]] = {"start": [], "best": [], "stair": [], "ours": []}
    for layer, total in enumerate(load.sum(axis=0).astype(float)):

        def par(placement: np.ndarray, total: np.ndarray = total) -> float:
            return float(total[placement.reshape(2, 32)].sum(axis=1).max() / (total.sum() / 2))

        request = PlanRequest(1, load[:, [layer]], start.reshape(1, 64), 64, (0, 0), task=Rebalance(options=options))
        swaps = total[start[0]][:, None] - total[start[1]]  # from the first rank to the second
        first, second = total[start[0]].sum(), total[start[1]].sum()
        found["start"].append(par(start))
        found["best"].append(float(np.maximum(first - swaps, second + swaps).min() / (total.sum() / 2)))
        found["stair"].append(par(stair[layer]))
        found["ours"].append(par(plan_request(request).physical_to_logical))
    return found
