# SPDX-License-Identifier: Apache-2.0
"""What the next window's load will be, and how far it may be off, from the windows seen so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..values.placement import FloatArray

SPANS = (1, 2, 3, 4, 6, 8)
"""Numbers of last windows whose mean may serve as forecast."""


TESTED_WINDOWS = 8
"""The spans are compared on at most this many of the last windows."""


CLEARLY_BETTER = 0.75
"""A longer span must bring the error below this part of the last window's: an average lags behind drift, but halves the
error where the windows differ by noise only."""


def forecast(series: npt.NDArray[np.float64]) -> tuple[FloatArray, FloatArray]:
    """The expected load of the next window and its variance.

    Each layer takes the mean of its last k windows, k chosen by back-testing on the windows given: the k whose
    forecasts of the layer's distribution over experts had the least error, squared and divided by the forecast (the
    hotter an expert, the more replicas share its error). The variance of an expert's load is half its own mean squared
    error in the back-test and half the layer's, in proportion to the squared load. Of two windows the last is the
    forecast and their difference the error; of one the variance is zero.

    Args:
        series: float64 [T, L, E], oldest window first, not negative.

    Returns:
        (load [L, E] in tokens of the last window's total, variance [L, E] in the same unit squared)
    """
    totals = series.sum(axis=2, keepdims=True)
    parts = np.divide(series, totals, out=np.zeros_like(series), where=totals > 0)
    num_windows = len(parts)
    if num_windows == 1:
        return series[0], np.zeros_like(series[0])
    sums = np.concatenate([np.zeros_like(parts[:1]), np.cumsum(parts, axis=0)])
    tested = np.arange(max(1, num_windows - TESTED_WINDOWS), num_windows)
    spans = [k for k in SPANS if k == 1 or (k <= tested[0] and len(tested) > 1)]
    # By span: what it would have said for each tested window, how far off that was, and what it says for the next.
    said = [(sums[tested] - sums[tested - k]) / k for k in spans]
    off = [(parts[tested] - each) ** 2 for each in said]
    floor = 0.01 / parts.shape[2]
    error = np.array([(o / (each + floor)).sum(axis=(0, 2)) for o, each in zip(off, said, strict=True)])  # [spans, L]
    error[1:] /= CLEARLY_BETTER
    best = error.argmin(axis=0)  # [L]
    layers = np.arange(parts.shape[1])
    expected = np.array([(sums[-1] - sums[num_windows - k]) / k for k in spans])[best, layers]
    own = np.array([o.mean(axis=0) for o in off])[best, layers]
    square = expected**2
    relative = own.sum(axis=1, keepdims=True) / np.maximum(square.sum(axis=1, keepdims=True), 1e-300)
    variance = 0.5 * own + 0.5 * relative * square
    total = totals[-1]
    return expected * total, variance * total**2
