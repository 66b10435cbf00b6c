# SPDX-License-Identifier: Apache-2.0
"""Plans from a series of windows: as good as from the sum if the load is steady, better if hot experts alternate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loads import LoadGenerator
from benchmarks.placements import greedy_placement
from tests.unit.planning.planner_inputs import instances
from vllm_ascend_eplb.planning import forecast, plan
from vllm_ascend_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS = 8, 64, 8, 72


def window_pars(series, slots, num_ranks):
    """float64 [T, L]."""
    return np.array([Placement(slots, series.shape[2], num_ranks).par(window) for window in series])


def steady_load(seed):
    """(steady popularity [L, E], slots [L, P] made for another popularity)."""
    generator = LoadGenerator(LAYERS, EXPERTS, seed)
    slots = greedy_placement(generator.window().astype(np.float64), SLOTS, RANKS)
    generator.drift("hard")
    popularity = generator.window().astype(np.float64)
    return popularity / popularity.sum(axis=1, keepdims=True), slots


@pytest.mark.parametrize("steps", [[29] * 7 + [2], [30] * 8, [29, 2, 29, 29, 7, 27, 29, 29], [29, 29, 29, 7], [30, 1]])
@pytest.mark.parametrize("tokens_per_step", [20, 2000])
def test_series_of_a_steady_load_is_no_worse_than_its_sum(steps, tokens_per_step):
    """For windows of any length, with short windows at any position: PAR at most 0.003 higher, moves at most * 1.1."""
    for seed in range(4):
        popularity, slots = steady_load(seed)
        rng = np.random.default_rng(seed)
        series = np.array([rng.poisson(popularity * n * tokens_per_step * EXPERTS / 8) for n in steps])
        whole, made = plan(series.sum(axis=0), slots, RANKS), plan(series, slots, RANKS)
        par = [Placement(p.physical_to_logical, EXPERTS, RANKS).par(popularity).mean() for p in (whole, made)]
        assert par[1] <= par[0] + 0.003
        assert made.num_moves <= 1.1 * whole.num_moves + 1


def test_last_window_alone_is_worse_on_a_steady_load():
    """Negative control of the test above: a plan from the short last window alone is worse."""
    popularity, slots = steady_load(0)
    rng = np.random.default_rng(0)
    series = np.array([rng.poisson(popularity * n * 100) for n in [29] * 7 + [2]])
    whole, fragment = plan(series.sum(axis=0), slots, RANKS), plan(series[-1], slots, RANKS)
    par = [Placement(p.physical_to_logical, EXPERTS, RANKS).par(popularity).mean() for p in (whole, fragment)]
    assert par[1] > par[0] + 0.003


@pytest.mark.parametrize("windows", [4, 8, 16])
@pytest.mark.parametrize(("ranks", "slots"), [(8, 64), (8, 72), (16, 64)])
def test_experts_that_alternate_are_spread_over_ranks(windows, ranks, slots):
    """Half of the experts are hot in even windows, the other half in odd windows, so the sum of the windows is flat."""
    series = np.zeros((windows, 3, 64))
    series[::2, :, ::2] = series[1::2, :, 1::2] = 100.0
    start = np.tile((np.arange(slots) * 2 % 64 + np.arange(slots) * 2 // 64 % 2).astype(np.int32), (3, 1))
    assert window_pars(series, start, ranks).mean() > 1.7
    by_sum = plan(series.sum(axis=0), start, ranks).physical_to_logical
    assert window_pars(series, by_sum, ranks).mean() > 1.4, "the negative control: the sum is too flat to plan by"
    made = plan(series, start, ranks)
    made.check(Placement(start, 64, ranks))
    after = window_pars(series, made.physical_to_logical, ranks)
    assert after.mean() < 1.1
    np.testing.assert_allclose(made.par_after, after.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(made.p95_after, np.sort(after, axis=0)[int(np.ceil(0.95 * windows)) - 1], rtol=1e-9)
    assert (made.p95_after <= made.p95_before).all()


def test_alternating_kinds_of_traffic_are_both_balanced():
    generator = LoadGenerator(4, EXPERTS, 3)
    kinds = [generator.window()]
    generator.drift("hard")
    kinds.append(generator.window())
    rng = np.random.default_rng(0)
    series = np.array([rng.poisson(kinds[t % 2]) for t in range(12)])
    slots = greedy_placement(series.sum(axis=0).astype(np.float64), SLOTS, RANKS)
    for_sum, made = plan(series.sum(axis=0), slots, RANKS), plan(series, slots, RANKS)
    unseen = np.array([rng.poisson(kinds[t % 2]) for t in range(12)])
    par = [window_pars(unseen, p.physical_to_logical, RANKS).mean() for p in (for_sum, made)]
    assert par[1] < 1 + 0.5 * (par[0] - 1)
    assert made.num_moves < 0.5 * slots.size


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.5])
def test_windows_that_differ_by_chance_are_planned_by_sum(spread):
    """Large differences between windows that do not repeat are no pattern: half of the windows does not predict the
    other half."""
    popularity, slots = steady_load(1)
    noise = np.exp(np.random.default_rng(2).normal(0, spread, (16, LAYERS, EXPERTS)))
    series = popularity * noise * 1e6
    made, whole = plan(series, slots, RANKS), plan(series.sum(axis=0), slots, RANKS)
    same = [np.array_equal(a, b) for a, b in zip(made.physical_to_logical, whole.physical_to_logical, strict=True)]
    assert np.mean(same) >= 0.75


def test_hundred_windows_of_bursts_are_balanced_by_sum():
    """100 windows with independent bursts per slot: the plan balances their sum."""
    rng = np.random.default_rng(42)
    slots = np.stack([rng.permutation(np.r_[np.arange(256), rng.integers(0, 256, 32)]) for _ in range(6)])
    by_slot = (rng.random((100, 6, 288)) ** 10 * 999 + 1).astype(np.int64)
    series = np.zeros((100, 6, 256))
    for layer in range(6):
        np.add.at(series[:, layer], (slice(None), slots[layer]), by_slot[:, layer])
    made = plan(series, slots, 32)
    assert Placement(made.physical_to_logical, 256, 32).par(series.sum(axis=0)).mean() <= 1.03


@settings(max_examples=150, deadline=None)
@given(instances(), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_every_series_makes_a_valid_plan(instance, windows, seed):
    load, slots, num_ranks = instance
    rng = np.random.default_rng(seed)
    series = np.stack(
        [load * rng.choice([0.0, 0.1, 1.0, 3.0]) * rng.integers(0, 2, load.shape) for _ in range(windows)]
    )
    expected, variance = forecast(series)
    assert np.isfinite(expected).all()
    assert np.isfinite(variance).all()
    assert (variance >= 0).all()
    made = plan(series, slots, num_ranks)
    made.check(Placement(slots, load.shape[1], num_ranks))
    assert (made.par_after <= made.par_before * (1 + 1e-5)).all()
    again = plan(series, slots, num_ranks, threads=3)
    np.testing.assert_array_equal(again.moves, made.moves)


def test_windows_without_load_change_nothing():
    popularity, slots = steady_load(0)
    series = np.stack([popularity, np.zeros_like(popularity), popularity, np.zeros_like(popularity)])
    made, whole = plan(series, slots, RANKS), plan(popularity, slots, RANKS)
    np.testing.assert_array_equal(made.physical_to_logical, whole.physical_to_logical)
    assert plan(np.zeros((5, LAYERS, EXPERTS)), slots, RANKS).num_moves == 0


def parts(counts):
    """``counts`` [..., E] over their sums; zero without load."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-300)


