# SPDX-License-Identifier: Apache-2.0
"""The simulator counts what a server would do, and the parts of the cost model add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_ascend_eplb import Placement, plan
from vllm_ascend_eplb.files.traces import TraceError, read_trace
from vllm_ascend_eplb.simulate.cost import (
    COMPUTE_EFFICIENCY,
    KERNEL_SECONDS,
    LINK_EFFICIENCY,
    MACHINES,
    MEMORY_EFFICIENCY,
    MODELS,
    OVERLAP,
    CostModel,
    model_of_shape,
)
from vllm_ascend_eplb.simulate.replay import grid, receipts, replays, simulate
from vllm_ascend_eplb.simulate.result import Conditions, Setting, Simulation, SimulationError
from vllm_ascend_eplb.values.plan import Plan

TRACE = Path(__file__).resolve().parents[3] / "examples" / "tiny_moe" / "load_trace.npz"
TINY = model_of_shape(6, 64)
assert TINY is not None


def conditions(ranks: int = 8, nodes: int = 2, **changes: object) -> Conditions:
    cost = CostModel(MACHINES["a3"], TINY, ranks, nodes, 128.0, 2.0)  # type: ignore[arg-type]
    return Conditions(cost, **{"delay_steps": 0, "min_gain": 0.0, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trace() -> np.ndarray:
    return read_trace(TRACE).load[:24]


def test_par_is_that_of_the_next_window(trace: np.ndarray) -> None:
    """No window is balanced with its own load. The replay equals a server's steps, computed here by hand."""
    (outcome,) = simulate(trace, [Setting("incremental", 3, 8)], conditions()).outcomes
    placement, expected, moves = Placement.initial(6, 64, 8, 8), [], []
    for t, window in enumerate(trace):
        expected.append(placement.par(window).mean())
        moves.append(0)
        if (t + 1) % 3 == 0 and t + 1 < len(trace):
            made = plan(trace[t - 2 : t + 1].sum(axis=0), placement, 8, 2)
            moves[-1] = made.num_moves
            placement = Placement(made.physical_to_logical, 64, 8)
    np.testing.assert_allclose(outcome.par_mean, expected, atol=1e-5)
    assert list(outcome.moves) == moves
    assert sum(moves) > 0


def test_balancing_helps_and_moves_less_than_from_scratch(trace: np.ndarray) -> None:
    result = simulate(trace, grid(("none", "incremental", "default"), (2,), (8,)), conditions())
    by_policy = {outcome.policy: outcome for outcome in result.outcomes}
    assert by_policy["incremental"].mean_par < by_policy["none"].mean_par - 0.05
    assert by_policy["incremental"].total_moves < 0.3 * by_policy["default"].total_moves
    assert by_policy["none"].total_moves == by_policy["none"].cycles == 0
    assert result.best is not None
    assert result.best.policy != "none"
    assert [o.net_seconds for o in result.outcomes] == sorted((o.net_seconds for o in result.outcomes), reverse=True)


def test_plan_takes_effect_after_its_delay(trace: np.ndarray) -> None:
    def first_par(delay: int) -> float:
        (outcome,) = simulate(trace[:2], [Setting("incremental", 1, 8)], conditions(delay_steps=delay)).outcomes
        return outcome.par_mean[1]

    at_once, half, never = first_par(0), first_par(300), first_par(600)
    assert half == pytest.approx((at_once + never) / 2, abs=1e-4)
    start = Placement.initial(6, 64, 8, 8)
    assert never == pytest.approx(start.par(trace[1]).mean(), abs=1e-5)
    assert first_par(10**6) == never


def test_plan_that_gains_too_little_is_skipped(trace: np.ndarray) -> None:
    (outcome,) = simulate(trace, [Setting("incremental", 1, 8)], conditions(min_gain=0.9)).outcomes
    assert outcome.cycles == 0
    assert outcome.skipped == len(trace) - 1
    assert outcome.bytes_moved == outcome.receive_seconds == 0


def test_settings_with_and_without_shares_use_one_replay(trace: np.ndarray) -> None:
    settings = grid(("incremental",), (2,), (8,), (None,), (False, True))
    assert len(replays(settings)) == 1
    result = simulate(trace, settings, conditions())
    even, shared = sorted(result.outcomes, key=lambda outcome: outcome.shares)
    assert even.moves == shared.moves
    assert shared.par_mean != even.par_mean
    alone = simulate(trace, [Setting("incremental", 2, 8, None, True)], conditions()).outcomes[0]
    assert alone.par_mean == shared.par_mean


