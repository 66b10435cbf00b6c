# SPDX-License-Identifier: Apache-2.0
"""Advice before serving: it differs for decode and prefill, it includes memory, and wrong input is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ascend_eplb.cli.app import app
from vllm_ascend_eplb.simulate.advice import AdviceError, advised, choices, read_sizes
from vllm_ascend_eplb.simulate.cost import MACHINES, CostModel

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


def cost(tokens: float, ranks: int = 32) -> CostModel:
    return CostModel(MACHINES["h200"], read_sizes(DEEPSEEK, "config.json").shape, ranks, 1, tokens, 2.0)


def test_sizes_are_those_of_the_model() -> None:
    sizes = read_sizes(DEEPSEEK, "config.json")
    shape = sizes.shape
    assert (shape.num_layers, shape.num_experts, shape.top_k, shape.width) == (58, 256, 8, 2048)
    assert sizes.kv_bytes == 2 * 576 * 61
    grouped = {**DEEPSEEK, "kv_lora_rank": None, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
    assert read_sizes({"text_config": grouped}, "config.json").kv_bytes == 2 * 2 * 4 * 128 * 61


def test_advice_differs_for_decode_and_prefill() -> None:
    sizes = read_sizes(DEEPSEEK, "config.json")
    decode, why = advised(choices(sizes, cost(4)))
    assert decode is None
    assert "leave balancing off" in why
    found = choices(sizes, cost(4096))
    prefill, why = advised(found)
    assert prefill is not None
    assert prefill.saved > 0.2
    assert prefill.redundant in (0, 32, 64)
    assert [choice.redundant for choice in found] == [0, 32, 64]


def test_redundant_slots_take_memory_from_the_cache() -> None:
    sizes = read_sizes(DEEPSEEK, "config.json")
    none, single, two = choices(sizes, cost(64))
    assert none.memory == 0
    assert single.memory == pytest.approx(58 * sizes.shape.expert_bytes(2.0))
    assert two.kv_tokens == pytest.approx(2 * single.kv_tokens, abs=1)
    assert single.kv_tokens == int(single.memory / sizes.kv_bytes)


def test_choices_begin_with_the_fewest_possible_slots() -> None:
    """256 experts cannot be shared evenly by 144 ranks, so the first choice has 32 redundant experts, not 0."""
    assert choices(read_sizes(DEEPSEEK, "x"), cost(64, 144))[0].redundant == 32
    with pytest.raises(AdviceError, match="needs 2"):
        choices(read_sizes(DEEPSEEK, "x"), cost(64, 1))


def test_doctor_shows_the_advice_for_both_stages(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    command = ["doctor", "--model", str(tmp_path), "--ranks", "32", "--machine", "h200"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.output.count("Advice: ") == 2
    done = CliRunner().invoke(app, [*command, "--tokens-per-step", "512", "--json"])
    (answer,) = json.loads(done.output)
    assert answer["tokens_per_rank"] == 512
    assert len(answer["choices"]) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--ranks"),
        (["--ranks", "1"], "needs 2"),
        (["--ranks", "32", "--machine", "abacus"], "allowed are a2"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    done = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("text", ["[]", "{}", '{"num_hidden_layers": 4, "hidden_size": 8}', "no JSON"])
def test_model_without_experts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    done = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), "--ranks", "2"])
    assert done.exit_code == 2
    assert "config.json" in done.output
