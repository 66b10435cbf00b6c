# SPDX-License-Identifier: Apache-2.0
"""The worker class that the platform ``ascend_eplb`` sets: vllm-ascend's, with the balancer in it."""

from vllm_ascend.worker import worker

from .worker import hook_worker

EplbNPUWorker = hook_worker(worker)
