# SPDX-License-Identifier: Apache-2.0
"""A trainer updates the weights of a served model several times; every token is that of the weights in force."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from .conftest import BUSY, prompts
from .soak_judge import grown, growth

ROOT = Path(__file__).parents[2]

TOKENS = 16
FACTORS = [1.25, 1.0, 0.75, 1.25]
"""The updates, in this order: every expert's weights become those of the checkpoint times the factor."""

LEVELS = [1, 2, 1, 2]
"""The levels of sleep, in this order, before the updates."""


TURNS = int(os.environ.get("EPLB_SOAK_TURNS", "30"))
"""Turns of sleep and new weights in the soak, of which so many are taken as begin within SECONDS."""

SECONDS = float(os.environ.get("EPLB_SOAK_SECONDS", "1200"))

PROMPTS, SHORT = 4, 8
"""Prompts of the soak, and tokens per answer."""

ENGINES = {"weight_transfer_config": {"backend": "trainer"}, "enable_prefix_caching": False, "data_parallel_size": 2}
"""Arguments of two data-parallel engines."""


STAND_INS = """
import faulthandler
faulthandler.enable()
import importlib
from vllm_ascend_eplb.adaptors.post_import import after_import

after_import("vllm.v1.worker.cpu_worker", lambda _: importlib.import_module("allocator"))
after_import("vllm.distributed.weight_transfer.factory", lambda _: importlib.import_module("transfer_engine"))
"""
"""What all processes of the engines begin with; a process that crashes says where. The planner is one of them and must
not import vLLM: each planner that comes after a late one would be late, too."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The same prompts, sleeps and updates for all runs."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "sitecustomize.py").write_text(STAND_INS)
    return {
        "prompts": [[text for batch in prompts(2) for text in batch]],
        "max_tokens": TOKENS,
        "arguments": {**ENGINES, "data_parallel_size": 1},
        "sleeps": LEVELS,
        "updates": FACTORS,
        "paths": [str(folder)],
    }


@pytest.fixture(scope="module")
def alone(runs, job):
    """One process without expert parallelism."""
    run = runs("trained alone", reference=True, ranks=1, eplb=None, **job)
    assert run.code == 0, run.log[-6000:]
    return run


@pytest.fixture(scope="module", params=[pytest.param("ranks", marks=pytest.mark.soak), "engines"])
def trained(request, runs, job, alone):
    """Two ranks of one engine, or two data-parallel engines, that balance. Then vLLM pauses the engines, besides where
    they reload without requests."""
    more = {}
    if request.param == "engines":
        more = {"ranks": 1, "arguments": ENGINES, "reload": True, "under_way": [None, [0], None]}
    run = runs(f"trained {request.param}", **{**job, "ranks": 2, "eplb": BUSY, "probe": True, "cycles": 10, **more})
    assert run.code == 0, run.log[-6000:]
    assert json.loads(run.result["ranks"][0]["stats"])["cycles_done"] >= 10
    return run, alone


def repeated(answers, expected):
    """Whether ``answers`` are one or several turns of the expected ones."""
    turns = len(answers) // len(expected)
    return turns > 0 and answers == expected * turns


def test_tokens_are_those_of_the_new_weights(trained):
    """Negative control: different updates give different answers."""
    run, alone = trained
    expected = [update["tokens"] for update in alone.result["updates"]]
    for update, answers in zip(run.result["updates"], expected, strict=True):
        assert repeated(update["tokens"], answers)
    assert expected[0] == expected[3]
    assert len({str(tokens) for tokens in expected}) == 3
    before = alone.result["tokens"]
    assert expected[1] == before
    assert repeated(run.result["tokens"], before)


def test_tokens_after_sleep_are_the_same(trained):
    """During sleep memory is filled with ones, so tokens would differ if maps or weights were not restored."""
    run, alone = trained
    before = alone.result["tokens"]
    assert [sleep["tokens"] for sleep in alone.result["sleeps"]] == [before] * 4
    for level, sleep in zip(LEVELS, run.result["sleeps"], strict=True):
        assert repeated(sleep["tokens"], before)
        first, second = sleep["ranks"]
        assert first == second
        assert (first["placement"] == first["initial"]) is (level == 2)


def test_updates_find_experts_in_initial_slots(trained):
    """Experts moved before every update, and move again afterwards."""
    run, _ = trained
    cycles = [0]
    for update in run.result["updates"]:
        for rank in update["ranks"]:
            assert rank["placement"] == rank["initial"]
        cycles.append(update["ranks"][0]["cycle"])
    assert all(later > earlier for earlier, later in itertools.pairwise(cycles))
    ranks = run.result["ranks"]
    assert [rank["wrong_experts"] for rank in ranks] == [0, 0]
    assert ranks[0]["digest"] == ranks[1]["digest"] != run.result["updates"][0]["ranks"][0]["initial"]


def test_engines_reload_while_they_serve(trained):
    """Engines that are paused or have no requests reload together. If one engine is called alone under requests, while
    the other waits for it in a forward, both serve on."""
    run, alone = trained
    if not run.result["under_way"]:
        pytest.skip("one engine: its workers are always called together")
    before = alone.result["tokens"]
    first, refused, last = run.result["under_way"]
    for turn in (first, refused, last):
        assert turn["unfinished"] > 0
        assert repeated(turn["tokens"], before)
    for turn in (first, last):
        assert turn["error"] == ""
        assert [rank["placement"] for rank in turn["ranks"]] == [turn["ranks"][0]["initial"]] * 2
    assert "load_weights of the model changed nothing, because not all engines were called" in refused["error"]
    assert repeated(run.result["tokens_after"], before)
    for reload in run.result["reloads"]:
        assert reload["placement"] != reload["initial"] == reload["by_name"] == reload["placement_after"]
        assert reload["moved"] == 0


OFTEN = """
def listen_often(start):
    start.LISTEN_STEPS = 4

