# SPDX-License-Identifier: Apache-2.0
"""A multimodal model with experts in its language part. The tests use text only, because images need torchvision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.values.placement import Placement

from .conftest import BUSY
from .offline import MODEL

pytestmark = pytest.mark.soak

TOKENS = 24
STANDINS = Path(__file__).parents[1] / "npu" / "standins"
"""The folder of a stand-in for torchvision, whose functions are imported but never called."""

TEXT = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 256,
}


def make_model(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Write a checkpoint with random weights in the layout of published ones, and return the answers without vLLM."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=4090,
        video_token_id=4091,
        vision_start_token_id=4092,
        vision_end_token_id=4093,
        tie_word_embeddings=True,
    )
    model = Qwen3VLMoeForConditionalGeneration(config).float().eval()
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    for name in weights:
        if ".mlp.experts." in name:  # all experts of a layer; transformers writes them transposed
            weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(ids, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
        answers.append(done[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The checkpoint's folder, the prompts, and the model's answers."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(10, 4000, size=length).tolist() for length in (5, 12, 23, 31)]
    return folder, prompts, make_model(folder, prompts)


def serve(runs, model, name, redundant, cycles=6, corrupt=False, **settings):
    folder, prompts, _ = model
    return runs(
        name,
        spawned=True,  # a process looks for torchvision only once
        ranks=2,
        eplb={**BUSY, "num_redundant_experts": redundant, **settings},
        arguments={"model": str(folder), "language_model_only": True},
        paths=[str(STANDINS)],
        probe=True,
        corrupt=corrupt,
        prompts=[[{"prompt_token_ids": prompt} for prompt in prompts]],
        cycles=cycles,
        max_tokens=TOKENS,
    )


def check(run, expected, cycles):
    """Assert that tokens are equal in every turn, and that slots and loads are those that the routers chose."""
    assert run.code == 0, run.log[-6000:]
    turns = len(run.result["tokens"]) // len(expected)
    assert run.result["tokens"] == expected * turns
    assert len({token for answer in expected for token in answer}) > 10
    stats = json.loads(run.result["ranks"][0]["stats"])
    assert stats["cycles_done"] >= cycles
    assert stats["experts_moved"] > 0
    assert [rank["wrong_experts"] for rank in run.result["ranks"]] == [0, 0]
    assert run.result["ranks"][0]["counted"] == run.result["ranks"][0]["routed"]


def test_text_of_a_multimodal_model_stays_the_same(runs, model):
    check(serve(runs, model, "multimodal", 0), model[2], 6)


def test_experts_in_one_tensor_have_copies(runs, model):
    """The checkpoint has all experts of a layer in one tensor. vLLM's own loader does not fill the slots of copies from
    it. Negative control: maps switched without weights."""
    run, expected = serve(runs, model, "copies", 4, cycles=10, corrupt=True), model[2]
    check(run, expected, 10)
    assert run.result["corrupt_tokens"] != expected


def test_experts_in_one_tensor_are_loaded_by_a_map(runs, model, tmp_path):
    """A server in mode observe has the map's placement; a second server starts from the map and moves experts."""
    rng = np.random.default_rng(7)
    rows = [rng.permutation([*range(16), *rng.choice(16, 4, replace=False)]) for _ in range(2)]
    placement = Placement(np.array(rows), 16, 2)
    write_expert_map(tmp_path / "map.json", placement)
    given = {"expert_map_path": str(tmp_path / "map.json")}
    observed = serve(runs, model, "observed map", 4, cycles=0, mode="observe", **given)
    assert observed.code == 0, observed.log[-6000:]
    assert [rank["digest"] for rank in observed.result["ranks"]] == [placement.digest] * 2
    assert observed.result["tokens"] == model[2]
    check(serve(runs, model, "map", 4, cycles=10, **given), model[2], 10)
