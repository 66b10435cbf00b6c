# SPDX-License-Identifier: Apache-2.0
"""StepCost: checked, immutable, monotone between and beyond the points of the grid, and equal after a file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_ascend_eplb.values.step_cost import StepCost, StepCostError
from vllm_ascend_eplb.values.traffic import BUCKETS, LARGEST_PAR, Traffic, bucket_of

FLAT_THEN_STEEP = StepCost(
    tokens=[8, 64, 512],
    pars=[1.0, 2.0],
    slots=[8, 9],
    milliseconds=[[[0.30, 0.33], [0.30, 0.33]], [[0.30, 0.33], [0.36, 0.39]], [[0.80, 0.82], [1.60, 1.62]]],
)
"""Steps are bound by reading weights up to 8 tokens per rank, and by tokens from 512 on."""


@st.composite
def step_costs(draw: st.DrawFn) -> StepCost:
    """Any grid with noise of measurement: the points need not be monotone."""

    def axis(least: float, most: float, first: float | None = None) -> list[float]:
        values = draw(st.lists(st.floats(least, most), min_size=1, max_size=4, unique=True))
        return sorted({*values, first} if first is not None else values)

    tokens, pars, slots = axis(1, 5000), axis(1, 10, 1.0), axis(1, 16)
    shape = (len(tokens), len(pars), len(slots))
    return StepCost(
        tokens, pars, slots, draw(arrays(float, shape, elements=st.floats(0.001, 100))), draw(st.floats(0, 0.2))
    )


def test_grid_is_exact_at_points_and_linear_between() -> None:
    at = FLAT_THEN_STEEP.layer_ms([8, 64, 512, 36, 288], [1, 2, 2, 1.5, 1.0], 8)
    assert np.allclose(at, [0.30, 0.36, 1.60, 0.315, 0.55])
    assert np.allclose(FLAT_THEN_STEEP.layer_ms(64, 1.0, 8.5), 0.315)


def test_beyond_the_grid_the_busiest_rank_decides() -> None:
    ms = FLAT_THEN_STEEP.layer_ms
    assert np.isclose(ms(5120, 2.0, 8), 16.0)  # ten times the tokens, ten times as long
    assert np.isclose(ms(64, 4.0, 8), ms(128, 2.0, 8))  # twice the PAR is twice the tokens of the busiest rank
    assert np.isclose(ms(0.5, 1.0, 8), 0.30)
    assert np.isclose(ms(64, 0.9, 7), ms(64, 1.0, 8))
    assert np.isclose(ms(64, 1.0, 20), ms(64, 1.0, 9))


@given(step_costs(), st.data())
def test_more_tokens_or_par_or_slots_never_take_less(cost: StepCost, data: st.DataObject) -> None:
    def two(least: float, most: float) -> list[float]:
        return sorted(data.draw(st.tuples(st.floats(least, most), st.floats(least, most))))

    tokens, pars, slots = two(0, 20_000), two(1, 40), two(1, 32)
    low = cost.layer_ms(tokens[0], pars[0], slots[0])
    for raised in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        high = cost.layer_ms(tokens[raised[0]], pars[raised[1]], slots[raised[2]])
        assert high >= low * (1 - 1e-9) > 0


@given(step_costs())
def test_file_brings_the_same_value_back(cost: StepCost) -> None:
    assert StepCost.from_json(cost.to_json()) == cost
    assert hash(StepCost.from_json(cost.to_json())) == hash(cost)


def test_noise_that_falls_is_levelled_to_its_mean() -> None:
    cost = StepCost([1, 2, 4, 8], [1.0], [1], np.array([1.0, 4.0, 2.0, 5.0]).reshape(4, 1, 1))
    assert cost.milliseconds.ravel().tolist() == [1.0, 3.0, 3.0, 5.0]


def test_proportional_follows_the_busiest_rank_everywhere() -> None:
    cost = StepCost.proportional()
    assert not cost.in_milliseconds
    pars = np.array([1.0, 1.3, 2.5, 7.0])
    for tokens in (1, 1.5, 8, 4096):
        assert np.allclose(cost.layer_ms(tokens, pars, 3), tokens * pars)


def test_value_cannot_be_changed() -> None:
    given_grid = np.ones((1, 1, 1))
    cost = StepCost([1], [1], [1], given_grid)
    given_grid[0, 0, 0] = 9.0
    assert cost.layer_ms(1, 1, 1) == 1.0
    with pytest.raises(ValueError, match="read-only"):
        cost.milliseconds[0, 0, 0] = 2.0
    with pytest.raises(AttributeError):
        cost.noise = 0.5  # type: ignore[misc]


GOOD: dict[str, Any] = {"tokens": [1, 2], "pars": [1.0], "slots": [1], "milliseconds": [[[1.0]], [[2.0]]]}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tokens", [], "tokens"),
        ("tokens", [2, 1], "rising"),
        ("tokens", [0, 1], "tokens"),
        ("tokens", [1, float("nan")], "not finite"),
        ("tokens", "many", "tokens"),
        ("pars", [1.5], "must be 1"),
        ("pars", [0.5, 1.0], "pars"),
        ("slots", [0.5], "slots"),
        ("milliseconds", [[[1.0]]], "shape"),
        ("milliseconds", [[[1.0]], [[0.0]]], "> 0"),
        ("milliseconds", [[[1.0]], [[float("inf")]]], "not finite"),
        ("milliseconds", [[[1.0]], [2.0]], "milliseconds"),
        ("noise", -0.1, "noise"),
        ("noise", "no", "noise"),
        ("origin", "guessed", "origin"),
    ],
)
def test_bad_argument_is_named(name: str, value: object, said: str) -> None:
    StepCost(**GOOD)
    with pytest.raises(StepCostError, match=said):
        StepCost(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "something else"}, "kind"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"subject": 3}, "subject"),
        ({"milliseconds": None}, "milliseconds"),
        ({"tokens": {}}, "tokens"),
    ],
)
def test_file_of_another_kind_is_refused(change: dict[str, object], said: str) -> None:
    text = json.dumps({**StepCost(**GOOD).to_dict(), **change})
    with pytest.raises(StepCostError, match=said):
        StepCost.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"kind": 1}'])
def test_file_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StepCostError, match="not a step cost"):
        StepCost.from_json(text)


@given(st.text(max_size=40))
def test_any_text_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(StepCostError):
        StepCost.from_json(text)


def test_traffic_averages_steps_of_all_kinds() -> None:
    traffic = Traffic([3, 0, 1], [8, 64, 512])
    assert np.allclose(traffic.layer_ms(FLAT_THEN_STEEP, [1.0, 2.0], 8), [(3 * 0.30 + 0.80) / 4, (3 * 0.30 + 1.60) / 4])
    assert traffic.mean_tokens == (3 * 8 + 512) / 4
    assert Traffic([0], [8]).layer_ms(FLAT_THEN_STEEP, [1.0, 2.0], 8).tolist() == [0.0, 0.0]


def test_traffic_of_a_histogram_keeps_the_mean_of_a_bucket() -> None:
    traffic = Traffic.of_histogram([[2, 0, 4], [2000, 0, 15000]])
    assert traffic.steps.tolist() == [2, 0, 4]
    assert traffic.tokens.tolist() == [1, 0, 3.75]
    assert Traffic.of_histogram([[0, 0], [0, 0]]).mean_tokens == 1.0


@pytest.mark.parametrize(("steps", "tokens"), [([1, 2], [1]), ([-1], [1]), ([1], [float("nan")]), ([[1]], [[1]])])
def test_traffic_of_bad_numbers_is_refused(steps: Any, tokens: Any) -> None:
    with pytest.raises(StepCostError):
        Traffic(steps, tokens)


def test_par_that_costs_nothing_depends_on_the_traffic() -> None:
    """With 8 tokens per rank, a step is longer only beyond PAR 2, where the busiest rank has more than 16 tokens."""
    assert Traffic([1], [8]).par_within(FLAT_THEN_STEEP, 8, 0.01) > 2.0
    assert Traffic([1], [512]).par_within(FLAT_THEN_STEEP, 8, 0.01) < 1.02
    flat = StepCost([1], [1.0], [8], [[[0.3]]], noise=1.0)
    assert Traffic([1], [1]).par_within(flat, 8, 0.0) < LARGEST_PAR
    assert Traffic([1], [1]).par_within(StepCost.proportional(), 8, 0.0) == 1.0


@given(step_costs(), st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5000)), min_size=1, max_size=5))
def test_par_that_costs_nothing_is_the_largest(cost: StepCost, kinds: list[tuple[int, float]]) -> None:
    traffic = Traffic(*map(list, zip(*kinds, strict=True)))
    within = traffic.par_within(cost, 8, cost.noise)
    perfect, there, beyond = traffic.layer_ms(cost, [1.0, within, within * 1.01], 8)
    assert there <= perfect * (1 + cost.noise)
    assert beyond >= perfect * (1 + cost.noise) * (1 - 1e-9) or within * 1.01 > LARGEST_PAR


def test_buckets_are_powers_of_two() -> None:
    assert [bucket_of(tokens) for tokens in (0, 0.5, 1, 1.5, 2, 3, 4, 5, 16, 17)] == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert [bucket_of(tokens) for tokens in (16_384, 16_385, 1e9)] == [BUCKETS - 2, BUCKETS - 1, BUCKETS - 1]
