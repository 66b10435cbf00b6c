# SPDX-License-Identifier: Apache-2.0
"""Forecast of the next window's load, with its variance, from the windows seen so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _planner
from ..values.placement import FloatArray


def forecast(
    series: npt.NDArray[np.float64], at_rest: npt.NDArray[np.bool_] | None = None
) -> tuple[FloatArray, FloatArray]:
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
        at_rest: bool [L], layers that keep their placement under every forecast. They are not tested: all windows are
            added up, and the mean error is that of the other layers. Default: none.

    Returns:
        (load [L, E] in tokens of a window of usual length, variance [L, E] in the same unit squared)
    """
    if len(series) == 1:
        return series[0], np.zeros_like(series[0])
    return _planner.forecast(series, np.zeros(series.shape[1], dtype=bool) if at_rest is None else at_rest)
