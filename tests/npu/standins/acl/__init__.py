# SPDX-License-Identifier: Apache-2.0
"""Stand-in for pyACL, which is not on the package registry: the names that vllm-ascend imports."""

from . import rt  # noqa: F401
