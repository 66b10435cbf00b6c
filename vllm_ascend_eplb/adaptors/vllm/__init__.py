# SPDX-License-Identifier: Apache-2.0
"""The adaptor for vLLM, on CUDA and on CPU."""
