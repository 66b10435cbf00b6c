# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM launches kernels that need all cores of a GPU at once, beside which NCCL transfers can deadlock.

Such a kernel is launched cooperatively: it starts when all thread blocks fit on the GPU together, and then waits for
the same kernel on other ranks. If an NCCL kernel that waits for a peer holds some of these cores, both deadlock. The
names are those of vLLM 0.32 (``ParallelConfig.all2all_backend``, ``KernelConfig.moe_backend``).
"""

from __future__ import annotations

from typing import Any

from ...settings.config import EplbConfig
from ..refusals import Option, value_at

SAFE_ALL2ALL = (
    "allgather_reducescatter",
    "naive",
    "pplx",
    "deepep_high_throughput",
    "flashinfer_all2allv",
    "flashinfer_nvlink_one_sided",
    "flashinfer_nvlink_two_sided",
)
"""All2all backends beside which a bounded NCCL communicator cannot deadlock: NCCL collectives (vLLM runs ``naive`` and
``pplx`` as the first of them), kernels with a small fixed number of thread blocks (DeepEP takes 20 cores for high
throughput) and FlashInfer's, which are not launched cooperatively. Others are refused, unknown ones too:
``deepep_low_latency``, ``deepep_v2`` and ``nixl_ep`` take cores by the number of experts, ``passthrough`` stands for a
megakernel; ``moonep`` and ``mori_*`` are untested."""


def is_megakernel(moe_backend: str) -> bool:
    """Whether a backend for experts dispatches, computes and combines in one kernel: DeepGEMM's, FlashInfer's and
    AITER's."""
    return "mega" in moe_backend or moe_backend.startswith("flashinfer_moe_ep")


def cooperative_kernels(vllm_config: Any) -> list[Option]:
    """The options of a configuration that choose cooperative kernels: name, value, allowed values, way out."""
    all2all = value_at(vllm_config, "parallel_config.all2all_backend", SAFE_ALL2ALL[0])
    found: list[Option] = []
    way_out = 'set "transport" to "pull" or "gloo"'
    if all2all not in SAFE_ALL2ALL:
        allowed = ", ".join(SAFE_ALL2ALL)
        found.append(('"transport": "nccl" and --all2all-backend', all2all, allowed, way_out))
    for path, name in (
        ("kernel_config.moe_backend", "--moe-backend"),
        ("speculative_config.moe_backend", "the moe_backend of --speculative-config"),
    ):
        backend = value_at(vllm_config, path, "auto")
        if is_megakernel(backend):
            found.append((f'"transport": "nccl" and {name}', backend, "any that is not a megakernel", way_out))
    return found


def beside_nccl(vllm_config: Any, config: EplbConfig) -> list[Option]:
    """These options, if weights travel by NCCL; empty with another transport."""
    return cooperative_kernels(vllm_config) if config.transport == "nccl" else []
