# SPDX-License-Identifier: Apache-2.0
"""Rounds: every round leaves a valid placement, keeps the buffer and overwrites no source; senders share the work."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loads import LoadGenerator
from benchmarks.placements import greedy_placement
from vllm_ascend_eplb.planning import plan
from vllm_ascend_eplb.planning.schedule import level_senders, schedule_rounds
from vllm_ascend_eplb.values.placement import EMPTY, Placement
from vllm_ascend_eplb.values.plan import EXPERT, GROUP, SLOT, Plan
from vllm_ascend_eplb.values.rounds import (
    SOURCE,
    Round,
    RoundError,
    check_rounds,
    receive_bound,
    rounds_from_array,
    rounds_to_array,
)
from vllm_ascend_eplb.values.topology import Topology


def random_placement(rng: np.random.Generator, layers: int, experts: int, ranks: int, slots: int) -> Placement:
    spare = ranks * slots - experts
    rows = [rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, spare)]) for _ in range(layers)]
    return Placement(np.array(rows), experts, ranks)


def moves_in_groups(rng: np.random.Generator, start: Placement, count: int) -> np.ndarray:
    """Rows (layer, slot, expert, group): copies into redundant slots and swaps, as the policy "incremental" makes."""
    slots, copies = start.physical_to_logical.copy(), start.replica_count.copy()
    rows: list[tuple[int, int, int, int]] = []
    for group in range(count):
        layer = int(rng.integers(start.num_layers))
        a, b = (int(slot) for slot in rng.integers(0, start.num_slots, 2))
        old, new = int(slots[layer, a]), int(slots[layer, b])
        if copies[layer, old] > 1 and old != new:
            rows.append((layer, a, new, group))
            copies[layer, old] -= 1
            copies[layer, new] += 1
            slots[layer, a] = new
        elif old != new:
            rows += [(layer, a, new, group), (layer, b, old, group)]
            slots[layer, a], slots[layer, b] = new, old
    return np.array(rows, dtype=np.int32).reshape(-1, 4)


def replay(start: Placement, rounds: list[Round], buffer_experts: int) -> np.ndarray:
    """Carry out the rounds, slot by slot: an oracle that shares no code with check_rounds.

    Transfers of round k may run from the commit of ``after`` to the commit of k. During that time every source must
    hold the expert and must not be written, and no destination may be written by another round.
    """
    history = [start.physical_to_logical.copy()]  # history[k]: before round k is committed
    size = start.slots_per_rank
    for number, round_ in enumerate(rounds):
        assert round_.number == number
        before = history[-1]
        after = before.copy()
        received = Counter()
        for layer, slot, expert, _, source in round_.moves.tolist():
            received[slot // size] += 1
            for then in range(round_.after + 1, number + 1):
                assert history[then][layer, source] == expert
                assert history[then][layer, slot] == before[layer, slot]
            assert after[layer, slot] == before[layer, slot], "a slot is written twice in a round"
            after[layer, slot] = expert
        assert max(received.values()) <= buffer_experts
        for layer in range(start.num_layers):
            assert set(range(start.num_experts)) <= set(after[layer].tolist())
        history.append(after)
    return history[-1]


shapes = st.tuples(
    st.integers(0, 2**32 - 1),  # seed
    st.integers(1, 4),  # layers
    st.integers(2, 6),  # ranks
    st.integers(1, 4),  # slots per rank
    st.floats(0, 1),  # redundancy
    st.integers(1, 4),  # buffer
    st.booleans(),  # overlap
)


def build(shape: tuple[int, int, int, int, float, int, bool]) -> tuple[np.random.Generator, Placement, Topology]:
    seed, layers, ranks, slots, redundancy, _, _ = shape
    rng = np.random.default_rng(seed)
    experts = max(1, round(ranks * slots * (1 - redundancy)))
    return rng, random_placement(rng, layers, experts, ranks, slots), Topology(tuple(rng.integers(0, 2, ranks)))


@given(shapes)
def test_any_change_of_a_placement_becomes_valid_rounds(shape: tuple[int, int, int, int, float, int, bool]) -> None:
    rng, start, topology = build(shape)
    target = random_placement(rng, start.num_layers, start.num_experts, start.num_ranks, start.slots_per_rank)
    plan = Plan.between(start, target.physical_to_logical, np.ones((start.num_layers, start.num_experts)))
    buffer, overlap = shape[5], shape[6]
    rounds = schedule_rounds(start, plan.moves, topology, buffer, overlap=overlap)
    assert np.array_equal(replay(start, rounds, buffer), target.physical_to_logical)
    check_rounds(start, rounds, buffer, target)


@given(shapes)
def test_groups_that_fit_stay_whole(shape: tuple[int, int, int, int, float, int, bool]) -> None:
    rng, start, topology = build(shape)
    moves = moves_in_groups(rng, start, 30)
    buffer = max(2, shape[5])
    rounds = schedule_rounds(start, moves, topology, buffer, overlap=shape[6])
    after = replay(start, rounds, buffer)
    expected = start.physical_to_logical.copy()
    for layer, slot, expert, _ in moves.tolist():
        expected[layer, slot] = expert
    assert np.array_equal(after, expected)
    round_of = {}
    for round_ in rounds:
        for group in round_.moves[:, GROUP].tolist():
            assert round_of.setdefault(group, round_.number) == round_.number


@given(shapes)
def test_packed_rounds_are_unpacked_unchanged(shape: tuple[int, int, int, int, float, int, bool]) -> None:
    rng, start, topology = build(shape)
    rounds = schedule_rounds(start, moves_in_groups(rng, start, 20), topology, 2)
    back = rounds_from_array(rounds_to_array(rounds), start.slots_per_rank)
    assert [(a.number, a.after, a.moves.tolist()) for a in rounds] == [
        (b.number, b.after, b.moves.tolist()) for b in back
    ]


def test_empty_slots_are_filled() -> None:
    start = Placement([[0, 1, 2, EMPTY]], 3, 2)
    rounds = schedule_rounds(start, np.array([[0, 3, 0, 0]]), Topology.even(2), 1)
    assert rounds[0].moves.tolist() == [[0, 3, 0, 0, 0]]


def test_slots_of_one_rank_swap_with_a_buffer_of_one() -> None:
    start = Placement([[0, 1, 2, 3]], 4, 2)
    moves = np.array([[0, 0, 1, 0], [0, 1, 0, 0]])
    rounds = schedule_rounds(start, moves, Topology.even(2), 1)
    assert replay(start, rounds, 1).tolist() == [[1, 0, 2, 3]]
    with pytest.raises(RoundError, match="staging buffer of 2"):
        schedule_rounds(Placement([[0, 1]], 2, 1), moves, Topology.even(1), 1)


def test_nearest_and_least_busy_rank_sends() -> None:
    # expert 0 lives on ranks 0 (node 0) and 2 (node 1); ranks 1 and 3 want it
    start = Placement([[0, 1, 2, 1, 0, 3, 3, 2]], 4, 4)
    moves = np.array([[0, 3, 0, 0], [0, 6, 0, 1]])
    (only_round,) = schedule_rounds(start, moves, Topology((0, 0, 1, 1)), 1)
    assert {int(row[SLOT]): int(row[SOURCE]) for row in only_round.moves} == {3: 0, 6: 4}


def test_expert_crosses_to_a_node_once_without_delay() -> None:
    # ranks 2 and 3 of node 1 want expert 0 of node 0; rank 0 keeps four rounds busy in any case
    start = Placement([[0, 1, 0, 1, 2, 3, 2, 3]] * 4, 4, 4)
    moves = np.array([[0, 4, 0, 0], [0, 7, 0, 1], *([layer, 0, 2, 2 + layer] for layer in range(4))])

    def crossings(relay: bool) -> tuple[int, int]:
        rounds = schedule_rounds(start, moves, Topology((0, 0, 1, 1)), 1, relay=relay)
        replay(start, rounds, 1)
        moved = np.concatenate([round_.moves for round_ in rounds])
        return int(((moved[:, EXPERT] == 0) & (moved[:, SOURCE] < 4)).sum()), len(rounds)

    assert crossings(relay=True) == (1, 4)
    assert crossings(relay=False) == (2, 4)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 12))
def test_senders_share_the_work_optimally(seed: int, ranks: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = [sorted({int(slot) for slot in rng.integers(0, ranks, rng.integers(1, 4))}) for _ in range(count)]
    chosen = level_senders(candidates, 1, ranks, [ranks] * count)
    assert all(source in allowed for source, allowed in zip(chosen, candidates, strict=True))
    busiest = max(Counter(chosen).values())
    # by Hall's theorem the optimum is the largest share that a set of ranks must carry
    needed = 0
    for subset in range(1, 1 << ranks):
        ranks_in = {rank for rank in range(ranks) if subset >> rank & 1}
        inside = sum(set(allowed) <= ranks_in for allowed in candidates)
        needed = max(needed, -(-inside // len(ranks_in)))
    assert busiest == needed


@pytest.mark.parametrize(("ranks", "slots"), [(32, 9), (64, 5), (128, 3)])
@pytest.mark.parametrize("kind", ["medium", "hard"])
def test_rounds_of_a_plan_are_near_the_bound(kind: str, ranks: int, slots: int) -> None:
    """Plans with few spare slots move last copies in long chains: a slot may be overwritten only once its expert stands
    elsewhere. A chain goes in one round."""
    generator = LoadGenerator(8, 256, seed=1)
    start = Placement(greedy_placement(generator.window().astype(float), ranks * slots, ranks), 256, ranks)
    generator.drift(kind)
    moves = plan(generator.window(), start, ranks).moves
    rounds = schedule_rounds(start, moves, Topology.even(ranks, ranks // 8), 2)
    bound = receive_bound(start, rounds, 2)
    assert bound <= len(rounds) <= max(bound + 1, 1.1 * bound)


@pytest.mark.parametrize(("ranks", "slots", "groups"), [(32, 9, 900), (64, 5, 2000)])
@pytest.mark.parametrize("buffer", [1, 2, 4])
def test_number_of_rounds_is_near_the_bound(buffer: int, ranks: int, slots: int, groups: int) -> None:
    rng = np.random.default_rng(3)
    start = random_placement(rng, 58, 256, ranks, slots)
    rounds = schedule_rounds(start, moves_in_groups(rng, start, groups), Topology.even(ranks, ranks // 8), buffer)
    bound = receive_bound(start, rounds, buffer)
    assert len(rounds) <= max(bound + 1, 1.1 * bound)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([[0, 9, 0, 0]], "slot 9"),
        ([[0, 0, 1, 1], [0, 1, 0, 0]], "ordered by group"),
        ([[0, 0, 1, 0]], "without a copy"),
        ([[0, 0, 1, 0], [0, 0, 2, 0]], "one slot twice"),
    ],
)
def test_bad_moves_are_refused(moves: list[list[int]], message: str) -> None:
    with pytest.raises(RoundError, match=message):
        schedule_rounds(Placement([[0, 1, 2, 3]], 4, 2), np.array(moves), Topology.even(2), 1)


def test_bad_arguments_are_refused() -> None:
    start = Placement([[0, 1, 2, 3]], 4, 2)
    nothing = np.zeros((0, 4), dtype=np.int32)
    assert schedule_rounds(start, nothing, Topology.even(2), 1) == []
    with pytest.raises(RoundError, match="at least 1"):
        schedule_rounds(start, nothing, Topology.even(2), 0)
    with pytest.raises(RoundError, match="3 ranks"):
        schedule_rounds(start, nothing, Topology.even(3), 1)


def bad_rounds() -> list[tuple[list[list[int]], int, str]]:
    return [
        ([[0, 0, 1, 0, 3]], NONE_AFTER, "holds expert"),
        ([[0, 0, 1, 0, 1]], NONE_AFTER, "without a copy"),
        ([[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]], NONE_AFTER, "needs 2 places"),
        ([[0, 0, 9, 0, 1]], NONE_AFTER, "out of range"),
        ([[0, 0, 1, 0, 1]], 3, "has number"),
    ]


NONE_AFTER = -1


@pytest.mark.parametrize(("moves", "after", "message"), bad_rounds())
def test_check_finds_bad_rounds(moves: list[list[int]], after: int, message: str) -> None:
    start = Placement([[0, 1, 2, 3]], 4, 2)
    with pytest.raises(RoundError, match=message):
        check_rounds(start, [Round(0, np.array(moves, dtype=np.int32), 2, after)], 1)


def test_check_finds_rounds_that_overlap_too_early() -> None:
    start = Placement([[0, 1, 0, 2]], 3, 2)
    first = Round(0, np.array([[0, 2, 1, 0, 1]], dtype=np.int32), 2)
    second = Round(1, np.array([[0, 1, 2, 1, 3]], dtype=np.int32), 2)
    check_rounds(start, [first, second], 1)
    late = Round(1, np.array([[0, 3, 1, 1, 2], [0, 0, 2, 1, 3]], dtype=np.int32), 2)
    with pytest.raises(RoundError, match="later than -1"):
        check_rounds(start, [first, late], 1)


def test_topology_is_checked() -> None:
    assert Topology.even(6, 2).node_of_rank == (0, 0, 0, 1, 1, 1)
    assert Topology((4, 4, 9)).num_nodes == 2
    for nodes, even in (((4, 4, 9, 9), 2), ((4, 4, 9), 1), ((0, 1, 0, 1), 1), ((0, 0, 0, 1), 1), ((0, 1, 2), 3)):
        assert Topology(nodes).num_blocks == even
    with pytest.raises(ValueError, match="evenly"):
        Topology.even(6, 4)
    with pytest.raises(ValueError, match="at least one rank"):
        Topology(())


def sends_by_receipt(start: Placement, rounds: list[Round]) -> Counter:
    """For every (layer, expert, rank): how often another rank sent the expert to that rank."""
    sent: Counter = Counter()
    for round_ in rounds:
        for layer, slot, expert, _, source in round_.moves.tolist():
            if slot // start.slots_per_rank != source // start.slots_per_rank:
                sent[layer, expert, slot // start.slots_per_rank] += 1
    return sent


@given(shapes, st.booleans())
def test_expert_twice_on_a_rank_is_sent_once(shape, nodes):
    """A layer changes as one group with many duplicates, as under the policy "default"."""
    rng = np.random.default_rng(shape[0])
    ranks, size = int(rng.integers(2, 7)), int(rng.integers(2, 6))
    experts = int(rng.integers(2, ranks * size // 2 + 2))
    start, target = (random_placement(rng, 2, experts, ranks, size) for _ in range(2))
    made = Plan.between(start, target.physical_to_logical, np.ones((2, experts)))
    topology = Topology.even(ranks, 2 if nodes and ranks % 2 == 0 else 1)
    for buffer in (1, 2, size):
        rounds = schedule_rounds(start, made.moves, topology, buffer)
        check_rounds(start, rounds, buffer, target)
        assert np.array_equal(replay(start, rounds, buffer), target.physical_to_logical)
        whole = buffer == size  # with a smaller buffer, a cut cycle may send an expert through other ranks
        if whole:
            assert max(sends_by_receipt(start, rounds).values(), default=0) <= 1


def test_second_copy_comes_from_the_rank_itself():
    start = Placement(np.array([[0, 1, 2, 3, 2, 1]]), 4, 3)
    target = Placement(np.array([[2, 2, 0, 3, 3, 1]]), 4, 3)
    made = Plan.between(start, target.physical_to_logical, np.ones((1, 4)))
    for buffer in (1, 2):
        rounds = schedule_rounds(start, made.moves, Topology.even(3), buffer)
        check_rounds(start, rounds, buffer, target)
        assert sends_by_receipt(start, rounds)[0, 2, 0] == 1
        assert sum(len(round_.moves) for round_ in rounds) >= 4
