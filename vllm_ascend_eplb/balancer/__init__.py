# SPDX-License-Identifier: Apache-2.0
"""The driver of all stages: :class:`~vllm_ascend_eplb.balancer.updator.EplbUpdator` and its collaborators."""
