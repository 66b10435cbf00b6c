# SPDX-License-Identifier: Apache-2.0
"""Errors that end the start of a worker."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """This model, or the way in which it is run, cannot be balanced."""


class PatchPointError(UnsupportedError):
    """The engine is missing a patch point that the balancer needs."""
