# SPDX-License-Identifier: Apache-2.0
"""Defaults that the server's settings, the tools and the simulation share."""

from typing import Final, Literal

TARGET_PAR: Final = 1.02
"""PAR of rank load at which a layer is good enough."""


EFFORT: Final[Literal["thorough"]] = "thorough"
"""Search effort of the planner where a plan is carried out: in a server and by the command ``plan``."""


QUICK_EFFORT: Final[Literal["fast"]] = "fast"
"""Search effort where many plans are made: by the function ``plan`` and in a simulation."""
