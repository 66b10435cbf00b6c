# SPDX-License-Identifier: Apache-2.0
"""An expert-parallel load balancer for serving Mixture-of-Experts models with vLLM.

Importing the package imports only NumPy, neither torch nor vllm. The planner's process relies on that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .values.placement import Placement, PlacementError
from .values.plan import Plan, PlanError

if TYPE_CHECKING:
    from .planning import dispatch_shares, plan

__version__ = "0.1.0"
__all__ = ["Placement", "PlacementError", "Plan", "PlanError", "dispatch_shares", "plan"]


def __getattr__(name: str) -> Any:
    if name in ("plan", "dispatch_shares"):
        from . import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
