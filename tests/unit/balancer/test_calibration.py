# SPDX-License-Identifier: Apache-2.0
"""Calibration: synthetic ids have the wanted PAR, and the grid follows measured times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.balancer import calibration
from vllm_ascend_eplb.balancer.calibration import (
    CalibrationError,
    LayerRuns,
    calibrate,
    describe,
    synthetic_ids,
    time_shares,
)
from vllm_ascend_eplb.planning.payoff import MoveRates
from vllm_ascend_eplb.planning.threshold import PlanJudge
from vllm_ascend_eplb.values.step_cost import StepCost
from vllm_ascend_eplb.values.traffic import Traffic

RANKS, SLOTS, EXPERTS, TOP_K = 4, 9, 32, 4
CPU = torch.device("cpu")


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


def test_rows_follow_a_recorded_skew() -> None:
    skew = np.array([1.0] * 9 + [11.0])
    by_slot = np.bincount(synthetic_ids(4096, 8, 8, 32, 32, 1.0, 7, skew=skew).ravel(), minlength=256)
    assert len(set(np.round(np.log2(by_slot / by_slot.min())).tolist())) >= 3  # hot ones, and others by their rank
    assert (by_slot > 4 * np.median(by_slot)).mean() == pytest.approx(0.1, abs=0.06)
    plain = np.bincount(synthetic_ids(4096, 8, 8, 32, 32, 1.0, 7).ravel(), minlength=256)
    assert (plain > 4 * np.median(plain)).mean() < 0.04


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
            seconds = self.milliseconds(ids) / 1e3
            return lambda: self.run(len(ids), seconds)

        return LayerRuns("a machine that does not exist", TOP_K, sharers, most_rows, 2, prepare)

    def run(self, rows: int, seconds: float) -> None:
        """Two layers of so many seconds each."""
        self.now += 2 * seconds

    def calibrate(self, device: torch.device = CPU, **changes: int) -> StepCost:
        return calibrate(
            self.runs(**changes),
            num_ranks=RANKS,
            rank=0,
            slots_per_rank=SLOTS,
            num_experts=EXPERTS,
            group=None,
            device=device,
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


def test_a_placement_is_timed_by_its_own_counts(machine: _Machine) -> None:
    """A rank with twice the tokens takes twice as long where tokens count; where weights count, one with fewer slots in
    use is faster, which PAR cannot tell."""
    even = np.ones(RANKS * SLOTS)
    heavy, few_slots = even.copy(), even.copy()
    heavy[:SLOTS] = 3.0
    few_slots.reshape(RANKS, SLOTS)[:, 4:] = 0.0
    shares = np.array([part / part.sum() for part in (even, heavy, few_slots)])
    took = time_shares(
        machine.runs(), shares, [32, 1024], num_ranks=RANKS, rank=0, group=None, device=torch.device("cpu")
    )
    assert took[1, 1] / took[0, 1] == pytest.approx(2.0, rel=0.05)
    assert took[1, 0] == pytest.approx(took[0, 0], rel=0.05)
    assert took[2, 0] / took[0, 0] == pytest.approx(4 / 9, rel=0.05)
    assert took[0, 1] == pytest.approx(1024 * TOP_K * 0.001, rel=0.05)


def test_calibration_keeps_its_time(machine: _Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.calibrate().tokens[-1] == 1024  # the control: on a fast machine the largest steps fit
    slow = _Machine(reading=0.4, computing=0.1)
    monkeypatch.setattr(calibration, "time", slow)
    cost = slow.calibrate()
    assert slow.now < 2 * calibration.SECONDS
    assert 3 <= len(cost.tokens) < 8


class _Compiling(_Machine):
    """A machine that compiles a kernel in the first run of each number of rows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(reading=0.04, computing=0.001)
        self._seconds, self._compiled = seconds, set[int]()

    def run(self, rows: int, seconds: float) -> None:
        if rows not in self._compiled:
            self._compiled.add(rows)
            self.now += self._seconds
        super().run(rows, seconds)


