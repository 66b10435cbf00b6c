# SPDX-License-Identifier: Apache-2.0
"""The adaptors for vllm-ascend, one for each of its model runners."""
