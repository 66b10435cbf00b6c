# SPDX-License-Identifier: Apache-2.0
"""Checks of the ranks of data-parallel engines: what they counted, and that they stay in step."""

from __future__ import annotations

import numpy as np


def assert_counted_once(ranks: list[dict], computed: int, top_k: int) -> np.ndarray:
    """Every rank counts the tokens that it routes itself, and together they count each computed token once. The load
    that the planner got, which is returned, is the sum of their windows."""
    for rank in ranks:
        assert rank["counted"] == rank["routed"]
        assert rank["counted"][0] > 0
    np.testing.assert_array_equal(np.sum([rank["counted"] for rank in ranks], axis=0), computed * top_k)
    loads = np.array(ranks[0]["loads"])
    assert len(loads) >= 10
    np.testing.assert_array_equal(loads, np.sum([rank["windows"] for rank in ranks], axis=0)[: len(loads)])
    return loads


def assert_one_rank_counts(ranks: list[dict]) -> np.ndarray:
    """Two ranks route the same tokens, and the load that the planner got is the routers' own choice by one of them.
    Windows differ, so that a constant cannot pass. Returns the load."""
    first, second = ranks
    loads, windows = np.array(first["loads"]), np.array(first["windows"])
    assert len(loads) >= 10
    np.testing.assert_array_equal(loads, windows[: len(loads)])
    assert len(set(loads.sum(axis=2).ravel().tolist())) > 1
    assert second["loads"] == []  # one planner
    np.testing.assert_array_equal(np.array(second["windows"]), windows)
    return loads


def assert_in_step(ranks: list[dict], turn: int) -> list:
    """All ranks did the same at every step, while each engine was idle for a turn of so many steps; returns their
    history."""
    history = ranks[0]["history"]
    assert all(rank["history"] == history for rank in ranks)
    assert [step for step, _, _ in history] == list(range(history[0][0], history[-1][0] + 1))
    assert len({placement for _, _, placement in history}) >= 10
    assert all(rank["idle"] >= turn for rank in ranks)
    return history
