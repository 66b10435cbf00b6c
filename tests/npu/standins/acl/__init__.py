# SPDX-License-Identifier: Apache-2.0
"""Stand-in for pyACL, which the package registry does not have: the names that vllm-ascend imports."""

from . import rt  # noqa: F401
