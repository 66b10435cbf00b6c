# SPDX-License-Identifier: Apache-2.0
"""Finding: one result of ``doctor``; and the mark before the answer of its probe process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARK = "vllm-ascend-eplb probe: "
"""First part of the line with the answer of ``probe.py`` on standard output."""

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        what: the subject.
        status: ok, note (balancing works anyway) or wrong (balancing stays off).
        text: what was found, and the way out if something is wrong.
    """

    what: str
    status: Status
    text: str
