# SPDX-License-Identifier: Apache-2.0
"""A trainer updates the weights of a served model several times; every token is that of the weights in force."""

from __future__ import annotations

import itertools

import pytest

from .conftest import BUSY, prompts

TOKENS = 16
FACTORS = [1.25, 1.0, 0.75, 1.25]
"""The updates, in this order: every expert's weights become those of the checkpoint times the factor."""

LEVELS = [1, 2, 1, 2]
"""The levels of sleep, in this order, before the updates."""


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """The same updates in two runs: two ranks that balance, and one process without expert parallelism."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "sitecustomize.py").write_text("import allocator, transfer_engine\n")
    job = {
        "prompts": [[text for batch in prompts(2) for text in batch]],
        "max_tokens": TOKENS,
        "arguments": {"weight_transfer_config": {"backend": "trainer"}},
        "sleeps": LEVELS,
        "updates": FACTORS,
        "paths": [str(folder)],
    }
    alone = runs("trained alone", ranks=1, eplb=None, **job)
    assert alone.code == 0, alone.log[-6000:]
    run = runs("trained", ranks=2, eplb=BUSY, probe=True, cycles=10, **job)
    assert run.code == 0, run.log[-6000:]
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
