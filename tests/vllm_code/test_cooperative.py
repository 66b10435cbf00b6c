# SPDX-License-Identifier: Apache-2.0
"""NCCL transfers are refused beside kernels that need all cores of a GPU, for every name that vLLM has for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from vllm_ascend_eplb.adaptors.vllm.cooperative import SAFE_ALL2ALL, beside_nccl, cooperative_kernels
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.fit import refuse_options
from vllm_ascend_eplb.settings.messages import EplbConfigError

REFUSED_ALL2ALL = {"deepep_low_latency", "deepep_v2", "nixl_ep", "passthrough", "moonep"} | {
    "mori_high_throughput",
    "mori_low_latency",
}
MEGAKERNELS = {
    "deep_gemm_mega_moe",
    "flashinfer_moe_ep_mega_deep_gemm",
    "flashinfer_moe_ep_mega_cutedsl",
    "flashinfer_moe_ep_cutedsl",
    "aiter_mega_moe",
}


def served(all2all: str = "allgather_reducescatter", moe: str = "auto", draft: str | None = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(all2all_backend=all2all),
        kernel_config=SimpleNamespace(moe_backend=moe),
        speculative_config=None if draft is None else SimpleNamespace(moe_backend=draft),
    )


def settings(transport: str) -> EplbConfig:
    return EplbConfig(dynamic_eplb=True, transport=transport)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *((served(all2all=name), f"--all2all-backend {name} ") for name in sorted(REFUSED_ALL2ALL)),
        *((served(moe=name), f"--moe-backend {name} ") for name in sorted(MEGAKERNELS)),
        (served(draft="deep_gemm_mega_moe"), "moe_backend of --speculative-config deep_gemm_mega_moe "),
        (served(all2all="one_of_tomorrow"), "--all2all-backend one_of_tomorrow "),
    ],
)
def test_nccl_beside_cooperative_kernels_is_refused(config: Any, words: str) -> None:
    with pytest.raises(EplbConfigError) as raised:
        refuse_options(beside_nccl(config, settings("nccl")))
    message = str(raised.value)
    assert words in message
    assert "(allowed: " in message
    assert '"transport" to "pull" or "gloo"' in message
    assert "\n" not in message
    for transport in ("auto", "pull", "gloo"):
        refuse_options(beside_nccl(config, settings(transport)))


@pytest.mark.parametrize("all2all", SAFE_ALL2ALL)
@pytest.mark.parametrize("moe", ["auto", "triton", "deep_gemm", "flashinfer_cutlass"])
def test_nccl_beside_other_kernels_is_accepted(all2all: str, moe: str) -> None:
    refuse_options(beside_nccl(served(all2all, moe, "triton"), settings("nccl")))


def test_every_backend_of_vllm_is_classified() -> None:
    """This test fails if a new vLLM adds a backend, so that a person classifies it."""
    kernel = pytest.importorskip("vllm.config.kernel")
    parallel = pytest.importorskip("vllm.config.parallel")
    names = set(get_args(parallel.All2AllBackend))
    assert names <= REFUSED_ALL2ALL | set(SAFE_ALL2ALL), "classify the new backends"
    refused = {name for name in get_args(kernel.MoEBackend) if cooperative_kernels(served(moe=name))}
    assert refused <= MEGAKERNELS
    assert set(getattr(kernel, "MEGA_MOE_BACKENDS", ())) <= refused
