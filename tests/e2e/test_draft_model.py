# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine with a draft model that has experts: in the model's checkpoint (multi-token prediction), or in its
own (EAGLE). Two balancers move the experts of the model and of the draft model, and neither tokens nor draft tokens
change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_ascend_eplb.files.expert_map import read_expert_map, write_expert_map
from vllm_ascend_eplb.values.placement import Placement

from .conftest import BUSY, DRAFT_TOKENS, prompts
from .eagle3_model import write_eagle3_model
from .mla_model import write_eagle_draft, write_mla_model
from .mtp_model import write_mtp_model
from .test_offline import assert_equal_every_turn

pytestmark = pytest.mark.skipif(not DRAFT_TOKENS, reason="this vLLM cannot verify draft tokens on a CPU")
TOKENS = 40
SHAPES = {"mtp": (2, 1, 16), "eagle": (3, 1, 32)}
"""MoE layers of model and draft model, and their experts per layer."""


@pytest.fixture(scope="module", params=["mtp", "eagle"])
def asked(request, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return drafting(tmp_path_factory, request.param)


def drafting(tmp_path_factory: pytest.TempPathFactory, method: str = "mtp") -> dict[str, Any]:
    """The job of both engines, with one prompt at a time, so that their steps are equal, too."""
    folder = tmp_path_factory.mktemp(method)
    speculative = {"method": method, "num_speculative_tokens": 2}
    if method == "eagle":
        speculative["model"] = str(write_eagle_draft(folder / "draft"))
    write = write_mtp_model if method == "mtp" else write_mla_model
    return {
        "arguments": {
            "model": str(write(folder / "model")),
            "speculative_config": speculative,
            "enable_prefix_caching": False,
        },
        "drafter": True,
        "prompts": [[text] for batch in prompts(2) for text in batch],
        "max_tokens": TOKENS,
    }


@pytest.fixture(scope="module")
def plain(runs, asked):
    run = runs(f"plain with drafter {method(asked)}", reference=True, ranks=1, eplb=None, **asked)
    assert run.code == 0, run.log[-6000:]
    return run.result


@pytest.fixture(scope="module")
def plain_on_two(runs, asked, plain):
    """Two ranks without balancing. Latent attention differs from that of one rank on a CPU, where it rounds to
    bfloat16; all else does not."""
    if method(asked) == "mtp":
        return plain
    run = runs("plain with drafter on two", ranks=2, eplb=None, **asked)
    assert run.code == 0, run.log[-6000:]
    return run.result


@pytest.fixture(scope="module")
def drafted(runs, asked):
    run = runs(f"drafted {method(asked)}", ranks=2, eplb=BUSY, cycles=10, corrupt=True, **asked)
    assert run.code == 0, run.log[-6000:]
    return run.result


class Maps:
    """A start map of the model, or of the model and the draft model, for two ranks, and the file for the record."""

    def __init__(self, folder: Path, method: str, with_drafts: bool) -> None:
        rng = np.random.default_rng(5)
        self.layers, draft_layers, self.experts = SHAPES[method]
        self.all_layers = self.layers + draft_layers
        extra = [rng.choice(self.experts, 4, replace=False) for _ in range(self.all_layers)]
        rows = np.array([rng.permutation([*range(self.experts), *copies]) for copies in extra])
        if not with_drafts:
            rows[self.layers :] = Placement.initial(draft_layers, self.experts, 2, 4).physical_to_logical
        self.starts = self.digests(rows)
        self.given, self.recorded = folder / "given.json", folder / "recorded.json"
        write_expert_map(self.given, Placement(rows if with_drafts else rows[: self.layers], self.experts, 2))
        self.settings = {"expert_map_path": str(self.given), "expert_map_record_path": str(self.recorded)}

    def digests(self, rows: np.ndarray) -> list[int]:
        """The digests of both models' placements."""
        return [Placement(part, self.experts, 2).digest for part in (rows[: self.layers], rows[self.layers :])]

    def assert_followed_and_recorded(self, result: dict[str, Any]) -> None:
        for model, drafter in zip(result["ranks"], result["drafters"], strict=True):
            assert [model["initial"], drafter["initial"]] == self.starts
            assert model["digest"] != model["initial"]
            assert drafter["digest"] != drafter["initial"]
        recorded = read_expert_map(self.recorded, num_layers=self.all_layers, num_experts=self.experts, num_ranks=2)
        in_force = [result[models][0]["digest"] for models in ("ranks", "drafters")]
        assert self.digests(recorded.physical_to_logical) == in_force


@pytest.fixture(scope="module")
def maps(asked, tmp_path_factory: pytest.TempPathFactory) -> Maps:
    return Maps(tmp_path_factory.mktemp("maps"), method(asked), with_drafts=True)


@pytest.fixture(scope="module")
def drafted_in_parallel(runs, asked, maps):
    """Two data-parallel engines in turns, from a map. The idle one makes dummy batches, also with the draft model."""
    eplb = {**BUSY, **maps.settings}
    run = runs(f"drafted in parallel {method(asked)}", ranks=1, eplb=eplb, cycles=10, **in_parallel(asked))
    assert run.code == 0, run.log[-6000:]
    return run.result


def method(asked: dict[str, Any]) -> str:
    return str(asked["arguments"]["speculative_config"]["method"])


def in_parallel(asked: dict[str, Any]) -> dict[str, Any]:
    return {**asked, "arguments": {**asked["arguments"], "data_parallel_size": 2}, "parts": [0, 1]}


def test_tokens_and_draft_tokens_are_equal(drafted, plain_on_two):
    turns = len(drafted["tokens"]) // len(plain_on_two["tokens"])
    assert drafted["tokens"] == plain_on_two["tokens"] * turns
    for rank in drafted["drafters"]:
        assert rank["drafts"] == plain_on_two["drafters"][0]["drafts"] * turns
    assert len({tuple(draft) for step in plain_on_two["drafters"][0]["drafts"] for draft in step}) > 20


def test_experts_of_both_models_move(drafted):
    for stats in (json.loads(drafted["ranks"][0]["stats"]), json.loads(drafted["drafters"][0]["stats"])):
        assert stats["cycles_done"] >= 10
        assert stats["cycles_failed"] == 0
        assert stats["experts_moved"] > 100
    first, second = drafted["drafters"]
    assert (first["part"], first["digest"], first["step"]) == (second["part"], second["digest"], second["step"])
    assert first["part"] == "drafter"
    assert first["digest"] != drafted["ranks"][0]["digest"]
    assert first["step"] == drafted["ranks"][0]["step"]  # one step counter
    assert [rank["views"] for rank in drafted["ranks"]] == [True, True]


def test_draft_model_load_is_its_routers_own_choice(drafted):
    first, second = drafted["drafters"]
    loads, windows = np.array(first["loads"]), np.array(first["windows"])
    assert len(loads) >= 10
    np.testing.assert_array_equal(loads, windows[: len(loads)])
    assert loads.sum() > 0
    np.testing.assert_array_equal(np.array(second["windows"]), windows)  # the ranks route the same tokens
    assert second["loads"] == []


def assert_equal_drafts(drafts: list, expected: list) -> None:
    """Assert that steps have equal draft tokens. vLLM's V2 runner has none (-1) in a step now and then, whose result is
    not used."""
    assert len(drafts) == len(expected)
    both = [pair for pair in zip(drafts, expected, strict=True) if not any(-1 in row for rows in pair for row in rows)]
    assert len(both) > 0.95 * len(expected)
    for mine, theirs in both:
        assert mine == theirs


def test_data_parallel_engines_draft_the_same(drafted_in_parallel, plain):
    turns = len(drafted_in_parallel["tokens"]) // len(plain["tokens"])
    assert drafted_in_parallel["tokens"] == plain["tokens"] * turns
    first, second = drafted_in_parallel["drafters"]
    assert_equal_drafts(first["drafts"], plain["drafters"][0]["drafts"] * (turns - turns // 2))
    assert_equal_drafts(second["drafts"], plain["drafters"][0]["drafts"] * (turns // 2))
    for stats in (json.loads(drafted_in_parallel["ranks"][0]["stats"]), json.loads(first["stats"])):
        assert stats["cycles_done"] >= 10
        assert stats["cycles_failed"] == 0
    assert (first["digest"], first["step"]) == (second["digest"], second["step"])
    loads = np.array(first["loads"])
    windows = np.array(first["windows"]) + np.array(second["windows"])
    assert len(loads) >= 10
    np.testing.assert_array_equal(loads, windows[: len(loads)])


def test_maps_without_weights_change_draft_tokens(drafted, plain_on_two):
    """Negative control: only the draft model's maps are corrupted. The tokens stay right, because the model verifies
    every draft token."""
    assert drafted["corrupt_tokens"] == plain_on_two["tokens"]
    assert drafted["corrupt_drafts"] != plain_on_two["drafters"][0]["drafts"]


def test_models_start_from_one_map_and_are_recorded_in_one(drafted_in_parallel, maps):
    maps.assert_followed_and_recorded(drafted_in_parallel)


def test_model_starts_from_its_own_map_and_both_are_recorded(runs, asked, plain_on_two, tmp_path_factory):
    if method(asked) == "eagle":
        pytest.skip("tested with MTP")
    maps = Maps(tmp_path_factory.mktemp("map"), method(asked), with_drafts=False)
    run = runs("drafted from a map", ranks=2, eplb={**BUSY, **maps.settings}, cycles=3, **asked)
    assert run.code == 0, run.log[-6000:]
    maps.assert_followed_and_recorded(run.result)
    turns = len(run.result["tokens"]) // len(plain_on_two["tokens"])
    assert run.result["tokens"] == plain_on_two["tokens"] * turns
    assert run.result["drafters"][0]["drafts"] == plain_on_two["drafters"][0]["drafts"] * turns


def test_draft_model_without_experts_changes_nothing(runs, reference, tmp_path_factory):
    """EAGLE-3 with random weights for examples/tiny_moe, whose load includes the tokens that it rejects."""
    folder = tmp_path_factory.mktemp("eagle3") / "draft"
    write_eagle3_model(folder)
    speculative = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 2}
    run = runs(
        "eagle3",
        ranks=2,
        eplb=BUSY,
        probe=True,
        arguments={"speculative_config": speculative},
        prompts=prompts(6),
        cycles=10,
        max_tokens=48,
    )
    assert run.code == 0, run.log[-6000:]
    assert_equal_every_turn(run.result["tokens"], reference)
    for rank in run.result["ranks"]:
        assert (rank["failures"], rank["wrong_experts"]) == (0, 0)
    first = run.result["ranks"][0]
    assert json.loads(first["stats"])["cycles_done"] >= 10
    np.testing.assert_array_equal(first["loads"], first["windows"][: len(first["loads"])])
