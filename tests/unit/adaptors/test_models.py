# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be balanced are refused from their class, by vLLM's own registry, before any worker starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_ascend_eplb.adaptors.vllm import models
from vllm_ascend_eplb.adaptors.vllm.models import implements, refuse_model, registered_class
from vllm_ascend_eplb.settings.messages import EplbConfigError

BALANCED = (
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "MixtralForCausalLM",
    "Llama4ForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3NextForCausalLM",
)
NOT_BALANCED = ("PhiMoEForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM", "OlmoeForCausalLM")


def served(architecture: str) -> Any:
    from vllm import ModelRegistry

    config = SimpleNamespace(
        architecture=architecture,
        registry=ModelRegistry,
        convert_type="none",
        runner_type="generate",
        model_impl="auto",
        hf_config=SimpleNamespace(),
    )
    return SimpleNamespace(model_config=config)


@pytest.mark.parametrize("architecture", BALANCED)
def test_model_with_the_protocol_is_accepted_at_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the sources: no process is started for them."""
    monkeypatch.setattr(models.subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    refuse_model(served(architecture))


@pytest.mark.parametrize("architecture", NOT_BALANCED)
def test_model_without_the_protocol_is_refused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(models, "ask_a_process", lambda module, name: bool(asked.append((module, name))))
    with pytest.raises(EplbConfigError) as raised:
        refuse_model(served(architecture))
    message = str(raised.value)
    assert architecture in message
    assert "MixtureOfExperts" in message
    assert "(allowed: " in message
    assert "leave eplb_config out" in message
    assert "\n" not in message
    assert asked == [registered_class(served(architecture).model_config)]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("PhiMoEForCausalLM", False), ("Qwen3MoeForCausalLM", True)],
)
def test_a_process_answers_from_the_real_class(architecture: str, expected: bool) -> None:
    found = registered_class(served(architecture).model_config)
    assert found is not None
    assert models.ask_a_process(*found) is expected


def test_class_that_cannot_be_asked_is_left_to_the_workers() -> None:
    assert models.ask_a_process("vllm.no_such_module", "Model")
    assert implements("vllm.no_such_module", "Model", lambda module, name: True)
    refuse_model(served("NoSuchModelForCausalLM"))
