# SPDX-License-Identifier: Apache-2.0
"""The adaptor for vllm-ascend, for both of its model runners."""