def test_shares_relieve_a_rank_without_moves() -> None:
    """Rank 0 has the hot expert 8 and the experts 0..7, which have a second copy on rank 7."""
    load = np.full((4, 6, 64), 100.0)
    load[:, :, 8] = 1000.0
    settings = [Setting("none", 1, 8, None, shares) for shares in (False, True)]
    par = {outcome.shares: outcome.par_mean for outcome in simulate(load, settings, conditions()).outcomes}
    mean = (63 * 100 + 1000) / 8
    np.testing.assert_allclose(par[False], 1400 / mean, atol=1e-4)
    np.testing.assert_allclose(par[True], [1400 / mean] + [1000 / mean] * 3, rtol=2e-3)  # known from window 1


def test_limit_of_moves_is_kept(trace: np.ndarray) -> None:
    (outcome,) = simulate(trace, [Setting("incremental", 1, 8, 5)], conditions()).outcomes
    assert 0 < max(outcome.moves) <= 5


def test_grid_leaves_out_equivalent_settings() -> None:
    settings = grid(("none", "incremental", "default"), (1, 2), (0, 8), (None, 10), (False, True))
    assert sum(s.policy == "none" and not s.shares for s in settings) == 2
    assert not any(s.shares and not s.redundant for s in settings)
    assert not any(s.policy == "default" and s.max_moves is not None for s in settings)
    assert len(set(settings)) == len(settings)


def test_receipts_by_hand() -> None:
    """4 ranks with three slots each on 2 nodes."""
    start = Placement([[0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 5, 3]], 8, 4)
    after = np.array([[0, 1, 7, 3, 4, 2, 6, 7, 6, 7, 5, 3]], dtype=np.int32)
    made = Plan.between(start, after, np.ones((1, 8)))
    near, far = receipts(made, start, 2)
    # rank 0 (node 0) takes expert 7, held by ranks 2 and 3 on node 1; rank 1 takes 2 from rank 0 of its node
    assert near.tolist() == [0, 1, 0, 0]
    assert far.tolist() == [1, 0, 0, 0]
    near, far = receipts(made, start, 1)
    assert near.tolist() == [1, 1, 0, 0]
    assert far.tolist() == [0, 0, 0, 0]
    twice = Plan.between(start, np.array([[0, 0, 2, 3, 4, 1, 6, 7, 6, 7, 5, 3]], dtype=np.int32), np.ones((1, 8)))
    near, far = receipts(twice, start, 2)
    assert near.tolist() == [0, 1, 0, 0]  # rank 0 copies expert 0 within itself


def test_cost_model_by_hand() -> None:
    shape, machine = MODELS[0], MACHINES["h200"]
    assert shape.expert_bytes(2.0) == pytest.approx(88.1e6, rel=1e-3)  # as published: 88 MB in bf16
    cost = CostModel(machine, shape, 16, 2, 128.0, 2.0)
    even = np.ones((1, 16 * 18))  # 128 tokens per rank, 1,024 pairs, 57 for each slot: half of a tile
    skewed = even.copy()
    skewed[0, :18] *= 2.0
    reading = 18 * shape.expert_bytes(2.0) / (machine.memory * MEMORY_EFFICIENCY)
    wire = 1024 * 4 * 7168 / LINK_EFFICIENCY * (0.5 / 50e9 + 0.5 / 450e9)
    computing = 18 * 128 * 6 * 7168 * 2048 / (machine.flops * COMPUTE_EFFICIENCY)
    both = (reading**OVERLAP + computing**OVERLAP) ** (1 / OVERLAP)
    (balanced,) = cost.layer_seconds(even)
    assert max(reading, computing) < both < reading + computing
    assert balanced == pytest.approx(KERNEL_SECONDS + both + wire)
    assert cost.layer_seconds(skewed)[0] > balanced
    assert cost.receive_seconds([2, 0], [0, 1]) == pytest.approx(
        max(2 / 450e9, 1 / 50e9) * shape.expert_bytes(2.0) / LINK_EFFICIENCY
    )
    assert cost.receive_seconds([], []) == cost.commit_seconds([]) == 0
    # while reading weights takes longest, balance saves nothing of it
    small = CostModel(machine, shape, 16, 1, 4.0, 2.0)
    small_even, small_skewed = (float(small.layer_seconds(load)[0]) for load in (even, skewed))
    assert small_skewed / small_even < 1.05 < cost.layer_seconds(skewed)[0] / balanced
    assert cost.layer_seconds(0 * even) == pytest.approx(balanced)  # a layer without load counts as even


