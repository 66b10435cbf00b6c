# SPDX-License-Identifier: Apache-2.0
"""Pipeline stages of several data-parallel engines: the ranks of a stage, one of each engine, share the experts of its
layers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .conftest import BUSY, prompts
from .in_step import assert_counted_once, assert_in_step
from .test_offline import assert_equal_every_turn, equal_tokens

pytestmark = pytest.mark.soak

TOKENS = 48
TOP_K, LAYERS = 4, 3
"""Experts per token, and layers of a stage."""


@pytest.fixture(scope="module")
def run(runs):
    """Two engines of two stages each. Turn by turn both, the first, the second and both of them get the prompts; in the
    end maps are switched without weights."""
    run = runs(
        "engines in stages",
        ranks=1,
        eplb=BUSY,
        arguments={"pipeline_parallel_size": 2, "data_parallel_size": 2, "enable_prefix_caching": False},
        parts=[None, 0, 1, None],
        probe=True,
        corrupt=True,
        prompts=prompts(6)[:2],
        cycles=10,
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-6000:]
    assert [rank["part"] for rank in run.result["ranks"]] == ["stage0", "stage1"] * 2
    return run.result


@pytest.fixture(scope="module")
def stages(run):
    """The ranks of each stage, in the order of the engines."""
    return run["ranks"][::2], run["ranks"][1::2]


def test_tokens_equal_those_of_one_process_whatever_moved(run, stages, reference):
    """Negative control: maps switched without weights."""
    for first, _ in stages:
        stats = json.loads(first["stats"])
        assert stats["cycles_done"] >= 10
        assert stats["experts_moved"] > 10 * LAYERS * 64 / 2
        assert stats["cycles_failed"] == 0
        assert [rank["rank"] for rank in stats["ranks"]] == [0, 1]
    assert_equal_every_turn(run["tokens"], reference[:12])
    equal, total = equal_tokens(run["corrupt_tokens"], reference[:12])
    assert equal < total


def test_every_pair_is_computed_once_with_the_right_weights(stages):
    for first, second in stages:
        assert len(first["masks"]) > 1000
        for mine, theirs in zip(first["masks"], second["masks"], strict=True):
            np.testing.assert_array_equal(np.array(mine) + np.array(theirs), 1)
        assert [first["wrong_experts"], second["wrong_experts"]] == [0, 0]


def test_each_stage_counts_the_tokens_of_all_engines_once(run, stages):
    loads = [assert_counted_once(ranks, run["computed"], TOP_K) for ranks in stages]
    assert loads[0].tolist() != loads[1].tolist()  # of other layers


def test_ranks_of_a_stage_stay_in_step_while_an_engine_is_idle(stages):
    for ranks in stages:
        assert_in_step(ranks, 2 * (TOKENS - 1))
