# SPDX-License-Identifier: Apache-2.0
"""The worker class that the platform ``ascend_eplb`` sets: vllm-ascend's, with the balancer in it."""

from vllm_ascend.worker.worker import NPUWorker

from .worker import balanced

EplbNPUWorker = NPUWorker if getattr(NPUWorker, "_eplb", False) else balanced(NPUWorker)
