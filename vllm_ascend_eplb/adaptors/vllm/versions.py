# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM are balanced."""

from __future__ import annotations

import re

CHECKED_VERSIONS = ("0.30", "0.31", "0.32")
"""Releases on which the end-to-end tests ran."""


READ_VERSIONS = ("0.30", "0.31", "0.32", "0.33")
"""Releases in whose sources every patch point was looked for (tests/unit/adaptors/test_patch_points.py)."""


def is_checked(version: str) -> bool:
    """Whether a vLLM version is one of ``CHECKED_VERSIONS`` (any patch release, any local build of it)."""
    match = re.match(r"(\d+\.\d+)\.", version + ".")
    return match is not None and match.group(1) in CHECKED_VERSIONS


def stays_off(version: str, platform: str) -> str:
    """Why balancing stays off with a version of vLLM, as a line for the log; empty where it may run.

    Args:
        version: of the installed vLLM.
        platform: device type (cuda, cpu).
    """
    return "" if is_checked(version) else unchecked_line("vLLM", CHECKED_VERSIONS, version)


def unchecked_line(engine: str, checked: tuple[str, ...], version: str) -> str:
    """A line for the log: balancing stays off with this version of an engine, and how to have it all the same."""
    return (
        f"EPLB stays off: it was checked against {engine} {', '.join(checked)}, and this is {version}; to balance all "
        'the same, set "allow_unchecked_vllm": true in eplb_config'
    )
