# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's platform with a worker class of ours: the way in without a hook, for those who name it themselves::

    VLLM_PLUGINS=ascend_eplb,eplb,ascend_kv_connector,ascend_model,ascend_model_loader,ascend_service_profiling

Imported only where vllm-ascend is installed and the platform was named (``plugin.register_platform``).
"""

from __future__ import annotations

from typing import Any

from vllm_ascend.platform import NPUPlatform

from ..handed_over import settings_of
from . import hand_over as ascend_config

_WORKERS = {"vllm_ascend.worker.worker.NPUWorker": "vllm_ascend_eplb.adaptors.ascend.platform_worker.EplbNPUWorker"}
"""Worker classes of vllm-ascend, and ours in place of them."""


class EplbNPUPlatform(NPUPlatform):  # type: ignore[misc]
    """NPUs, with the balancer."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Hands the settings over in vllm-ascend's dialect, and sets the worker class."""
        vllm_config.additional_config = ascend_config.hand_over(vllm_config.additional_config)
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if settings_of(vllm_config.additional_config).active:
            parallel.worker_cls = _WORKERS.get(parallel.worker_cls, parallel.worker_cls)
