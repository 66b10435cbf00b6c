# SPDX-License-Identifier: Apache-2.0
"""Payoff: whether a plan saves more time than it costs.

A plan saves milliseconds in every step until the next plan, and costs the time in which its experts are received and
copied into their slots. Transfers overlap with steps, so what is counted for them is an upper bound.
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
        receive: bytes/s that a rank receives; None where it is not known, then receiving costs nothing here.
        commit: bytes/s that a rank copies from staging into its slots; None likewise.
    """

    receive: float | None = None
    commit: float | None = None

    def milliseconds(self, received_bytes: npt.ArrayLike) -> float:
        """Until the busiest rank has its experts, of ``received_bytes`` [R], and has copied them into their slots."""
        most = float(np.asarray(received_bytes, dtype=np.float64).max(initial=0.0))
        return sum(1e3 * most / rate for rate in (self.receive, self.commit) if rate)


@dataclass(frozen=True)
class Payoff:
    """What a plan brings.

    Attributes:
        moe_ms: milliseconds of all MoE layers in an average step as things are; in no unit where ``cost_ms`` is 0
            because nothing was measured.
        saved_ms: of them that the plan saves in each step; negative where it makes steps longer.
        cost_ms: of carrying it out, once.
        steps: that are expected until the next plan.
    """

    moe_ms: float
    saved_ms: float
    cost_ms: float
    steps: float

    @property
    def saved_fraction(self) -> float:
        """Part of MoE time that is saved in every step, without what the plan costs."""
        return self.saved_ms / self.moe_ms if self.moe_ms > 0 else 0.0

    @property
    def net_ms(self) -> float:
        """What is saved until the next plan, after the cost of this one."""
        return self.saved_ms * self.steps - self.cost_ms

    @property
    def net_fraction(self) -> float:
        """The same as a fraction of MoE time until the next plan."""
        total = self.moe_ms * self.steps
        return self.net_ms / total if total > 0 else 0.0

    def pays(self, min_gain: float) -> bool:
        """Whether the plan is worth carrying out: it saves at least the fraction ``min_gain`` of MoE time, net, and it
        saves something at all."""
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
        cost: of a layer. traffic: of the window that the plan was made from.
        par_before, par_after: [L] as things are, and as the plan promises.
        slots: of a rank.
        move_ms: what carrying the plan out takes.
        steps: expected until the next plan.
    """
    before = float(traffic.layer_ms(cost, par_before, slots).sum())
    after = float(traffic.layer_ms(cost, par_after, slots).sum())
    return Payoff(before, before - after, move_ms if cost.in_milliseconds else 0.0, steps)
