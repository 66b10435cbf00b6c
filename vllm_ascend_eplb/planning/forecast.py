# SPDX-License-Identifier: Apache-2.0
"""Forecast of the next window's load, with its variance, from the windows seen so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import FloatArray

SPANS = (1.0, 2.0, 4.0)
"""Lengths of the latest load that may serve as forecast, in windows of usual length; all of it is tried as well."""

TESTED_WINDOWS = 5
"""The spans are compared on at most this many of the last windows."""

WHOLE = 0.75
"""A span is long enough once it has this part of its tokens, because a series ends with a fragment of a window."""

CLEARLY_BETTER = 0.85
"""A longer span is taken only if its error is below this part of the shortest span's. An average lags behind a drift,
which the tested windows may not show yet; where windows differ by noise only, it halves the error."""

ALL_FIRST = 0.95
"""All windows are preferred to a part of them unless the errors differ by more: a smaller difference is chance."""


def forecast(series: npt.NDArray[np.float64]) -> tuple[FloatArray, FloatArray]:
    """The expected load of the next window and its variance.

    Each layer takes the latest window (a fragment together with the one before) unless back-testing finds more windows
    together clearly better. The error is that of a layer's distribution over experts: squared, divided by the forecast
    (the hotter an expert, the more replicas share its error), and weighted by the tokens of the forecast window, so
    that a fragment counts little. A layer's own error and the mean error of all layers decide in equal parts. A layer
    that is forecast best by all windows is assumed to be constant: its variance is zero. Elsewhere the variance of an
    expert's load is half its own mean squared error in the back-test and half the layer's, in proportion to the squared
    load.

    Args:
        series: float64 [T, L, E], oldest window first, not negative; windows may differ in length.

    Returns:
        (load [L, E] in tokens of a window of usual length, variance [L, E] in the same unit squared)
    """
    num_windows = len(series)
    if num_windows == 1:
        return series[0], np.zeros_like(series[0])
    tokens = series.sum(axis=2)  # [T, L]
    lengths = tokens.sum(axis=1)
    usual = float(np.median(lengths[lengths > 0])) if lengths.any() else 1.0
    sums = np.zeros((num_windows + 1, *series.shape[1:]))
    for t in range(num_windows):
        np.add(sums[t], series[t], out=sums[t + 1])
    before = np.concatenate([[0.0], np.cumsum(lengths)])

    def first(end: int, span: float) -> int:
        """The first window of the shortest span before ``end`` with enough tokens."""
        return max(0, int(np.searchsorted(before[: end + 1], before[end] - WHOLE * span * usual, side="right")) - 1)

    tested = [t for t in range(max(1, num_windows - TESTED_WINDOWS), num_windows) if lengths[t] > 0]
    spans = [span for span in SPANS if first(num_windows, span) > 0]

    def begins(end: int) -> list[int]:
        """The first window of all and of each span before ``end``."""
        return [0, *(first(end, span) for span in spans)]

    starts = np.array([begins(t) for t in tested], dtype=np.int32).reshape(len(tested), 1 + len(spans))
    errors = _planner.forecast_errors(series, np.array(tested, dtype=np.int32), starts)  # [tests, all and spans, L]
    errors *= (tokens[tested] / usual)[:, None]
    best = _best_span(errors)  # [L]
    taken = np.array(begins(num_windows))[best]
    expected = _parts(sums[-1] - sums[taken, np.arange(series.shape[1])])
    variance = np.zeros_like(expected)
    drifting = np.flatnonzero(best)
    if len(drifting):
        own = np.zeros((len(drifting), series.shape[2]))
        weight = tokens[tested][:, drifting].sum(axis=0)[:, None]
        for t, start in zip(tested, starts, strict=True):
            said = _parts(sums[t, drifting] - sums[start[best[drifting]], drifting])
            own += tokens[t, drifting][:, None] * (_parts(series[t, drifting]) - said) ** 2
        own /= np.maximum(weight, 1e-300)
        square = expected[drifting] ** 2
        relative = own.sum(axis=1, keepdims=True) / np.maximum(square.sum(axis=1, keepdims=True), 1e-300)
        variance[drifting] = 0.5 * own + 0.5 * relative * square
    total = np.sort(tokens, axis=0)[num_windows // 2][:, None]
    total = np.where(total > 0, total, tokens.mean(axis=0)[:, None])
    return expected * total, variance * total**2


def _best_span(errors: FloatArray) -> npt.NDArray[np.intp]:
    """The span [L] to take by its ``errors`` [tests, spans, L]: 1, the shortest, unless a longer is clearly better."""
    if errors.shape[1] == 1:
        return np.zeros(errors.shape[2], dtype=np.intp)
    if errors.size == 0:  # no window to test on, or no layer
        return np.ones(errors.shape[2], dtype=np.intp)
    errors = errors / np.maximum(errors[:, 0].mean(), 1e-300)
    errors += errors.mean(axis=2, keepdims=True)
    # Where the shortest span reaches back to the first window, a test tells nothing.
    telling = (errors[:, 1] != errors[:, 0])[:, None]
    error = (errors * telling).sum(axis=0)  # [spans, L]
    shortest = error[1]
    error[0] *= ALL_FIRST
    longer = np.where(np.arange(len(error)) == 1, np.inf, error.T).T
    best = longer.argmin(axis=0)
    clear = np.take_along_axis(longer, best[None], axis=0)[0] < CLEARLY_BETTER * shortest
    clear &= telling.sum(axis=0)[0] > 1  # a single test may be chance
    return np.asarray(np.where(clear, best, 1))


def _parts(counts: npt.NDArray[np.float64]) -> FloatArray:
    """``counts`` [L, E] over the layer's sum; zero where that is."""
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300))
