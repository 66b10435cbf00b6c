# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the planner's tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import Plan

LOAD_KINDS = ("counts", "ties", "log-normal", "zeros", "one hot", "huge", "one layer empty")


def draw_load(kind: str, rng: np.random.Generator, num_layers: int, num_experts: int) -> npt.NDArray[Any]:
    """[L, E] of int64 or float64."""
    shape = (num_layers, num_experts)
    if kind == "counts":
        return rng.poisson(200 * np.exp(rng.normal(0, 0.7, shape)))
    if kind == "ties":
        return rng.integers(0, 3, shape)
    if kind == "log-normal":
        return np.exp(rng.normal(0, 1.5, shape))
    if kind == "zeros":
        return np.zeros(shape, dtype=np.int64)
    if kind == "one hot":
        load = np.zeros(shape, dtype=np.int64)
        load[np.arange(num_layers), rng.integers(0, num_experts, num_layers)] = 1000
        return load
    if kind == "huge":
        return rng.integers(2**52, 2**53, shape)
    load = rng.integers(0, 1000, shape)
    load[0] = 0
    return load


def draw_slots(
    rng: np.random.Generator, num_layers: int, num_experts: int, num_slots: int, empty: bool = False
) -> npt.NDArray[np.int32]:
    """int32 [L, P], a valid placement. An expert may have two copies on a rank; slots may be empty if ``empty``."""
    rows = [np.r_[np.arange(num_experts), rng.integers(-1 if empty else 0, num_experts, num_slots - num_experts)]
            for _ in range(num_layers)]  # fmt: skip
    return np.stack([rng.permutation(row) for row in rows]).astype(np.int32)


def after_every_group(made: Plan, placement: Placement) -> Iterator[Placement]:
    """The placements after the first group of a plan's moves, after the first two, and so on."""
    for _, rows in itertools.groupby(made.moves.tolist(), key=lambda row: row[3]):
        placement = placement.with_moves(list(rows))
        yield placement


@st.composite
def instances(
    draw: st.DrawFn, most_experts: int = 48, empty: bool = True
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int]:
    """(load [L, E], slots [L, P], num_ranks)"""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    num_experts = draw(st.integers(1, most_experts))
    per_rank = -(-num_experts // num_ranks) + draw(st.integers(0, 3))
    num_layers = draw(st.integers(1, 3))
    load = draw_load(draw(st.sampled_from(LOAD_KINDS)), rng, num_layers, num_experts)
    return load, draw_slots(rng, num_layers, num_experts, per_rank * num_ranks, empty), num_ranks
