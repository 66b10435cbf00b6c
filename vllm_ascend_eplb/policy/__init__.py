# SPDX-License-Identifier: Apache-2.0
"""Policies: from load and the placement in force to a plan. NumPy and the C++ core only."""

from .dispatch import dispatch_shares, dispatch_tables
from .planner import POLICIES, PlanInputError, plan, policy_from_type

__all__ = ["POLICIES", "PlanInputError", "dispatch_shares", "dispatch_tables", "plan", "policy_from_type"]
