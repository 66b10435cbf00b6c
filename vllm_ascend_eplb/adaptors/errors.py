# SPDX-License-Identifier: Apache-2.0
"""Errors that end the start-up of a worker."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """The model, or an option it is run with, is unsupported."""


class PatchPointError(UnsupportedError):
    """The engine is missing a patch point that the balancer needs."""
