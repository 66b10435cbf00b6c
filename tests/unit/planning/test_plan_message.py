# SPDX-License-Identifier: Apache-2.0
"""Plan messages: a packed plan is unpacked unchanged, and other bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend_eplb.planning.message import HEAD_BYTES, digest_of, most_plan_bytes, pack_plan, unpack_plan
from vllm_ascend_eplb.planning.request import Dispatch
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.planning.shares import entry_counts
from vllm_ascend_eplb.routing.weighted import even_shares
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.plan import Plan
from vllm_ascend_eplb.values.rounds import Round, rounds_to_array
from vllm_ascend_eplb.values.topology import Topology

LAYERS, EXPERTS, RANKS, SLOTS, NUMBER = 3, 6, 2, 8, 7


def random_placement(rng: np.random.Generator) -> Placement:
    rows = [
        rng.permutation(np.r_[np.arange(EXPERTS), rng.integers(0, EXPERTS, SLOTS - EXPERTS)]) for _ in range(LAYERS)
    ]
    return Placement(np.array(rows), EXPERTS, RANKS)


def some_plan(seed: int, shares: bool) -> tuple[Placement, Placement, list[Round], Dispatch | None, bytes]:
    rng = np.random.default_rng(seed)
    start, target = random_placement(rng), random_placement(rng)
    moves = Plan.between(start, target.physical_to_logical, np.ones((LAYERS, EXPERTS))).moves
    rounds = schedule_rounds(start, moves, Topology.even(RANKS), 2)
    dispatch = None
    if shares:
        dispatch = Dispatch(entry_counts(target, even_shares(target), 16).astype(np.uint8), np.ones(LAYERS))
    message = pack_plan(NUMBER, target.physical_to_logical, rounds_to_array(rounds), dispatch)
    return start, target, rounds, dispatch, message


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_packed_message_is_unpacked_unchanged(seed: int, shares: bool) -> None:
    start, target, rounds, dispatch, message = some_plan(seed, shares)
    assert len(message) <= most_plan_bytes(start)
    got, to, counts = unpack_plan(message, NUMBER, start)
    assert to.digest == target.digest
    assert len(got) == len(rounds)
    for mine, theirs in zip(got, rounds, strict=True):
        np.testing.assert_array_equal(mine.moves, theirs.moves)
        assert (mine.number, mine.after) == (theirs.number, theirs.after)
    assert (counts is None) == (dispatch is None)
    if dispatch is not None:
        np.testing.assert_array_equal(counts, dispatch.counts)


@given(st.integers(0, 2**32 - 1), st.booleans(), st.data())
def test_damaged_plan_is_refused_or_has_another_digest(seed: int, shares: bool, data: st.DataObject) -> None:
    start, *_, message = some_plan(seed, shares)
    at = data.draw(st.integers(0, len(message) - 1))
    damaged = bytearray(message)
    damaged[at] ^= data.draw(st.integers(1, 255))
    assert digest_of(bytes(damaged)) != digest_of(message)
    try:
        unpack_plan(bytes(damaged), NUMBER, start)
    except ValueError:
        return
    assert at >= HEAD_BYTES  # a damaged head is always refused


@given(st.binary(max_size=400))
@example(b"")
@example(np.array([NUMBER, 2**62, 0], dtype="<i8").tobytes() + b"\0" * 200)
@example(np.array([NUMBER, -1, 0], dtype="<i8").tobytes() + b"\0" * 200)
def test_bytes_that_are_no_plan_are_refused(garbage: bytes) -> None:
    start = random_placement(np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"plan|placement|slot|expert|move|round|layer"):
        unpack_plan(garbage, NUMBER, start)


def test_plan_of_another_cycle_is_refused() -> None:
    start, *_, message = some_plan(3, shares=False)
    with pytest.raises(ValueError, match="the plan of cycle 7 arrived in cycle 8"):
        unpack_plan(message, NUMBER + 1, start)
