# SPDX-License-Identifier: Apache-2.0
"""Calibration: synthetic ids have the wanted PAR, and the grid follows measured times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.balancer import calibration
from vllm_ascend_eplb.balancer.calibration import CalibrationError, LayerRuns, calibrate, describe, synthetic_ids
from vllm_ascend_eplb.values.step_cost import StepCost

RANKS, SLOTS, EXPERTS, TOP_K = 4, 9, 32, 4


@settings(deadline=None)
@given(
    st.integers(2, 8), st.integers(1, 9), st.integers(1, 8), st.floats(1.0, 3.0), st.integers(0, 300), st.integers(0, 9)
)
def test_ids_are_distinct_and_make_the_par(
    ranks: int, used: int, top_k: int, par: float, rows: int, of_rows: int
) -> None:
    slots = used + 1
    top_k = min(top_k, used)
    par = min(par, ranks, used * ranks / top_k)
    ids = synthetic_ids(rows, top_k, ranks, slots, used, par, 7, of_rows)
    assert ids.shape == (rows, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert not (ids % slots == used).any()  # unused slots get no tokens
    by_rank = np.bincount(ids.ravel() // slots, minlength=ranks)
    rest = (ranks - par) / (ranks - 1)
    expected = rows * top_k / ranks * np.array([par, *[rest] * (ranks - 1)])
    assert (np.abs(by_rank - expected) <= used * 1.5 + 1).all()  # each slot's count is rounded


def test_rows_of_experts_are_as_skewed_as_real_ones() -> None:
    ids = synthetic_ids(4096, 8, 8, 32, 32, 1.0, 7)
    by_slot = np.bincount(ids.ravel(), minlength=256)
    assert 0.5 < np.log(by_slot).std() < 0.8
    even = np.bincount(ids.ravel() // 32, minlength=8)
    assert even.max() / even.mean() < 1.01


class _Machine:
    """A clock and a model of a machine: a layer takes the time to read the used slots or to compute the busiest rank's
    tokens, whichever is longer."""

    def __init__(self, reading: float, computing: float, fixed: float = 0.0) -> None:
        self.now = 0.0
        self._figures = reading, computing, fixed

    def perf_counter(self) -> float:
        return self.now

    def milliseconds(self, ids: torch.Tensor) -> float:
        reading, computing, fixed = self._figures
        flat = ids.numpy().ravel()
        by_rank = np.bincount(flat // SLOTS, minlength=RANKS)
        in_use = max(len(np.unique(flat[flat // SLOTS == rank])) for rank in range(RANKS))
        return fixed + max(reading * in_use, computing * float(by_rank.max()))

    def runs(self, most_rows: int = 4096, sharers: int = RANKS) -> LayerRuns:
        def prepare(ids: torch.Tensor) -> Callable[[], None]:
            seconds = 2 * self.milliseconds(ids) / 1e3  # two layers

            def run() -> None:
                self.now += seconds

            return run

        return LayerRuns("a machine that does not exist", TOP_K, sharers, most_rows, 2, prepare)

    def calibrate(self, **changes: int) -> StepCost:
        return calibrate(
            self.runs(**changes),
            num_ranks=RANKS,
            rank=0,
            slots_per_rank=SLOTS,
            num_experts=EXPERTS,
            group=None,
            device=torch.device("cpu"),
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> _Machine:
    clock = _Machine(reading=0.04, computing=0.001)
    monkeypatch.setattr(calibration, "time", clock)
    return clock


def test_grid_finds_where_tokens_begin_to_cost(machine: _Machine) -> None:
    """Reading 8 slots takes 0.32 ms, as long as computing 320 pairs of token and expert, or 80 tokens per rank."""
    cost = machine.calibrate()
    assert cost.origin == "measured"
    assert cost.tokens.tolist() == [1, 8, 32, 64, 128, 256, 512, 1024]
    assert cost.pars.tolist() == [1.0, 1.5, 2.5]
    assert cost.slots.tolist() == [8, 9]
    small, large = (cost.layer_ms(tokens, [1.0, 2.5], 8) for tokens in (32, 1024))
    assert small[1] / small[0] < 1.05
    assert 2.4 < large[1] / large[0] < 2.6
    assert np.isclose(cost.layer_ms(32, 1.0, 9) / cost.layer_ms(32, 1.0, 8), 9 / 8)
    assert np.isclose(large[0], 1024 * TOP_K * 0.001, rtol=0.02)


def test_calibration_keeps_its_time_limit(machine: _Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.calibrate().tokens[-1] == 1024  # the control: on a fast machine the largest steps fit
    slow = _Machine(reading=0.4, computing=0.1)
    monkeypatch.setattr(calibration, "time", slow)
    cost = slow.calibrate()
    assert slow.now < 2 * calibration.SECONDS
    assert 3 <= len(cost.tokens) < 8


def test_noise_is_the_difference_of_two_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = _Machine(0.04, 0.001)
    monkeypatch.setattr(calibration, "time", quiet)
    assert quiet.calibrate().noise <= 0.001
    random = np.random.default_rng(0)
    noisy = _Machine(0.04, 0.001)
    exact = noisy.milliseconds
    monkeypatch.setattr(noisy, "milliseconds", lambda ids: exact(ids) * float(random.uniform(1.0, 1.6)))
    monkeypatch.setattr(calibration, "time", noisy)
    assert noisy.calibrate().noise > 0.003


def test_small_batches_make_small_grids(machine: _Machine) -> None:
    assert machine.calibrate(most_rows=6).tokens.tolist() == [1]
    assert machine.calibrate(most_rows=6, sharers=1).tokens.tolist() == [1, 6]
    with pytest.raises(CalibrationError, match="max_num_batched_tokens"):
        machine.calibrate(most_rows=3)


def test_log_line_says_what_imbalance_costs(machine: _Machine) -> None:
    said = describe(machine.calibrate(), "EPLB: cost of an MoE layer")
    assert said.startswith("EPLB: cost of an MoE layer measured: at 64 tokens per rank PAR 2.5 costs ")
    assert ", at 1,024 1" in said
    assert "; 1 redundant slots per rank cost 12%" in said or "; 1 redundant slots per rank cost 13%" in said


def test_proportional_cost_is_described_too() -> None:
    assert "PAR 2 costs 100% of MoE time" in describe(StepCost.proportional(), "x")
