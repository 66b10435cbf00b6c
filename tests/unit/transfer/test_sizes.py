# SPDX-License-Identifier: Apache-2.0
"""Sizes of a transfer: its parts under a budget, and the default staging buffer."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend_eplb.transfer.flight import CHUNK, cut_parts
from vllm_ascend_eplb.transfer.slots import default_buffer_experts


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 40_000)), max_size=12),
    st.integers(CHUNK, 5 * CHUNK),
)
def test_parts_keep_the_budget_and_lose_nothing(moves: list[tuple[int, int, int]], budget: int) -> None:
    sizes, ends = [size for _, _, size in moves], [(a, b) for a, b, _ in moves]
    parts = cut_parts(sizes, ends, 4, budget)
    seen: dict[int, int] = {}
    for part in parts:
        sent, received = [0] * 4, [0] * 4
        for move, start, end in part:
            assert start == seen.get(move, 0)
            assert end > start
            seen[move] = end
            if ends[move][0] != ends[move][1]:
                sent[ends[move][0]] += end - start
                received[ends[move][1]] += end - start
        assert max(sent + received) <= budget
    assert seen == dict(enumerate(sizes))


def test_the_default_buffer_lets_a_tenth_move_in_sixty_steps() -> None:
    assert default_buffer_experts(58, 9) == 2
    assert default_buffer_experts(4, 4) == 2
    for layers, per_rank, lag, buffers in ((58, 17, 1, 2), (94, 16, 2, 1), (61, 40, 1, 2)):
        size = default_buffer_experts(layers, per_rank, lag, buffers)
        rounds = np.ceil(layers * per_rank / 10 / size)
        assert rounds * (lag + 2) / buffers <= 60
