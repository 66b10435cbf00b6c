# SPDX-License-Identifier: Apache-2.0
"""Which versions of vLLM are balanced.

Checked versions are balanced. So is the release after the newest of them, if the self-test finds no difference; the log
then has a warning. Other versions are balanced only with ``allow_unchecked_vllm`` (docs/patch_points.md).
"""

from __future__ import annotations

import re
from pathlib import Path

from ..engine import Verdict
from .self_test import differences

CHECKED_VERSIONS = ("0.30", "0.31", "0.32", "0.33")
"""Releases on which the end-to-end tests ran."""


def is_checked(version: str) -> bool:
    """Whether a vLLM version is one of ``CHECKED_VERSIONS`` (any patch release, any local build of it)."""
    return _release(version) in [_release(checked) for checked in CHECKED_VERSIONS]


def is_next(version: str) -> bool:
    """Whether a version is of the release after the newest checked one."""
    major, minor = _release(CHECKED_VERSIONS[-1])
    return _release(version) == (major, minor + 1)


def verdict(version: str, platform: str, root: Path | None) -> Verdict:
    """Whether a version of vLLM is balanced.

    Args:
        version: of the installed vLLM.
        platform: device type (cuda, cpu).
        root: the folder that holds the package ``vllm``; None where it has no sources.
    """
    if is_checked(version):
        return Verdict(True)
    if not is_next(version) or root is None:
        return Verdict(False, unchecked_line("vLLM", CHECKED_VERSIONS, version))
    found = differences(root, platform)
    if found:
        line = unchecked_line("vLLM", CHECKED_VERSIONS, version)
        return Verdict(False, f"{line}; the self-test found: {'; '.join(found)}")
    return Verdict(
        True,
        f"EPLB was checked against vLLM {', '.join(CHECKED_VERSIONS)}, and this is {version}: the self-test found "
        "every patch point unchanged, so balancing is on; to turn it off, leave eplb_config out",
    )


def unchecked_line(engine: str, checked: tuple[str, ...], version: str) -> str:
    """A line for the log: balancing stays off with this version of an engine, and the setting that overrides this."""
    return (
        f"EPLB stays off: it was checked against {engine} {', '.join(checked)}, and this is {version}; to balance "
        'anyway, set "allow_unchecked_vllm": true in eplb_config'
    )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for a version that does not begin with them."""
    match = re.match(r"(\d+)\.(\d+)(?:\D|$)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)
