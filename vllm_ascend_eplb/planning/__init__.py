# SPDX-License-Identifier: Apache-2.0
"""The second station: from a window of load to an ordered plan and its rounds. No torch."""

from .forecast import forecast
from .planner import POLICIES, PlanInputError, noise_par, plan, policy_from_type
from .shares import dispatch_shares, dispatch_tables, shared_rank_load

__all__ = [
    "POLICIES",
    "PlanInputError",
    "dispatch_shares",
    "dispatch_tables",
    "forecast",
    "noise_par",
    "plan",
    "policy_from_type",
    "shared_rank_load",
]
