# SPDX-License-Identifier: Apache-2.0
"""Models that cannot be balanced are refused before any worker starts, by their class in vLLM's own registry."""

from __future__ import annotations

import json
import subprocess
import sys
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
    """The sources of the class are enough: no process is started."""
    vllm_config = served(architecture)  # the first import of vLLM starts processes
    monkeypatch.setattr(models.subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    refuse_model(vllm_config)


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


NOWHERE = ("vllm.no_such_module", "Model")

EACH = """
import contextlib, io, json, sys, traceback
program, classes = json.loads(sys.argv[1])
for sys.argv[1:] in classes:
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            exec(program, {})
        except Exception:
            code = 1
    print("RESULT", json.dumps([sys.argv[1:], code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def processes() -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    """The output of the process that is asked about a class, by class. All are asked in one process, because importing
    vLLM takes 10 seconds."""
    classes = [registered_class(served(name).model_config) for name in (*NOT_BALANCED, *BALANCED[:3])]
    program = json.dumps([models.ASK, [*classes, NOWHERE]])
    done = subprocess.run(
        [sys.executable, "-c", EACH, program], capture_output=True, text=True, timeout=300, check=True
    )
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(answers) == len(classes) + 1, done.stderr[-2000:]
    return {tuple(pair): subprocess.CompletedProcess([], code, said, "") for pair, code, said in answers}


@pytest.fixture
def asked(processes: dict[tuple[str, ...], subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.subprocess, "run", lambda command, **_: processes[tuple(command[-2:])])


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("architecture", [*NOT_BALANCED, *BALANCED[:3]])
def test_process_answers_from_the_real_class(architecture: str) -> None:
    found = registered_class(served(architecture).model_config)
    assert found is not None
    assert models.ask_a_process(*found) is (architecture in BALANCED)


@pytest.mark.usefixtures("asked")
def test_class_that_cannot_be_imported_is_accepted() -> None:
    """The workers refuse it later if it cannot be balanced."""
    assert models.ask_a_process(*NOWHERE)
    assert implements("vllm.no_such_module", "Model", lambda module, name: True)
    refuse_model(served("NoSuchModelForCausalLM"))
