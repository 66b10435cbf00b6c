# SPDX-License-Identifier: Apache-2.0
"""Policies: from load and the placement in force to a plan. NumPy and the C++ core only."""

from .dispatch import dispatch_shares, dispatch_tables, shared_rank_load
from .forecast import forecast
from .planner import POLICIES, PlanInputError, noise_par, plan, policy_from_type

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
