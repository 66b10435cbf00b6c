# SPDX-License-Identifier: Apache-2.0
"""Other planners: vLLM's from the environment, DeepSeek's and vllm-ascend's from paths given by the user.

A peer is a function (load [L, E], slots [L, P], num_ranks) -> slots [L, P]. Sources are run as they are; what they
import and a benchmark does not need (devices, groups) is replaced by empty modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DEVICES_PER_HOST = 8
"""What vllm-ascend's swift is told where there is no NPU to count."""

Slots = npt.NDArray[np.int32]
Peer = Callable[[npt.NDArray[np.float64], Slots, int], Slots]


def vllm_peer() -> Peer | None:
    """vLLM's DefaultEplbPolicy, or None where vLLM is not installed."""
    try:
        import torch
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
    except ImportError:
        return None

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        after = DefaultEplbPolicy.rebalance_experts(
            torch.from_numpy(load), slots.shape[1], 1, 1, num_ranks, torch.from_numpy(slots)
        )
        return after.numpy().astype(np.int32)

    return rebalance


def deepseek_peer(path: Path) -> Peer:
    """``eplb.py`` of https://github.com/deepseek-ai/EPLB, given as file or as the folder that holds it."""
    module = _load("deepseek_eplb", path / "eplb.py" if path.is_dir() else path)
    import torch

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        after = module.rebalance_experts(torch.from_numpy(load).float(), slots.shape[1], 1, 1, num_ranks)[0]
        return after.numpy().astype(np.int32)

    return rebalance


def ascend_peers(path: Path) -> dict[str, Peer]:
    """The policies of an unpacked vllm-ascend (the folder that holds ``vllm_ascend/``), by name.

    Each call gets a policy without history, and loads as whole tokens per slot, as vllm-ascend hands them over.
    """
    root = path / "vllm_ascend"
    if not (root / "eplb/core/policy/policy_factory.py").exists():
        raise FileNotFoundError(f"{path}: no vllm_ascend/eplb/core/policy/policy_factory.py below")
    for name in ("", ".eplb", ".eplb.core", ".eplb.core.policy"):
        package = types.ModuleType("vllm_ascend" + name)
        package.__path__ = [str(root / name[1:].replace(".", "/"))]
        sys.modules["vllm_ascend" + name] = package
    sys.modules["vllm_ascend.distributed"] = types.ModuleType("vllm_ascend.distributed")
    groups = types.ModuleType("vllm_ascend.distributed.parallel_state")
    groups.__dict__["get_dynamic_eplb_group"] = lambda: None
    sys.modules["vllm_ascend.distributed.parallel_state"] = groups
    sys.modules.setdefault("torch_npu", types.ModuleType("torch_npu"))
    import torch

    if not hasattr(torch, "npu"):
        devices = types.ModuleType("npu")
        devices.__dict__["device_count"] = lambda: DEVICES_PER_HOST
        torch.__dict__["npu"] = devices

    factory: Any = importlib.import_module("vllm_ascend.eplb.core.policy.policy_factory").PolicyFactory

    def peer(number: int) -> Peer:
        factory.generate_policy(number)  # compiles what is to be compiled

        def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
            table = slots.reshape(len(slots), num_ranks, -1)
            count = np.zeros(load.shape)
            np.add.at(count, (np.arange(len(slots))[:, None], slots), 1)
            per_slot = np.take_along_axis(load / count, slots.astype(np.int64), axis=1)
            heat = np.rint(per_slot / per_slot.sum() * 1e9).astype(np.int64).reshape(table.shape)
            after = factory.generate_policy(number).rebalance_experts(torch.from_numpy(table), torch.from_numpy(heat))[
                2
            ]
            return np.asarray(after, dtype=np.int32).reshape(slots.shape)

        return rebalance

    return {f"vllm-ascend {name}": peer(number) for name, number in (("default", 1), ("swift", 2), ("flashlb", 3))}


def stair_peer(path: Path) -> Peer | None:
    """STAIR, the policy of the second model runner of vllm-ascend 0.30.0rc2, with its default settings and without
    history; None where the sources have none."""
    root = path / "vllm_ascend"
    if not (root / "distributed/eplb/policy/stair.py").exists():
        return None
    for name in (".distributed", ".distributed.eplb", ""):
        package = types.ModuleType("vllm_ascend" + name)
        package.__path__ = [str(root / name[1:].replace(".", "/"))]
        sys.modules["vllm_ascend" + name] = package
    build = types.ModuleType("vllm_ascend._build_info")  # written when vllm-ascend is built: which devices it is for
    build.__dict__["__device_type__"] = "A2"
    sys.modules["vllm_ascend._build_info"] = build
    sys.modules["vllm_ascend"].__dict__["_build_info"] = build
    module: Any = importlib.import_module("vllm_ascend.distributed.eplb.policy.stair")
    config: Any = importlib.import_module("vllm_ascend.ascend_config").StairConfig()

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        made = module.StairEplbPolicy.plan_rebalance(
            load[None],
            slots.reshape(len(slots), num_ranks, -1).astype(np.int64),
            np.full(len(slots), np.nan),
            np.zeros(num_ranks, dtype=np.int64),
            config,
        )
        return np.asarray(made.rank_expert_ids, dtype=np.int32).reshape(slots.shape)

    return rebalance


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path}: no Python file to load a planner from")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
