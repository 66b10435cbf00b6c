# SPDX-License-Identifier: Apache-2.0
"""The charts of the report draw the values at the right positions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images import pixels
from vllm_ascend_eplb.report.charts import (
    DIVERGING,
    SEQUENTIAL,
    Line,
    axis_of,
    bar_chart,
    colours,
    heat_map,
    line_chart,
    png,
)


def test_png_holds_the_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(png(image)), image)


def test_colours_run_from_end_to_end() -> None:
    ends = colours(np.array([-1.0, 0.0, 0.5, 1.0, 9.0, np.nan]), DIVERGING)
    assert tuple(ends[0]) == tuple(ends[1]) == DIVERGING[0][1]
    assert tuple(ends[2]) == DIVERGING[2][1]
    assert tuple(ends[3]) == tuple(ends[4]) == DIVERGING[-1][1]
    grey = colours(np.linspace(0, 1, 50), SEQUENTIAL).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) < 0).all()  # readable in grey print, too


def test_heat_map_says_its_range() -> None:
    text = heat_map([[0.5, 1.0], [1.0, 3.0]], "layers", "ranks", "load / mean", diverging=True)
    assert "smallest 0.50, largest 3.00" in text
    image = pixels(re.findall(r'src="(data:[^"]*)"', text)[0])
    np.testing.assert_array_equal(image[0, 1], DIVERGING[2][1])  # the mean is in the middle of the colours
    np.testing.assert_array_equal(image[1, 1], DIVERGING[-1][1])
    heat_map([[1.0]], "layers", "ranks", "load")


def test_line_chart_draws_values_at_their_heights() -> None:
    text = line_chart([Line("a", "s0", [1.0, None, 2.0]), Line("b", "s1", [1.5, 1.5, 1.5])], "cycle", "PAR", [7, 8, 9])
    paths = re.findall(r' d="([^"]*)"', text)
    assert paths[0].count("M") == 2  # a gap where there is no value
    assert paths[1].count("L") == 2
    tops = [float(y) for y in re.findall(r'cy="([\d.]+)"', text)]
    assert tops[1] < tops[2] < tops[0]  # 2.0 is above 1.5 is above 1.0
    assert "a, cycle 9: 2.000" in text


def test_long_series_have_few_tips() -> None:
    text = line_chart([Line("a", "s0", list(np.linspace(1, 2, 5000)))], "window", "PAR")
    assert text.count("<circle") <= 256
    assert text.count('class="num"') < 20


def test_bars_are_as_tall_as_their_values() -> None:
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', bar_chart([0.0, 5.0, 10.0], "x", "y"))]
    assert heights[0] == 0
    assert heights[2] == pytest.approx(2 * heights[1], rel=1e-2)
    bar_chart([0.0], "x", "y")


@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_axis_covers_the_values_with_few_ticks(least: float, spread: float) -> None:
    low, high, ticks = axis_of(least, least + spread)
    slack = 1e-6 * (high - low)
    assert low - slack <= least
    assert least + spread <= high + slack
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
