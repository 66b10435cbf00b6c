# SPDX-License-Identifier: Apache-2.0
"""Payoff: whether a plan saves more time than it costs.

A plan saves milliseconds in every step until the next plan. It costs the time in which experts are received and copied
into their slots. Transfers overlap with steps, so this cost is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..values.step_cost import StepCost
from ..values.traffic import Traffic


@dataclass(frozen=True)
class MoveRates:
    """How fast experts travel.

    Attributes:
        receive: bytes/s that a rank receives; None if unknown: receiving then costs nothing.
        commit: bytes/s that a rank copies from staging into its slots; None if unknown: copying then costs nothing.
    """

    receive: float | None = None
    commit: float | None = None

    def milliseconds(self, received_bytes: npt.ArrayLike) -> float:
        """Time until the rank that receives most of ``received_bytes`` [R] has received and copied its experts."""
        most = float(np.asarray(received_bytes, dtype=np.float64).max(initial=0.0))
        return sum(1e3 * most / rate for rate in (self.receive, self.commit) if rate)


@dataclass(frozen=True)
class Payoff:
    """Gain and cost of a plan.

    Attributes:
        moe_ms: milliseconds of all MoE layers in an average step with the placement in force; without a unit if nothing
            was measured (``cost_ms`` is then 0).
        saved_ms: milliseconds of them that the plan saves in each step; negative if it makes steps longer.
        cost_ms: milliseconds that it takes to carry the plan out, once.
        steps: steps that are expected until the next plan.
    """

    moe_ms: float
    saved_ms: float
    cost_ms: float
    steps: float

    @property
    def saved_fraction(self) -> float:
        """Fraction of MoE time that is saved in every step, before the plan's cost."""
        return self.saved_ms / self.moe_ms if self.moe_ms > 0 else 0.0

    @property
    def net_ms(self) -> float:
        """Milliseconds saved until the next plan, less the cost of this one."""
        return self.saved_ms * self.steps - self.cost_ms

    @property
    def net_fraction(self) -> float:
        """The same as a fraction of MoE time until the next plan."""
        total = self.moe_ms * self.steps
        return self.net_ms / total if total > 0 else 0.0

    def pays(self, min_gain: float) -> bool:
        """Whether the plan is worth carrying out: it saves time at all, and at least the fraction ``min_gain`` of MoE
        time after its cost."""
        return self.saved_ms > 0 and self.net_ms >= 0 and self.net_fraction >= min_gain


def weigh(
    cost: StepCost,
    traffic: Traffic,
    par_before: npt.ArrayLike,
    par_after: npt.ArrayLike,
    slots: float,
    *,
    move_ms: float,
    steps: float,
) -> Payoff:
    """Weighs a plan.

    Args:
        cost: time of a layer.
        traffic: of the window that the plan was made from.
        par_before, par_after: PARs [L] with the placement in force, and after the plan.
        slots: slots of a rank.
        move_ms: milliseconds that it takes to carry the plan out.
        steps: steps expected until the next plan.
    """
    before = float(traffic.layer_ms(cost, par_before, slots).sum())
    after = float(traffic.layer_ms(cost, par_after, slots).sum())
    return Payoff(before, before - after, move_ms if cost.in_milliseconds else 0.0, steps)
