# SPDX-License-Identifier: Apache-2.0
"""The platform of vllm-ascend with our worker class: an entry without hooks, for users who name the platform::

    VLLM_PLUGINS=ascend_eplb,eplb,ascend_kv_connector,ascend_model,ascend_model_loader,ascend_service_profiling

Imported only where vllm-ascend is installed and the platform was named (``plugin.register_platform``).
"""

from __future__ import annotations

from typing import Any

from vllm_ascend.platform import NPUPlatform

from ..handed_over import settings_of
from .hand_over import hand_over

_WORKERS = {"vllm_ascend.worker.worker.NPUWorker": "vllm_ascend_eplb.adaptors.ascend.platform_worker.EplbNPUWorker"}
"""Worker classes of vllm-ascend, and ours that replace them."""


class EplbNPUPlatform(NPUPlatform):  # type: ignore[misc]
    """NPUs, with the balancer."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Hands the settings over in the form that vllm-ascend accepts, and sets the worker class."""
        vllm_config.additional_config = hand_over(vllm_config.additional_config)
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if settings_of(vllm_config.additional_config).active:
            parallel.worker_cls = _WORKERS.get(parallel.worker_cls, parallel.worker_cls)
