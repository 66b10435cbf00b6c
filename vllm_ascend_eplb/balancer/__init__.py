# SPDX-License-Identifier: Apache-2.0
"""What drives the stations: :class:`~vllm_ascend_eplb.balancer.updator.EplbUpdator` and its collaborators."""
