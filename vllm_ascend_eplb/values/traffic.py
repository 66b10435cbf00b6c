# SPDX-License-Identifier: Apache-2.0
"""Traffic: how many tokens the steps of a window had, as a small histogram that ranks can add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .step_cost import FloatArray, StepCost, StepCostError, array_of

BUCKETS = 16
"""Buckets of a histogram: up to 1, 2, 4, ... 16,384 tokens per rank, and more."""

THOUSANDTHS = 1000
"""Tokens per rank are summed in thousandths, because ranks that share a batch have fractions of tokens."""

LARGEST_PAR = 1024.0
"""PAR up to which ``par_within`` searches: as many ranks as the planner knows."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """How many steps there were by tokens per rank.

    Args:
        steps: [B] of each kind, not negative.
        tokens: [B] that each rank brings into a step of that kind, >= 0.

    Raises:
        StepCostError: shapes differ, or a number is negative or not finite.
    """

    steps: FloatArray
    tokens: FloatArray

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            array = array_of(name, getattr(self, name))
            if array.ndim != 1 or (array < 0).any() or array.shape != np.shape(self.steps):
                raise StepCostError(f"{name} has shape {array.shape}; allowed are as many numbers >= 0 in both")
            object.__setattr__(self, name, array)

    @classmethod
    def of_histogram(cls, histogram: npt.ArrayLike) -> Traffic:
        """From integers [2, B]: steps in each bucket, and the sum of their tokens per rank in thousandths. Without any
        step, one step with a single token is assumed."""
        steps, total = np.asarray(histogram, dtype=np.float64)
        if not steps.any():
            return cls(np.ones(1), np.ones(1))
        total = total / THOUSANDTHS
        return cls(steps, np.divide(total, steps, out=np.zeros_like(total), where=steps > 0))

    @property
    def mean_tokens(self) -> float:
        """Tokens per rank of an average step; 0 where there was none."""
        return float(self.steps @ self.tokens / max(self.steps.sum(), 1e-300))

    def layer_ms(self, cost: StepCost, par: npt.ArrayLike, slots: float) -> FloatArray:
        """float64 [...]: milliseconds of layers with PAR [...] in an average step; 0 where there was no step."""
        pars = np.asarray(par, dtype=np.float64)
        used = self.steps > 0
        if not used.any():
            return np.zeros(pars.shape)
        milliseconds = cost.layer_ms(self.tokens[used], pars[..., None], slots)
        return np.asarray(milliseconds @ (self.steps[used] / self.steps.sum()))

    def par_within(self, cost: StepCost, slots: float, more: float) -> float:
        """The largest PAR at which a layer takes at most the fraction ``more`` longer than with perfect balance."""
        pars = np.geomspace(1.0, LARGEST_PAR, 2049)
        ms = self.layer_ms(cost, pars, slots)
        return float(pars[ms <= ms[0] * (1.0 + more)][-1])


def bucket_of(tokens: float) -> int:
    """The bucket of a step with ``tokens`` per rank: at most 1, 2, 4, 8, ...; the last bucket has the rest."""
    return min(BUCKETS - 1, (math.ceil(max(tokens, 1.0)) - 1).bit_length())
