# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM launches kernels that need all cores of a GPU at once, beside which NCCL transfers can deadlock.

Such a kernel is launched cooperatively: it starts when all thread blocks fit on the GPU together, and then waits for
the same kernel on other ranks. An NCCL kernel that waits for a peer holds the cores that it lacks, and both wait for
ever.
"""

from __future__ import annotations

from typing import Any

from ...settings.config import EplbConfig
from ..refusals import Option, value_at
from .ep_backends import DEFAULT, EP_BACKENDS, moe_backends

SAFE_ALL2ALL = tuple(name for name, backend in EP_BACKENDS.items() if backend.few_cores)
"""All2all backends beside which a bounded NCCL communicator cannot deadlock. Others are refused, unknown ones too."""


def is_megakernel(moe_backend: str) -> bool:
    """Whether a backend for experts dispatches, computes and combines in one kernel: DeepGEMM's, FlashInfer's and
    AITER's."""
    return "mega" in moe_backend or moe_backend.startswith("flashinfer_moe_ep")


def cooperative_kernels(vllm_config: Any) -> list[Option]:
    """The options of a configuration that choose cooperative kernels: name, value, allowed values, way out."""
    all2all = value_at(vllm_config, "parallel_config.all2all_backend", DEFAULT)
    found: list[Option] = []
    way_out = 'set "transport" to "pull" or "gloo"'
    if all2all not in SAFE_ALL2ALL:
        allowed = ", ".join(SAFE_ALL2ALL)
        found.append(('"transport": "nccl" and --all2all-backend', all2all, allowed, way_out))
    for name, backend in moe_backends(vllm_config):
        if is_megakernel(backend):
            found.append((f'"transport": "nccl" and {name}', backend, "any that is not a megakernel", way_out))
    return found


def beside_nccl(vllm_config: Any, config: EplbConfig) -> list[Option]:
    """These options, if weights travel by NCCL; empty with another transport."""
    return cooperative_kernels(vllm_config) if config.transport == "nccl" else []