def test_cost_model_reads_slots_not_their_sum() -> None:
    """Two placements with one PAR take different times: a slot without tokens is not read, a tile is computed whole."""
    cost = CostModel(MACHINES["h200"], MODELS[0], 2, 1, 8.0, 2.0)
    spread = np.array([[1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]])
    packed = np.array([[4.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]])
    slow, fast = (float(cost.layer_seconds(load)[0]) for load in (spread, packed))
    assert fast < 0.8 * slow


def test_interrupted_simulation_keeps_whole_outcomes(trace: np.ndarray) -> None:
    def stop_in_second(done: int, total: int) -> None:
        if done == len(trace) + 5:
            raise KeyboardInterrupt

    settings = [Setting("none"), Setting("incremental", 1, 8), Setting("default", 1, 8)]
    result = simulate(trace, settings, conditions(), progress=stop_in_second)
    assert result.interrupted
    assert [outcome.policy for outcome in result.outcomes] == ["none"]
    again = Simulation.from_json(result.to_json())
    assert again == result
    at_once = simulate(trace, settings, conditions(), progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert at_once.best is None
    assert at_once.eplb_config() is None
    assert Simulation.from_json(at_once.to_json()) == at_once


def test_impossible_settings_are_refused(trace: np.ndarray) -> None:
    with pytest.raises(SimulationError, match="7 redundant experts on 8 ranks"):
        simulate(trace, [Setting("incremental", 1, 7)], conditions())
    with pytest.raises(SimulationError, match=r"allows 1\.\.23"):
        simulate(trace, [Setting("incremental", 24, 8)], conditions())
    with pytest.raises(SimulationError, match="at least 2 windows"):
        simulate(trace[:1], [Setting()], conditions())
    for text in ("", "{}", "[]", '{"kind": "x"}', "NaN"):
        with pytest.raises(SimulationError, match="not a simulation"):
            Simulation.from_json(text)


def test_traces_of_every_form_are_read(tmp_path: Path) -> None:
    load = np.arange(24).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", load)
    np.savez(tmp_path / "b.npz", loads=load, other=np.zeros(2))
    np.savez(tmp_path / "c.npz", anything=load)
    (tmp_path / "d.json").write_text(json.dumps({"logical_count": load.tolist()}))
    (tmp_path / "e.json").write_text(json.dumps(load.tolist()))
    for name in ("a.npy", "b.npz", "c.npz", "d.json", "e.json"):
        np.testing.assert_array_equal(read_trace(tmp_path / name).load, load)
    np.save(tmp_path / "f.npy", np.concatenate([np.zeros((2, 4)), load[1]]))  # two dense layers
    found = read_trace(tmp_path / "f.npy")
    assert (found.num_windows, found.num_layers, found.num_experts, found.skipped_layers) == (1, 3, 4, 2)


def test_files_without_load_are_refused(tmp_path: Path) -> None:
    cases = {
        "zero": (np.zeros((2, 3, 4)), "no load in any layer"),
        "nan": (np.full((2, 3, 4), np.nan), "window 0, layer 0, expert 0 is nan"),
        "negative": (-np.ones((2, 3, 4)), "expert 0 is -1"),
        "flat": (np.ones(4), "expected"),
        "text": (np.array([["a"]]), "array of numbers"),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(TraceError, match=message):
            read_trace(tmp_path / f"{name}.npy")
    for text, message in (
        ('{"logical_count": [[1, 2], [3]]}', "does not hold a table of numbers"),
        ('{"logical_count": [["a"]]}', "does not hold a table of numbers"),
        ('{"physical_to_logical_map": [[0]]}', "JSON without load"),
        ('{"logical_count": {"0": 1}}', "does not hold a table of numbers"),
        ("[[1e400]]", "tokens are finite"),
        ("7", "expected"),
        ("[", "not JSON"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(TraceError, match=message):
            read_trace(tmp_path / "x.json")
    np.savez(tmp_path / "y.npz", a=np.ones(3), b=np.ones(3))
    with pytest.raises(TraceError, match="has no array load"):
        read_trace(tmp_path / "y.npz")
