# SPDX-License-Identifier: Apache-2.0
"""Defaults that the server's settings, the tools and the simulation share."""

from typing import Final, Literal

TARGET_PAR: Final = 1.02
"""PAR of rank load at which a layer is good enough."""


EFFORT: Final[Literal["thorough"]] = "thorough"
"""Search effort of the planner where a plan is carried out: in the server and in the tool ``plan``."""


LIBRARY_EFFORT: Final[Literal["fast"]] = "fast"
"""Search effort of ``plan()`` and of a simulation. "thorough" ends by the clock, so that equal calls may give different
plans; a caller of the library gets equal plans unless he asks for more, and a simulation makes thousands of them."""
