# SPDX-License-Identifier: Apache-2.0
"""PlanJudge: decides whether a plan is worth its moves, and whether the last one was."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..values.placement import Placement
from ..values.step_cost import StepCost
from ..values.traffic import Traffic
from ..values.window import WindowLoad
from .payoff import MoveRates, Payoff, weigh

PAYS_FROM = 0.25
"""Part of the promised gain that a plan must bring in the next window; otherwise the threshold rises."""


LEAST_RAISED, MOST_RAISED = 0.005, 0.2
"""Least and largest raised threshold, as fractions of MoE time."""


LEFT_OVER = 0.1
"""Part of what perfect balance would save that a plan may leave, where that can be measured at all."""


EASES = 0.9
"""Factor on the threshold after a refused plan, so that a refused gain is tried again later."""


class PlanJudge:
    """Weighs plans on EP rank 0. A plan must save more than a threshold; plans that did not pay raise it for the next.

    Plans are weighed in time: milliseconds of a step's MoE layers, for the tokens per rank of the window's steps. If no
    time was measured, time is proportional to PAR, and moves are free.

    Args:
        min_gain: the least threshold, as a fraction of MoE time.

    Attributes:
        cost: time of an MoE layer.
        rates: rates at which experts travel.
        traffic: traffic of the last window.
        steps: steps expected until the next plan.
    """

    def __init__(self, min_gain: float) -> None:
        self._least = self.threshold = min_gain
        self._before: Placement | None = None
        self._promised = 0.0
        self.cost, self.rates = StepCost.proportional(), MoveRates()
        self.traffic = Traffic(np.ones(1), np.ones(1))
        self.steps = 1
        self._slots = 1
        self._now = np.ones(1)  # PAR of each layer in the last window

    def learn(self, cost: StepCost, rates: MoveRates, slots_per_rank: int) -> None:
        """Takes the measured times: plans are weighed in milliseconds from now on."""
        self.cost, self.rates, self._slots = cost, rates, slots_per_rank

    def moe_ms(self, par: npt.ArrayLike) -> float:
        """Milliseconds of the MoE layers of an average step of the last window, by the PAR of each, [L]."""
        return float(self.traffic.layer_ms(self.cost, par, self._slots).sum())

    def target_par(self, wanted: float) -> float:
        """The PAR at which a layer is left as it is: ``wanted``, or the PAR below which nothing measurable is saved.

        If perfect balance would save measurably more than the placement in force, a plan goes on to a part of that:
        a plan that stopped short of it by all that cannot be measured would save too little to be carried out.
        """
        if not self.cost.in_milliseconds:
            return wanted
        now, balanced = (self.moe_ms(par) for par in (self._now, np.ones_like(self._now)))
        more = now / balanced - 1.0 if balanced > 0 else 0.0
        tolerated = self.cost.noise if more <= self.cost.noise else min(self.cost.noise, LEFT_OVER * more)
        return max(wanted, self.traffic.par_within(self.cost, self._slots, tolerated))

    def weigh(self, before: npt.ArrayLike, after: npt.ArrayLike, received_bytes: npt.ArrayLike = ()) -> Payoff:
        """The payoff of a plan that leads from PAR ``before`` [L] to ``after`` [L], with ``received_bytes`` [R]."""
        move_ms = self.rates.milliseconds(received_bytes)
        return weigh(
            self.cost,
            self.traffic,
            np.atleast_1d(before),
            np.atleast_1d(after),
            self._slots,
            move_ms=move_ms,
            steps=self.steps,
        )

    def refuses(self, before: npt.ArrayLike, after: npt.ArrayLike, received_bytes: npt.ArrayLike = ()) -> str:
        """Why a plan that leads from PAR ``before`` to ``after`` ([L] or the mean) is refused; empty if it is not."""
        threshold = self.threshold
        payoff = self.weigh(before, after, received_bytes)
        pars = f"PAR {np.asarray(before).mean():.3f} to {np.asarray(after).mean():.3f}"
        if not self.cost.in_milliseconds:
            if payoff.saved_fraction >= threshold:
                return ""
            said = f"{pars} gains less than {threshold:.1%}"
        elif not payoff.pays(threshold):
            said = f"{pars} {self.describe(payoff)}, net less than {threshold:.1%}"
        elif payoff.saved_fraction < self.cost.noise:
            return f"{pars} {self.describe(payoff)}, no more than measurements differ by ({self.cost.noise:.1%})"
        else:
            return ""
        self.threshold = max(self._least, EASES * threshold)
        return said

    def describe(self, payoff: Payoff) -> str:
        """Gain and cost of a plan, in words; empty if no time was measured."""
        if not self.cost.in_milliseconds:
            return ""
        return (
            f"saves {payoff.saved_ms:.3f} ms of {payoff.moe_ms:.3f} ms of MoE time per step "
            f"({payoff.saved_fraction:.1%}) and costs {payoff.cost_ms:.1f} ms once, over {payoff.steps:g} steps"
        )

    def carried_out(self, before: Placement, promised: float) -> None:
        """Notes that a plan was carried out: the placement before it, and the fraction of MoE time it promised."""
        self._before, self._promised = before, promised

    def forget(self) -> None:
        """Drops the last plan, so that it is not judged."""
        self._before = None

    def window_ended(self, window: WindowLoad, placement: Placement, traffic: Traffic | None = None) -> str:
        """Judges the last plan, which led to ``placement``, by the window that followed it.

        Load and traffic have changed since the plan was made, so the plan is compared with the placement before it in
        the same window.

        Returns:
            Text for the log about the plan; empty if there is none.
        """
        if traffic is not None:
            self.traffic = traffic
        self._now = window.in_force.par
        last, self._before = self._before, None
        if last is None:
            return ""
        now, without = (window.under(place).par for place in (placement, last))
        said = f"; the last plan brought PAR {now.mean():.3f} instead of {without.mean():.3f}"
        realised = self.weigh(without, now)
        if self.cost.in_milliseconds:
            said += f" and saved {realised.saved_fraction:.1%} of MoE time"
        if realised.saved_fraction > PAYS_FROM * self._promised:
            self.threshold = max(self._least, self.threshold / 2)
            return said
        self.threshold = min(max(self._least, MOST_RAISED), max(LEAST_RAISED, self.threshold * 2))
        return f"{said}, too little, so that a plan must now gain {self.threshold:.1%}"
