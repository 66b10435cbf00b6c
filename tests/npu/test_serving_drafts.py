# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend decodes with draft tokens (speculative decoding) and is balanced, on 2 ranks: the real
torch_npu on emulated CANN. In two servers draft tokens come from n-grams of the text, and from a draft model without
experts (EAGLE-3). In the others they come from a draft model in the checkpoint (MTP) that has experts, too. Tests run
in the order of this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_ascend_eplb.files.expert_map import read_expert_map, write_expert_map
from vllm_ascend_eplb.values.placement import Placement

from . import npus, serving
from .rows import rows_computed
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, freeze_weights_until_noticed, serve_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
MODEL_LAYERS = 2
"""MoE layers of the model; the draft model's layer comes after them."""
PARTS = ("", "drafter") if serving.SECOND_RUNNER else ()
"""The balancers' names: under the second runner the draft model has its own balancer."""
only_first = pytest.mark.skipif(serving.SECOND_RUNNER, reason="unsupported by the second model runner")


def drafting(speculative: dict[str, object]) -> tuple[str, str]:
    return "--speculative-config", json.dumps(speculative)


def check_load(server: NpuServer, layers: int, experts_per_token: int) -> None:
    """Assert that the planner's loads are the routers' own choices and include all scheduled tokens.

    Args:
        layers: MoE layers of the model, without the draft model's.
        experts_per_token: K.
    """
    first, second = server.call("probe_watched")
    for planning, routing in ((first, second), *zip(first["drafter"], second["drafter"], strict=True)):
        loads, windows = np.array(planning["loads"]), np.array(planning["windows"])
        assert len(loads) >= 10
        np.testing.assert_array_equal(loads, windows[: len(loads)])
        np.testing.assert_array_equal(np.array(routing["windows"]), windows)  # the ranks route the same tokens
    loads = np.array(first["loads"])
    scheduled = np.array(first["rows"])[: len(loads)]
    for layer in range(layers):
        np.testing.assert_array_equal(loads[:, layer].sum(axis=1), scheduled * experts_per_token)
    assert scheduled.sum() > 0


# --- draft tokens without experts: from n-grams, and from EAGLE-3 -----------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[pytest.param("ngram", marks=only_first), "eagle3"],
)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def drafting_server(method: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpuServer]:
    folder = tmp_path_factory.mktemp(method)
    if method == "ngram":
        arguments = drafting(NGRAM)
    else:
        serving.drafter_without_experts(folder / "drafter")
        arguments = drafting({"method": "eagle3", "model": str(folder / "drafter"), "num_speculative_tokens": 2})
    server = NpuServer(SETTINGS, folder, probe=True, arguments=arguments).started()
    server.call("probe_watch")
    yield server
    server.stop()


