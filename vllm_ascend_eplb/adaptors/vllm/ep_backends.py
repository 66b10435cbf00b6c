# SPDX-License-Identifier: Apache-2.0
"""The all2all backends of vLLM: which are balanced, and beside which NCCL transfers cannot deadlock.

Every backend that is balanced takes the ids of physical experts and finds their rank by division, as the balancer's
slots are numbered. None keeps a table of expert positions that a move would make stale: with EPLB on, vLLM builds none.
The names are those of vLLM's ``ParallelConfig.all2all_backend`` and ``KernelConfig.moe_backend``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..refusals import Option, value_at

DEFAULT = "allgather_reducescatter"


@dataclass(frozen=True)
class EpBackend:
    """An all2all backend.

    Attributes:
        few_cores: whether NCCL kernels that wait can run beside its kernels: they are NCCL's own, or take a small fixed
            number of cores.
        refused: why balancing is not supported beside it; empty where it is.
    """

    few_cores: bool
    refused: str = ""


_AMD = "its kernels are for AMD GPUs, on which nothing has been tested"

EP_BACKENDS: Mapping[str, EpBackend] = MappingProxyType(
    {
        DEFAULT: EpBackend(few_cores=True),
        "naive": EpBackend(few_cores=True),  # vLLM runs the default for this name
        "pplx": EpBackend(few_cores=True),  # and for this one
        "deepep_high_throughput": EpBackend(few_cores=True),  # 20 cores, launched cooperatively
        "deepep_low_latency": EpBackend(few_cores=False),  # thread blocks by the number of experts, cooperatively
        "deepep_v2": EpBackend(few_cores=False),  # cores by the number of experts
        "nixl_ep": EpBackend(few_cores=False),  # as for DeepEP low latency
        "flashinfer_all2allv": EpBackend(few_cores=True),  # not launched cooperatively
        "flashinfer_nvlink_two_sided": EpBackend(few_cores=True),
        "flashinfer_nvlink_one_sided": EpBackend(few_cores=True),
        "passthrough": EpBackend(few_cores=False),  # the MoE backend is a megakernel
        "moonep": EpBackend(
            few_cores=False, refused="it computes with copies of the weights, which moves do not reach"
        ),
        "mori_high_throughput": EpBackend(few_cores=False, refused=_AMD),
        "mori_low_latency": EpBackend(few_cores=False, refused=_AMD),
    }
)

MEGAKERNELS_REFUSED = ("flashinfer_moe_ep_mega_deep_gemm", "aiter_mega_moe")
"""Backends for experts that dispatch and combine by themselves and that vLLM refuses together with EPLB, only once the
workers load the model."""


def beside_ep_backend(vllm_config: Any) -> list[Option]:
    """The backends of a configuration with which balancing is not supported, unknown ones too: name, value, allowed
    values, way out."""
    all2all = value_at(vllm_config, "parallel_config.all2all_backend", DEFAULT)
    backend = EP_BACKENDS.get(all2all, EpBackend(few_cores=False, refused="it is not known"))
    found: list[Option] = []
    if backend.refused:
        allowed = ", ".join(name for name, known in EP_BACKENDS.items() if not known.refused)
        found.append(("--all2all-backend", all2all, allowed, f"{backend.refused}: choose another"))
    for name, moe in moe_backends(vllm_config):
        if moe in MEGAKERNELS_REFUSED:
            found.append((name, moe, "any other", "vLLM loads no model for it with EPLB on: choose another"))
    return found


def moe_backends(vllm_config: Any) -> list[tuple[str, str]]:
    """The backends for experts, of the model and of the draft model: name of the option, value."""
    options = (
        ("--moe-backend", "kernel_config.moe_backend"),
        ("the moe_backend of --speculative-config", "speculative_config.moe_backend"),
    )
    return [(name, value_at(vllm_config, path, "auto")) for name, path in options]
