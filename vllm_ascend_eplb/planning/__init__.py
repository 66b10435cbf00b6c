# SPDX-License-Identifier: Apache-2.0
"""From a window of load to an ordered plan and its rounds. No torch."""

from .forecast import forecast
from .options import PlanInputError, PlanOptions
from .planner import noise_par, plan
from .shares import dispatch_shares, shared_rank_load

__all__ = [
    "PlanInputError",
    "PlanOptions",
    "dispatch_shares",
    "forecast",
    "noise_par",
    "plan",
    "shared_rank_load",
]
