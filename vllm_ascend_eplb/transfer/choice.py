# SPDX-License-Identifier: Apache-2.0
"""Which transports there are, by name."""

from __future__ import annotations

TRANSPORTS = ("auto", "gloo", "pull", "nccl", "hccl")