@pytest.mark.parametrize("seconds", [1.0, 10.0])
def test_compiling_kernels_takes_nothing_from_the_grid(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A grid that ended before the largest steps would take what balancing saves there for what it saves in small
    ones."""
    machine = _Compiling(seconds)
    monkeypatch.setattr(calibration, "time", machine)
    cost = machine.calibrate()
    if seconds == 1.0:
        assert cost.tokens.tolist() == [1, 8, 32, 64, 128, 256, 512, 1024]
        assert cost.layer_ms(1024, 2.5, 8) > 2.4 * cost.layer_ms(1024, 1.0, 8)
    else:  # it is not waited for without end
        assert calibration.MOST_FIRST_SECONDS < machine.now < calibration.MOST_FIRST_SECONDS + 20
        assert 5 <= len(cost.tokens) <= 7
    assert cost.layer_ms(64, 1.0, 8) < 1.0  # no time of a compilation is in it


class _Gpu(_Machine):
    """A GPU that does not exist: the host launches a layer in a millisecond, and the device runs it when it has run all
    that was launched before."""

    def __init__(self, reading: float, computing: float) -> None:
        super().__init__(reading, computing)
        self._idle_from = 0.0

    def run(self, rows: int, seconds: float) -> None:
        for _ in range(2):  # layers
            self.now += 1e-3
            self.busy_for(seconds)

    def busy_for(self, seconds: float) -> None:
        self._idle_from = max(self._idle_from, self.now) + seconds

    def _sleep(self, cycles: int) -> None:
        self.busy_for(cycles / 2e9)

    def synchronize(self) -> None:
        self.now = max(self.now, self._idle_from)

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802, torch's name
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = max(self._idle_from, self.now)

        event.record = record
        event.query = lambda: self.now >= event.at
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.parametrize("most", [calibration.MOST_SLEEP, calibration.LEAST_SLEEP])
def test_small_steps_are_not_timed_by_their_launches(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The control: where the device waits for launches, imbalance seems to cost nothing."""
    gpu = _Gpu(reading=0.004, computing=0.0001)
    monkeypatch.setattr(calibration, "time", gpu)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    monkeypatch.setattr(calibration, "MOST_SLEEP", most)
    cost = gpu.calibrate(device=torch.device("cuda"))
    balanced, skewed = (float(cost.layer_ms(1, par, SLOTS)) for par in (1.0, cost.pars[-1]))
    if most == calibration.LEAST_SLEEP:
        assert skewed / balanced < 1.01
    else:
        ids = [synthetic_ids(RANKS, TOP_K, RANKS, SLOTS, SLOTS, par, 7) for par in (1.0, float(cost.pars[-1]))]
        exact = [gpu.milliseconds(torch.from_numpy(drawn)) for drawn in ids]
        assert exact[1] > 1.2 * exact[0]
        assert [balanced, skewed] == pytest.approx(exact, rel=0.2)  # times are made to rise with PAR and tokens


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


class _Busy(_Machine):
    """A machine that somebody else uses, too: any run may take much longer than by itself."""

    def __init__(self, seed: int, reading: float, computing: float) -> None:
        super().__init__(reading, computing)
        self._random = np.random.default_rng(seed)

    def milliseconds(self, ids: torch.Tensor) -> float:
        return super().milliseconds(ids) * (1.0 + float(self._random.exponential(0.5)))


def test_a_busy_machine_is_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, busy = _Machine(1.0, 0.001), _Busy(0, 1.0, 0.001)
    for machine in (quiet, busy):
        monkeypatch.setattr(calibration, "time", machine)
        machine.calibrate(most_rows=256)
    assert quiet.now < 1.5 * calibration.SECONDS < busy.now < 1.5 * calibration.PATIENCE * calibration.SECONDS


def test_noisy_start_leads_to_no_wrong_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imbalance costs nothing in these steps; a plan that halves the PAR is refused after every noisy start.

    The control: the same measurements taken for exact accept it after some.
    """
    wrong = 0
    for seed in range(10):
        busy = _Busy(seed, 1.0, 0.001)
        monkeypatch.setattr(calibration, "time", busy)
        cost = busy.calibrate(most_rows=256)
        for believed in (cost, replace(cost, noise=0.0)):
            judge = PlanJudge(0.01)
            judge.learn(believed, MoveRates(), SLOTS)
            judge.traffic, judge.steps = Traffic([1], [32]), 10_000
            accepted = not judge.refuses([2.5], [1.0])
            assert believed is not cost or not accepted, (seed, cost.noise)
            wrong += accepted
    assert wrong


def test_gains_beyond_the_noise_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = _Busy(1, 0.04, 0.05)
    monkeypatch.setattr(calibration, "time", busy)
    judge = PlanJudge(0.01)
    cost = busy.calibrate(most_rows=256)
    judge.learn(cost, MoveRates(), SLOTS)
    judge.traffic, judge.steps = Traffic([1], [64]), 10_000
    assert judge.refuses([2.5], [1.0]) == ""


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
