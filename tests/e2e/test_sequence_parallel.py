# SPDX-License-Identifier: Apache-2.0
"""Tensor and data parallel together: every rank routes its own padded slice of its engine's tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .conftest import BUSY, prompts
from .in_step import assert_counted_once, assert_in_step
from .test_offline import assert_equal_every_turn

TOKENS = 24
TOP_K = 4


@pytest.fixture(scope="module")
def run(runs):
    """Two engines of two ranks. In turns, the prompts go to both, to the first, to the second, and to both again."""
    run = runs(
        "sequence parallel",
        ranks=2,
        eplb=BUSY,
        arguments={"data_parallel_size": 2, "enable_prefix_caching": False},
        parts=[None, 0, 1, None],
        probe=True,
        routing=True,
        prompts=prompts(6)[:2],
        cycles=10,
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-6000:]
    assert len(run.result["ranks"]) == 4
    return run.result


def test_tokens_equal_those_of_one_process(run, reference):
    stats = json.loads(run["ranks"][0]["stats"])
    assert stats["cycles_done"] >= 10
    assert stats["cycles_failed"] == 0
    assert_equal_every_turn(run["tokens"], [answer[:TOKENS] for answer in reference[:12]])


def test_every_pair_is_computed_once_with_the_right_weights(run):
    masks = [rank["masks"] for rank in run["ranks"]]
    assert len(masks[0]) > 1000
    for of_ranks in zip(*masks, strict=True):
        np.testing.assert_array_equal(np.sum(of_ranks, axis=0), 1)
    assert [rank["wrong_experts"] for rank in run["ranks"]] == [0] * 4


def test_every_pair_is_counted_once_despite_padding(run):
    """Every rank counts its own slice."""
    assert_counted_once(run["ranks"], run["computed"], TOP_K)
    assert sum(rank["padded_rows"] for rank in run["ranks"]) > 0


def test_ranks_stay_in_step_while_an_engine_is_idle(run):
    assert len(assert_in_step(run["ranks"], 2 * (TOKENS - 1))) > 150


def test_layers_that_route_tokens_of_all_ranks_are_refused(run):
    for before, gathered, monolithic, after in run["routing"]:
        assert before == after == ""
        assert "MoERunner gathers the tokens of all ranks before it routes them" in gathered
        assert "MoERunner routes inside of its kernel" in monolithic
