# SPDX-License-Identifier: Apache-2.0
"""``PlanOptions``: how the policy "incremental" is to plan, checked."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from ..values.defaults import QUICK_EFFORT, TARGET_PAR

EFFORTS = ("fast", "thorough")


class PlanInputError(ValueError):
    """An argument of ``plan`` that no policy can work with; the message says which, and what is allowed."""


@dataclass(frozen=True)
class PlanOptions:
    """How the policy "incremental" is to plan.

    Attributes:
        target_par: a layer is left alone once its PAR is no greater; below 1.001 it is 1.001 for layers with more than
            128 slots.
        effort: "fast" is one descent, and up to 128 slots per layer a few rounds of improvement; "thorough" goes on
            improving for ``time_budget`` seconds, or until no layer can be improved.
        time_budget: seconds of "thorough", for all layers together.
        rounds: rounds of improvement per layer in "thorough" instead of a time budget; equal rounds give equal plans.
        max_moves: most moves in the plan, over all layers; layers that gain most per move come first.
        max_moves_per_rank: most experts that a rank receives over all layers.
        max_moves_between_nodes: most experts that are received from another node, over all layers.
        price_between_nodes: what an expert received from another node costs, in experts received within the node.
        min_gain: the plan is empty unless it lowers the busiest ranks' load, summed over layers, by at least this part.
        count_noise: whether the load is counts of tokens, so that differences within their counting noise are ignored.
        seed: of the policy "random" and of improvement; any integer.
        threads: threads that share the layers. The plan does not depend on it.

    Raises:
        PlanInputError: a value is out of range.
    """

    target_par: float = TARGET_PAR
    effort: str = QUICK_EFFORT
    time_budget: float = 0.3
    rounds: int | None = None
    max_moves: int | None = None
    max_moves_per_rank: int | None = None
    max_moves_between_nodes: int | None = None
    price_between_nodes: float = 1.0
    min_gain: float = 0.0
    count_noise: bool = False
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise PlanInputError(f"effort is {self.effort!r}; allowed are 'fast' and 'thorough'")
        if not isinstance(self.count_noise, bool):
            raise PlanInputError(f"count_noise is {self.count_noise!r}; allowed are True and False")
        for name, low, high in (
            ("target_par", 1.0, 1e6),
            ("time_budget", 0.0, 86400.0),
            ("price_between_nodes", 1.0, 1000.0),
            ("min_gain", 0.0, 1.0),
        ):
            check_number(name, getattr(self, name), low, high)
        check_integer("rounds", self.rounds, 1, 10**6, optional=True)
        for name in ("max_moves", "max_moves_per_rank", "max_moves_between_nodes"):
            check_integer(name, getattr(self, name), 0, 2**62, optional=True)
        check_integer("threads", self.threads, 1, 1024)
        check_integer("seed", self.seed)


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises PlanInputError unless ``value`` is a number from ``low`` to ``high``."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise PlanInputError(f"{name} is {value!r}; allowed are numbers {low:g} to {high:g}")


def check_integer(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, optional: bool = False
) -> None:
    """Raises PlanInputError unless ``value`` is an integer from ``low`` to ``high``, or None where ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return
    bounds = "" if low == -math.inf else f" from {low:g}" if high == math.inf else f" {low:g} to {high:g}"
    raise PlanInputError(f"{name} is {value!r}; allowed are integers{bounds}{' and None' if optional else ''}")
