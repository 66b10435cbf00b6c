# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-ascend-eplb``: tools for operators. One file per command."""

from .app import app, main

__all__ = ["app", "main"]
