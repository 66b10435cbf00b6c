# SPDX-License-Identifier: Apache-2.0
"""Other planners: vLLM's from the environment, all others from paths given by the user.

A peer is a function (load [L, E], slots [L, P], num_ranks) -> slots [L, P]. Its source runs unchanged. Imports that a
benchmark does not need (devices, groups) are replaced by empty modules.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VLLM_ASCEND = "0.30.0rc2"
"""The release of vllm-ascend whose planners are measured."""

DEVICES_PER_HOST = 8
"""What vllm-ascend's swift is told where there is no NPU to count."""

Slots = npt.NDArray[np.int32]
Peer = Callable[[npt.NDArray[np.float64], Slots, int], Slots]


def download(folder: Path) -> Path:
    """Fetches vllm-ascend's source distribution with pip into ``folder`` and unpacks it; returns its folder."""
    unpacked = folder / f"vllm_ascend-{VLLM_ASCEND}"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        # pip asks the distribution for its metadata; the variables keep that from compiling. It needs setuptools_scm.
        subprocess.run(
            [*command, "-d", str(folder), f"vllm-ascend=={VLLM_ASCEND}"],
            check=True,
            env={**os.environ, "COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b3"},
        )
        with tarfile.open(next(folder.glob("vllm_ascend-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def vllm_peer() -> Peer:
    """vLLM's DefaultEplbPolicy.

    Raises:
        ImportError: vLLM is not installed.
    """
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

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


def sglang_peer(path: Path, policy: str) -> Peer:
    """``deepseek`` or ``deepseek_vec`` of an unpacked sglang (the folder that holds ``sglang/``)."""
    import torch

    module = _load(f"sglang_{policy}", path / f"sglang/srt/eplb/eplb_algorithms/{policy}.py")

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        tokens, num_slots = torch.from_numpy(load).float(), slots.shape[1]
        if policy == "deepseek":
            after = module.rebalance_experts(tokens, num_slots, 1, 1, num_ranks, False)[0]
        else:
            after = module.rebalance_experts(tokens[None], num_slots, num_slots // num_ranks, None, 1, False)[0]
        return after.numpy().astype(np.int32)

    return rebalance


TENSORRT_TYPES = """
#include <algorithm>
#include <cassert>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <vector>
#define TLLM_CHECK_WITH_INFO(condition, ...) if (!(condition)) throw std::runtime_error("refused")
namespace tensorrt_llm::kernels { struct MoeLoadBalanceMetaInfo { int expertCount, epSize, slotCountPerRank; }; }
namespace tensorrt_llm::runtime {
struct MoePlacementCpuInfo { std::vector<int> expertReplicaCount; std::vector<std::vector<int>> rankExpertIds; };
"""
"""The fields that the two functions of TensorRT-LLM use, without CUDA."""

TENSORRT_CALL = """
}
extern "C" int eplb_place(int experts, int ranks, int per_rank, float* load, int* slots) {
    tensorrt_llm::kernels::MoeLoadBalanceMetaInfo info{experts, ranks, per_rank};
    tensorrt_llm::runtime::MoePlacementCpuInfo placed;
    placed.rankExpertIds.assign(ranks, std::vector<int>(per_rank, -1));
    try {
        tensorrt_llm::runtime::doReplication(info, load, &placed);
        tensorrt_llm::runtime::doPlacement(info, load, &placed);
    } catch (const std::runtime_error&) {
        return 1;
    }
    for (int r = 0; r < ranks; ++r)
        for (int s = 0; s < per_rank; ++s) slots[r * per_rank + s] = placed.rankExpertIds[r][s];
    return 0;
}
"""


def tensorrt_peer(path: Path) -> Peer:
    """Replication and placement of TensorRT-LLM's ``moeLoadBalancer.cpp``, compiled with g++ as they are."""
    source = path.read_text()
    begin = source.index("struct ReplicaInfo")
    functions = source[begin : source.index("\nnamespace\n{", begin)]
    folder = Path(tempfile.mkdtemp())
    (folder / "place.cpp").write_text(TENSORRT_TYPES + functions + TENSORRT_CALL)
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "place.cpp", "-o", "place.so"]
    subprocess.run(command, check=True, cwd=folder)
    place = ctypes.CDLL(str(folder / "place.so")).eplb_place
    shutil.rmtree(folder)

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        after = np.empty_like(slots)
        for layer, tokens in enumerate(load.astype(np.float32)):
            row = np.empty(slots.shape[1], dtype=np.int32)
            numbers = (load.shape[1], num_ranks, slots.shape[1] // num_ranks)
            if place(*numbers, tokens.ctypes.data_as(ctypes.c_void_p), row.ctypes.data_as(ctypes.c_void_p)):
                raise ValueError("more slots on a rank than there are")
            after[layer] = row
        return after

    return rebalance


def ascend_source(path: Path, policy: str) -> Path:
    """The file of a policy of an unpacked vllm-ascend (the folder that holds ``vllm_ascend/``)."""
    if policy == "STAIR":
        return path / "vllm_ascend/distributed/eplb/policy/stair.py"
    return path / f"vllm_ascend/eplb/core/policy/policy_{'swift_balancer' if policy == 'swift' else policy}.py"


def ascend_peer(path: Path, policy: str) -> Peer:
    """``swift``, ``flashlb`` or ``STAIR`` of an unpacked vllm-ascend."""
    if not ascend_source(path, policy).exists():
        raise FileNotFoundError(f"{ascend_source(path, policy)}: no such policy")
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm_ascend"]:
        del sys.modules[name]  # of another version
    _stand_in_for_vllm()
    return _stair_peer(path / "vllm_ascend") if policy == "STAIR" else _first_runners_peer(path / "vllm_ascend", policy)


def _stand_in_for_vllm() -> None:
    """Empty modules for what the peers import of vllm, where it is not installed."""
    if "vllm" in sys.modules or importlib.util.find_spec("vllm") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"logger": logging.getLogger("vllm")},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"cdiv": lambda a, b: -(-a // b)},
        "vllm.distributed": {"get_eplb_group": None},
        "vllm.distributed.eplb": {},
        "vllm.distributed.eplb.policy": {"AbstractEplbPolicy": object},
    }
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)


def _packages(root: Path, *names: str) -> None:
    """vllm-ascend's packages without what their ``__init__`` would load."""
    for name in names:
        package = types.ModuleType("vllm_ascend" + name)
        package.__path__ = [str(root / name[1:].replace(".", "/"))]
        sys.modules["vllm_ascend" + name] = package


def _first_runners_peer(root: Path, policy: str) -> Peer:
    """A policy of the first model runner. Each call gets one without history, and loads as whole tokens per slot, as
    vllm-ascend hands them over."""
    _packages(root, "", ".eplb", ".eplb.core", ".eplb.core.policy")
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
    number = {"swift": 2, "flashlb": 3}[policy]
    factory.generate_policy(number)  # compiles what is to be compiled

    def rebalance(load: npt.NDArray[np.float64], slots: Slots, num_ranks: int) -> Slots:
        table = slots.reshape(len(slots), num_ranks, -1)
        count = np.zeros(load.shape)
        np.add.at(count, (np.arange(len(slots))[:, None], slots), 1)
        per_slot = np.take_along_axis(load / count, slots.astype(np.int64), axis=1)
        heat = np.rint(per_slot / per_slot.sum() * 1e9).astype(np.int64).reshape(table.shape)
        after = factory.generate_policy(number).rebalance_experts(torch.from_numpy(table), torch.from_numpy(heat))[2]
        return np.asarray(after, dtype=np.int32).reshape(slots.shape)

    return rebalance


def _stair_peer(root: Path) -> Peer:
    """STAIR, the policy of the second model runner of vllm-ascend 0.30.0rc2, with its default settings and without
    history."""
    _packages(root, ".distributed", ".distributed.eplb", "")
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