def test_drafting_keeps_tokens_while_experts_move(
    drafting_server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    assert "EPLB is on: " in drafting_server.log
    serve_until(drafting_server, batches, want, 10)
    stats = drafting_server.stats()
    assert stats is not None
    assert stats.cycles_failed == 0
    assert stats.experts_moved > 50


def test_load_counts_accepted_and_rejected_draft_tokens(drafting_server: NpuServer, method: str) -> None:
    drafted_tokens, right = (
        drafting_server.metric(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
    )
    assert (50 if method == "ngram" else 0) <= right < drafted_tokens - 50
    check_load(drafting_server, layers=6, experts_per_token=4)


def test_drafting_causes_no_race_and_no_wrong_order(drafting_server: NpuServer) -> None:
    assert not drafting_server.unexpected_races()[:3]


def test_weights_that_did_not_move_change_drafted_tokens(
    drafting_server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """Negative control. It runs last on this server, because it leaves wrong weights."""
    freeze_weights_until_noticed(drafting_server, batches, want)
    assert drafting_server.stop() == []


# --- a draft model in the model's checkpoint --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(batches: list[list[str]]) -> list[str]:
    """Prompts that are asked one at a time, so that steps are the same with and without balancing."""
    return [text for batch in batches for text in batch[:2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "model"
    serving.model_with_drafter(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: list[str]) -> list[list[int]]:
    """The answers of transformers, which ignores the draft model."""
    return serving.transformers_tokens(tmp_path_factory.mktemp("transformers"), prompts, TOKENS, model=model)


def ask(server: NpuServer, prompt: str, engine: int | None = None) -> tuple[list[int], list[object]]:
    """Ask for a prompt; returns the answer, and the draft tokens step by step (of the first engine, if there are
    several)."""
    (tokens,) = server.complete([prompt], TOKENS, engine)
    first, *rest = server.call("probe_drafts")
    assert all(rank == first for rank in rest)
    return tokens, first["drafts"]


def of_turn(drafts: list[list[object]], turn: int) -> list[object]:
    """The expected draft tokens of a turn. Under the second model runner, with and without balancing, draft tokens
    after the first of a step differ if the server was asked before."""
    prompts = len(drafts) // 2
    return drafts[turn % prompts + (prompts if turn >= prompts else 0)]


def freeze_draft_model_until_noticed(
    server: NpuServer,
    prompts: list[str],
    answers: list[list[int]],
    drafts: list[list[object]],
    engine: int | None = None,
) -> None:
    """The negative control: from now on the draft model's maps are switched but its weights stay, and draft tokens must
    differ. The model verifies every draft token, so tokens stay right."""
    assert set(server.call("probe_freeze_weights", MODEL_LAYERS)) == {"1"}
    for turn in range(40):
        number = turn % len(prompts)
        tokens, drafted_tokens = ask(server, prompts[number], engine)
        assert tokens == answers[number]
        if drafted_tokens not in drafts[number :: len(prompts)]:
            return
    raise AssertionError("all drafts are the same")


@pytest.fixture(scope="module")
def drafts(
    tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: list[str], answers: list[list[int]]
) -> list[list[object]]:
    """The draft tokens of a server without balancing: for all prompts, and for all prompts again."""
    folder = tmp_path_factory.mktemp("plain")
    server = NpuServer(None, folder, model=str(model), probe=True, arguments=drafting(MTP)).started()
    try:
        server.call("probe_watch")
        found = [ask(server, prompt) for prompt in prompts * 2]
    finally:
        server.stop()
    assert [tokens for tokens, _ in found] == answers * 2
    return [drafted_tokens for _, drafted_tokens in found]


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory, model: Path, drafts: list[list[object]]) -> Iterator[NpuServer]:
    """A balanced server with a draft model. It starts after the server without balancing has ended."""
    folder = tmp_path_factory.mktemp("drafted")
    server = NpuServer(SETTINGS, folder, model=str(model), probe=True, arguments=drafting(MTP), parts=PARTS).started()
    server.call("probe_watch")
    yield server
    server.stop()


def test_draft_model_keeps_tokens_and_draft_tokens(
    drafted: NpuServer, prompts: list[str], answers: list[list[int]], drafts: list[list[object]]
) -> None:
    start = np.array(drafted.call("probe_watched")[0]["placement"])
    assert len(start) == MODEL_LAYERS + 1
    changed = np.zeros(len(start), dtype=int)
    for turn in range(60):
        number = turn % len(prompts)
        assert ask(drafted, prompts[number]) == (answers[number], of_turn(drafts, turn))
        first, second = (np.array(rank["placement"]) for rank in drafted.call("probe_watched"))
        np.testing.assert_array_equal(first, second)
        changed += (first != start).any(axis=1)
        start = first
        if drafted.cycles_done() >= 10 and turn >= len(prompts):
            break
    stats = drafted.stats()
    assert stats is not None
    assert stats.cycles_done >= 10
    assert stats.cycles_failed == 0
    assert changed.min() >= 3, changed  # in each layer, the draft model's among them
    assert len({str(step) for prompt in drafts for step in prompt}) > 20


def test_draft_model_load_is_its_routers_own_choice(drafted: NpuServer) -> None:
    assert drafted.metric("vllm:spec_decode_num_draft_tokens_total") > 100
    check_load(drafted, layers=MODEL_LAYERS, experts_per_token=4)
    if not PARTS:  # windows of both are the same
        loads = np.array(drafted.call("probe_watched")[0]["loads"])
        assert (loads[:, MODEL_LAYERS].sum(axis=1) >= loads[:, 0].sum(axis=1)).all()  # once for all rows, and once more


def test_draft_model_causes_no_race_and_no_wrong_order(drafted: NpuServer) -> None:
    assert not drafted.unexpected_races()[:3]


def test_draft_weights_that_did_not_move_change_drafts(
    drafted: NpuServer, prompts: list[str], answers: list[list[int]], drafts: list[list[object]]
) -> None:
    """Negative control. It runs last on this server, because it leaves wrong weights."""
    freeze_draft_model_until_noticed(drafted, prompts, answers, drafts)
    assert drafted.stop() == []


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"device": "A3"}, id="A3: ranks route their own tokens"),
        pytest.param({"graphs": (3, 6, 12)}, id="captured graphs"),
    ],
)
def test_tokens_and_draft_tokens_are_equal_in_other_ways(
    tmp_path: Path,
    model: Path,
    prompts: list[str],
    answers: list[list[int]],
    drafts: list[list[object]],
    way: dict[str, Any],
) -> None:
    """A3, and captured graphs. The graphs are those of the model's steps that verify draft tokens. The first runner
    does not capture GLM's draft models. The second one does, unless it is told not to, as here: Triton's interpreter
    cannot be captured."""
    eager = {"enforce_eager": True} if serving.SECOND_RUNNER and "graphs" in way else {}
    arguments = drafting({**MTP, **eager})
    server = NpuServer(
        SETTINGS, tmp_path, model=str(model), probe=True, arguments=arguments, parts=PARTS, **way
    ).started()
    try:
        server.call("probe_watch")
        assert set(server.call("probe_replays")) == {"0"}
        verified = 0
        for turn in range(60):
            number = turn % len(prompts)
            assert ask(server, prompts[number]) == (answers[number], of_turn(drafts, turn))
            verified += len(drafts[number]) - 1  # the first step reads the prompt
            if server.cycles_done() >= 6:
                break
        stats = server.stats()
        assert stats is not None
        assert stats.cycles_done >= 6
        assert stats.cycles_failed == 0
        assert min(map(int, server.call("probe_replays"))) >= (0.9 * verified if "graphs" in way else 0)
        assert not server.unexpected_races()[:3]
        freeze_draft_model_until_noticed(server, prompts, answers, drafts)
    finally:
        server.stop()


