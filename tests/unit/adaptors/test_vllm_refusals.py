# SPDX-License-Identifier: Apache-2.0
"""Options of vLLM that load weights: which combinations are refused, and which are accepted."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ascend_eplb.adaptors.refusals import common_options
from vllm_ascend_eplb.adaptors.vllm.refusals import beside_map, beside_new_weights
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.fit import refuse_options
from vllm_ascend_eplb.settings.messages import EplbConfigError

DRAFT = SimpleNamespace(
    target_model_config=None, draft_model_config=SimpleNamespace(get_num_experts=lambda: 8), method="mtp"
)


def served(transfer: object = None, sleep: bool = False, engines: int = 1, draft: Any = None) -> Any:
    return SimpleNamespace(
        weight_transfer_config=transfer,
        model_config=SimpleNamespace(enable_sleep_mode=sleep),
        parallel_config=SimpleNamespace(data_parallel_size=engines),
        speculative_config=draft,
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (served(), None),
        (served(engines=2, draft=DRAFT), None),
        (served(transfer=object()), None),
        (served(sleep=True), None),
        (served(transfer=object(), sleep=True), None),
        (served(transfer=object(), sleep=True, engines=2), None),
        (served(transfer=object(), draft=DRAFT), "--weight-transfer-config and a draft model with experts True"),
        (served(sleep=True, draft=DRAFT), "--enable-sleep-mode and a draft model with experts True"),
    ],
)
def test_new_weights_are_refused_beside_several_models(config: Any, says: str | None) -> None:
    with contextlib.nullcontext() if says is None else pytest.raises(EplbConfigError, match=f"{says} is not supported"):
        refuse_options(beside_new_weights(config))


@pytest.mark.parametrize("backend", ["auto", "triton", "deep_gemm_mega_moe", "flashinfer_moe_ep_cutedsl"])
@pytest.mark.parametrize("path", [None, "map.json"])
def test_maps_are_refused_beside_megakernels(backend: str, path: str | None) -> None:
    """The loader of a megakernel takes ids of logical experts, so weights cannot be sent to slots."""
    config = EplbConfig(dynamic_eplb=True, expert_map_path=path)
    refused = path is not None and ("mega" in backend or "moe_ep" in backend)
    says = f"an expert_map_path and --moe-backend {backend} is not supported"
    with pytest.raises(EplbConfigError, match=says) if refused else contextlib.nullcontext():
        refuse_options(beside_map(SimpleNamespace(kernel_config=SimpleNamespace(moe_backend=backend)), config))


def loaded_by(load_format: str, draft_format: str | None = None) -> Any:
    config = served(draft=SimpleNamespace(**vars(DRAFT)))
    config.load_config = SimpleNamespace(load_format=load_format)
    config.lora_config = None
    config.parallel_config.pipeline_parallel_size = 1
    if draft_format is not None:
        config.speculative_config.draft_load_config = SimpleNamespace(load_format=draft_format)
    return config


@pytest.mark.parametrize("load_format", ["ipc_cache", "modelexpress", "netloader", "rfork"])
def test_formats_that_share_weights_are_refused(load_format: str) -> None:
    """Another process would read experts from slots that they have left. Formats that load into this process alone
    pass."""
    config = EplbConfig(dynamic_eplb=True)
    with pytest.raises(EplbConfigError, match=f"--load-format {load_format} is not supported.*; leave it out"):
        refuse_options(common_options(loaded_by(load_format), config, ("mtp",)))
    with pytest.raises(EplbConfigError, match=f"a draft model's --load-format {load_format} is not supported"):
        refuse_options(common_options(loaded_by("auto", load_format), config, ("mtp",)))
    for passes in ("auto", "dummy", "safetensors", "sharded_state", "tensorizer", "runai_streamer"):
        refuse_options(common_options(loaded_by(passes, passes), config, ("mtp",)))
