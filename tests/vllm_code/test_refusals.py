# SPDX-License-Identifier: Apache-2.0
"""What is refused or accepted beside vLLM's own settings and readers, with vLLM's own classes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config.parallel import EPLBConfig
from vllm.model_executor import model_loader

from tests.unit.adaptors.test_readers import LOADED, MOVED, Model, Where, order_of
from vllm_ascend_eplb.adaptors.readers import MovedExpertsError, guard_model
from vllm_ascend_eplb.adaptors.refusals import SHARING_FORMATS
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.fit import refuse_vllms_own
from vllm_ascend_eplb.settings.messages import EplbConfigError


def test_every_load_format_of_vllm_is_known() -> None:
    """A format that a new vLLM adds shows here, so that a person decides whether it shares weights."""
    private = {
        "auto", "hf", "dummy", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt", "runai_streamer",
        "runai_streamer_sharded", "safetensors", "sharded_state", "tensorizer", "bitsandbytes", "gguf",
    }  # fmt: skip
    assert set(vars(model_loader)["_LOAD_FORMAT_TO_MODEL_LOADER"]) <= private | set(SHARING_FORMATS)


def test_vllms_real_defaults_are_accepted() -> None:
    config = EplbConfig.from_additional_config({"eplb_config": {"dynamic_eplb": True}})
    refuse_vllms_own(config, False, EPLBConfig())
    with pytest.raises(EplbConfigError, match="sets num_redundant_experts of"):
        refuse_vllms_own(config, False, EPLBConfig(num_redundant_experts=2))


def test_vllm_writes_no_file_of_moved_experts() -> None:
    """vLLM's own writer and its checksums, on a model that is guarded."""
    where, model = Where(MOVED), Model()
    guard_model(model, order_of(model, where))
    readers: list[Any] = [lambda: model_loader.ShardedStateLoader._filter_subtensors(model.state_dict())]
    try:
        from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    except ImportError:  # since 0.32
        pass
    else:
        readers.append(lambda: compute_tensor_digests(model))
    for read in readers:
        with pytest.raises(MovedExpertsError):
            read()
    where.placement = LOADED
    for read in readers:
        assert "language.experts.w13_weight" in read()
