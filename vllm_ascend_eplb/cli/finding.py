# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` says of one thing that it looked at, and the mark of the answer of the process that looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARK = "vllm-ascend-eplb probe: "
"""Begins the line with the answer of ``probe.py`` on standard output."""

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name. status: ok, note (balancing works all the same) or wrong (it stays off).
        text: what was found, and the way out where something is wrong.
    """

    what: str
    status: Status
    text: str
