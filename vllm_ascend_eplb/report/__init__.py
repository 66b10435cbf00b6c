# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML page without scripts and without network, from statistics of a run and a simulation."""

from .page import make_page

__all__ = ["make_page"]