@pytest.mark.parametrize("ranks", [1, 2], ids=["DP2", "DP2 TP2"])
def test_two_engines_share_experts_of_model_and_draft_model(
    tmp_path: Path, model: Path, prompts: list[str], answers: list[list[int]], drafts: list[list[object]], ranks: int
) -> None:
    """Two engines take turns: one answers while the other makes dummy batches. Then both answer at once. Only the first
    engine's draft tokens are compared."""
    arguments = ("--data-parallel-size", "2", *drafting(MTP))
    settings = {**SETTINGS, "num_redundant_experts": 2 * ranks}
    server = NpuServer(
        settings, tmp_path, ranks, model=str(model), probe=True, arguments=arguments, parts=PARTS
    ).started()
    try:
        server.call("probe_watch")
        start = np.array(server.call("probe_watched")[0]["placement"])
        changed = np.zeros(len(start), dtype=int)
        for turn in range(80):
            number, engine = turn % len(prompts), turn // len(prompts) % 2
            expected = answers[number], of_turn(drafts, turn) if engine == 0 else []
            assert ask(server, prompts[number], engine) == expected
            placement = np.array(server.call("probe_watched")[0]["placement"])
            changed += (placement != start).any(axis=1)
            start = placement
            if server.cycles_done() >= 10 and turn >= 2 * len(prompts):
                break
        assert server.complete(prompts, TOKENS) == answers
        stats = server.stats()
        assert stats is not None
        assert stats.cycles_done >= 10
        assert stats.cycles_failed == 0
        assert changed.min() >= 3, changed  # in each layer, the draft model's among them
        first, *_ = server.call("probe_watched")
        loads = np.array(first["loads"])
        np.testing.assert_array_equal(loads, np.array(first["windows"])[: len(loads)])
        computed = rows_computed(first["batches"][: len(loads)])
        for layer in range(MODEL_LAYERS):
            np.testing.assert_array_equal(loads[:, layer].sum(axis=1), computed * 4)
        assert not server.unexpected_races()[:3]
        freeze_draft_model_until_noticed(server, prompts, answers, drafts, engine=0)
    finally:
        server.stop()


def test_draft_model_follows_its_layers_of_a_map(
    tmp_path: Path, model: Path, prompts: list[str], answers: list[list[int]], drafts: list[list[object]]
) -> None:
    """A server starts from a map of the model alone. A second server starts from the map that the first recorded."""
    given, recorded = tmp_path / "given.json", tmp_path / "recorded.json"
    order = np.arange(16)[::-1]
    slots = np.concatenate([order[:8], order[8:9], order[8:], order[:1]]).astype(np.int32)
    write_expert_map(given, Placement(np.tile(slots, (MODEL_LAYERS, 1)), 16, 2))
    settings = {key: value for key, value in SETTINGS.items() if key != "num_redundant_experts"}

    def serve(folder: Path, placement: np.ndarray, **maps: str) -> None:
        folder.mkdir()
        arguments = drafting(MTP)
        server = NpuServer(
            {**settings, **maps}, folder, model=str(model), probe=True, arguments=arguments, parts=PARTS
        ).started()
        try:
            server.call("probe_watch")
            for worker in server.call("probe_watched"):
                assert len(worker["placement"]) == MODEL_LAYERS + 1
                np.testing.assert_array_equal(np.array(worker["placement"])[: len(placement)], placement)
            for turn in range(60):
                number = turn % len(prompts)
                assert ask(server, prompts[number]) == (answers[number], of_turn(drafts, turn))
                if server.cycles_done() >= 3 and turn >= len(prompts):
                    break
            stats = server.stats()
            assert stats is not None
            assert stats.cycles_done >= 3
            assert stats.cycles_failed == 0
        finally:
            server.stop()

    start = read_expert_map(given).physical_to_logical
    serve(tmp_path / "first", start, expert_map_path=str(given), expert_map_record_path=str(recorded))
    found = read_expert_map(recorded, allow_duplicates=True).physical_to_logical
    assert found.shape == (MODEL_LAYERS + 1, 18)
    assert (found[:MODEL_LAYERS] != start).any()
    serve(tmp_path / "second", found, expert_map_path=str(recorded))