after_import("vllm_ascend_eplb.balancer.start", listen_often)
"""
"""For the soak: ranks look for orders so often that a turn is short."""


@pytest.mark.soak
def test_turns_of_sleep_and_new_weights_never_end(runs, job, alone, tmp_path):
    """As in reinforcement learning, with two engines. In every turn experts move, the engines sleep and take new
    weights, and the old placement is restored by an order. Negative control: new weights give other answers."""
    (tmp_path / "sitecustomize.py").write_text(STAND_INS + OFTEN)
    short = {
        "prompts": [job["prompts"][0][:PROMPTS]],
        "max_tokens": SHORT,
        "paths": [str(tmp_path), str(ROOT)],
    }
    arguments = {**ENGINES, "max_num_seqs": PROMPTS}
    run = runs(
        "trained again and again",
        **{**job, **short, "arguments": arguments, "sleeps": [], "turns": TURNS, "seconds": SECONDS},
        ranks=1,
        eplb={**BUSY, "transfer_buffer_experts": 512},  # one round
    )
    assert run.code == 0, run.log[-6000:]
    taken = run.result["turns"]
    assert 20 <= len(taken) <= TURNS

    answers = [[answer[:SHORT] for answer in update["tokens"][:PROMPTS]] for update in alone.result["updates"]]
    weights = list(itertools.islice(itertools.chain(answers[1:2], itertools.cycle(answers)), len(taken) + 1))
    assert all(old != new for number, (old, new) in enumerate(itertools.pairwise(weights)) if number % len(FACTORS))
    for turn, (old, new) in zip(taken, itertools.pairwise(weights), strict=True):
        assert repeated(turn["before"], old)
        assert repeated(turn["after"], new)

    for number, turn in enumerate(taken):
        moved, start = turn["moved"], turn["start"]
        assert moved[0] == moved[1] != start[0]
        assert turn["asleep"] == (start if number % 2 else moved)  # level 2 in every second turn
        assert turn["updated"] == start
        assert turn["restored"] == moved
    stats = json.loads(run.result["ranks"][0]["stats"])
    assert stats["cycles_done"] >= 2 * len(taken)
    assert stats["cycles_failed"] == 0
    assert grown(growth([turn["resources"] for turn in taken])) == []
