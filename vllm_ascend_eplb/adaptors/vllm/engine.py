# SPDX-License-Identifier: Apache-2.0
"""vLLM, on CUDA and on CPU, as the front end sees it."""

from __future__ import annotations

import copy
from typing import Any

from ...settings.config import EplbConfig
from ..engine import Engine, Verdict, eplb_config_for, let_workers_balance
from ..parts import parts_of
from ..worker_name import VLLM, is_worker_of, worker_class_name
from .models import refuse_model
from .refusals import refuse_unsupported
from .sources import installed_root
from .versions import verdict


class Vllm(Engine):
    """vLLM with a worker class of ours."""

    def verdict(self, config: EplbConfig) -> Verdict:
        import vllm
        from vllm.platforms import current_platform

        if config.allow_unchecked_vllm:
            return Verdict(True)
        return verdict(vllm.__version__, str(current_platform.device_type), installed_root())

    def with_balancing(self, engine_args: Any, config: EplbConfig) -> Any:
        """Turns vLLM's own switch on, so that its checks of the switch apply. Not on a CPU, where they refuse it in any
        case; there ``switch_on`` sets it after them."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu() or not engine_args.enable_expert_parallel:
            return engine_args
        switched = copy.copy(engine_args)
        switched.enable_eplb = True
        switched.eplb_config = eplb_config_for(switched.eplb_config, config.num_redundant_experts, use_async=False)
        return switched

    def refuse_unsupported(self, vllm_config: Any, config: EplbConfig) -> None:
        refuse_unsupported(vllm_config, config)
        refuse_model(vllm_config)

    def switch_on(self, vllm_config: Any, num_redundant: int) -> None:
        name = worker_class_name(VLLM, vllm_config.parallel_config.worker_cls)
        let_workers_balance(vllm_config, num_redundant, name, use_async=False)

    def is_on(self, vllm_config: Any) -> bool:
        return is_worker_of(VLLM, vllm_config.parallel_config.worker_cls)

    def parts(self, vllm_config: Any) -> list[str]:
        return parts_of(vllm_config)