def forecast_by_definition(series):
    """``forecast`` for one layer at a time, in plain loops: series [T, L, E] -> load and variance [L, E]."""
    windows, layers, experts = series.shape
    tokens = series.sum(axis=2)
    lengths = tokens.sum(axis=1)
    usual = np.median(lengths[lengths > 0])

    def first(end, span):
        wanted = 0.75 * span * usual
        return next((t for t in range(end - 1, -1, -1) if lengths[t:end].sum() >= wanted), 0)

    spans = [span for span in (1, 2, 4) if first(windows, span) > 0]
    tests = [t for t in range(max(1, windows - 5), windows) if lengths[t] > 0]
    begins = {t: [0, *(first(t, span) for span in spans)] for t in (*tests, windows)}
    telling = [t for t in tests if spans and begins[t][1] > 0]
    error = np.zeros((1 + len(spans), layers))
    for t in telling:
        for span, begin in enumerate(begins[t]):
            said = parts(series[begin:t].sum(axis=0))
            square = (parts(series[t]) - said) ** 2 / (said + 0.01 / experts)
            off = tokens[t] / usual * square.sum(axis=1)
            error[span] += off + off.mean()
    load, variance = np.zeros((2, layers, experts))
    for layer in range(layers):
        best = 1 if spans else 0
        if len(telling) > 1:
            scores = {
                span: error[span, layer] * (0.95 if span == 0 else 1.0) for span in range(len(error)) if span != 1
            }
            chosen = min(scores, key=lambda span: scores[span])
            if scores[chosen] < 0.85 * error[1, layer]:
                best = chosen
        total = np.sort(tokens[:, layer])[windows // 2] or tokens[:, layer].mean()
        expected = parts(series[begins[windows][best] :, layer].sum(axis=0))
        load[layer] = expected * total
        if best > 0:
            own = sum(
                tokens[t, layer]
                * (parts(series[t, layer]) - parts(series[begins[t][best] : t, layer].sum(axis=0))) ** 2
                for t in tests
            ) / max(tokens[tests, layer].sum(), 1e-300)
            square = expected**2
            variance[layer] = total**2 * (own + own.sum() / max(square.sum(), 1e-300) * square) / 2
    return load, variance


def test_forecast_is_that_of_its_definition():
    """Including windows and layers without load, fragments, and numbers of experts that do not fill a vector."""
    steady = drifting = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        windows, layers, experts = int(rng.integers(2, 12)), int(rng.integers(1, 5)), int(rng.integers(1, 30))
        truth = rng.gamma(0.5, 100.0, (layers, experts))
        series = np.zeros((windows, layers, experts))
        for t in range(windows):
            series[t] = rng.poisson(truth * rng.choice([0.1, 1.0, 1.0, 1.0]))
            truth = truth * np.exp(rng.normal(0, 0.5, truth.shape) * (seed % 3 == 0))
        if seed % 4 == 0:
            series[windows // 2] = series[:, 0] = 0.0
        if not series.any():
            continue
        found, wanted = forecast(series), forecast_by_definition(series)
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-9, atol=1e-9)
        drifting += found[1].any()
        steady += not found[1].any()
    assert steady > 10
    assert drifting > 10
    for bad in (-1.0, np.nan, np.inf):
        series[-1, -1, -1] = bad
        with pytest.raises(ValueError, match="finite and not negative"):
            forecast(series)


def test_forecast_uses_the_last_window_beside_a_huge_one():
    """The tokens of the last windows vanish in a sum with those of the first."""
    series = np.ones((3, 1, 3))
    series[0] = 1e30
    series[-1, 0, 0] = 4.0
    load, _ = forecast(series)
    np.testing.assert_allclose(parts(load), [[4 / 6, 1 / 6, 1 / 6]])


def test_layer_at_target_in_every_window_keeps_its_placement():
    """Also if some other layer drifts. Negative control: the drifting layers get moves."""
    popularity, slots = steady_load(5)
    slots = plan(popularity, slots, RANKS, target_par=1.005).physical_to_logical
    rng = np.random.default_rng(0)
    series = np.stack([popularity * 1e9] * 8).astype(np.int64)
    series[:, ::2] = series[:, ::2] * np.exp(np.cumsum(rng.normal(0, 0.3, series[:, ::2].shape), axis=0))
    for options in ({}, {"effort": "thorough", "rounds": 4}, {"max_moves": 30}):
        made = plan(series, slots, RANKS, **options)
        made.check(Placement(slots, EXPERTS, RANKS))
        moved = np.bincount(made.moves[:, 0], minlength=LAYERS)
        assert not moved[1::2].any()
        assert moved[::2].any()
        before = window_pars(series, slots, RANKS)
        np.testing.assert_allclose(made.p95_before, before.max(axis=0), rtol=1e-9)
        np.testing.assert_array_equal(made.p95_after[1::2], made.p95_before[1::2])
        np.testing.assert_allclose(
            made.p95_after, window_pars(series, made.physical_to_logical, RANKS).max(axis=0), rtol=1e-9
        )


def test_forecast_of_layers_at_rest_is_their_sum():
    rng = np.random.default_rng(1)
    series = np.exp(np.cumsum(rng.normal(0, 0.5, (8, 4, 16)), axis=0))
    at_rest = np.array([True, False, False, True])
    load, variance = forecast(series, at_rest)
    np.testing.assert_allclose(parts(load[at_rest]), parts(series.sum(axis=0))[at_rest], rtol=1e-9)
    assert not variance[at_rest].any()
    assert variance[~at_rest].any(axis=1).all()
    assert forecast(series)[1].any(axis=1).all()  # negative control: no layer is constant
