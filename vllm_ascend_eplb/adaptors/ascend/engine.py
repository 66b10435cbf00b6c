# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend, with either of its model runners, as the front end sees it."""

from __future__ import annotations

import copy
from typing import Any

from ...settings.config import EplbConfig
from ..engine import Engine, Verdict, eplb_config_for, let_workers_balance
from ..handed_over import HandedOver
from ..parts import parts_of, pipeline_parts
from ..vllm.models import refuse_model
from ..worker_name import SECOND_RUNNER, is_worker_of, worker_class_name
from . import hand_over, refusals


class FirstRunner(Engine):
    """vllm-ascend with its first model runner: its own worker stays, and is hooked once its module is imported."""

    draft_layers_without_map: int | None = 1

    def verdict(self, config: EplbConfig) -> Verdict:
        return hand_over.verdict(config)

    def without_balancing(self, engine_args: Any) -> Any:
        """Without ``eplb_config``, whose keys vllm-ascend does not know."""
        switched = copy.copy(engine_args)
        switched.additional_config = hand_over.without_settings(engine_args.additional_config)
        return switched

    def with_balancing(self, engine_args: Any, config: EplbConfig) -> Any:
        switched = copy.copy(engine_args)
        switched.additional_config = hand_over.hand_over(engine_args.additional_config)
        return switched

    def refuse_unsupported(self, vllm_config: Any, config: EplbConfig) -> None:
        refusals.refuse_unsupported(vllm_config)

    def switch_on(self, vllm_config: Any, num_redundant: int) -> None:
        """Nothing: ``hand_over`` has set what vllm-ascend reads."""

    def is_on(self, vllm_config: Any) -> bool:
        return isinstance((vllm_config.additional_config or {}).get("eplb_config"), HandedOver)

    def parts(self, vllm_config: Any) -> list[str]:
        """Those of the pipeline stages: the layers of a draft model are balanced among those of the model."""
        return pipeline_parts(vllm_config.parallel_config.pipeline_parallel_size)


class SecondRunner(FirstRunner):
    """vllm-ascend with its second model runner, which is balanced as vLLM is."""

    draft_layers_without_map = None

    def with_balancing(self, engine_args: Any, config: EplbConfig) -> Any:
        switched = super().with_balancing(engine_args, config)
        switched.enable_eplb = True
        switched.eplb_config = eplb_config_for(switched.eplb_config, config.num_redundant_experts, use_async=True)
        return switched

    def refuse_unsupported(self, vllm_config: Any, config: EplbConfig) -> None:
        super().refuse_unsupported(vllm_config, config)
        refuse_model(vllm_config)

    def switch_on(self, vllm_config: Any, num_redundant: int) -> None:
        """As for vLLM, but with ``use_async``: vllm-ascend turns it on in any case, with a warning."""
        name = worker_class_name(SECOND_RUNNER, vllm_config.parallel_config.worker_cls)
        let_workers_balance(vllm_config, num_redundant, name, use_async=True)

    def is_on(self, vllm_config: Any) -> bool:
        return is_worker_of(SECOND_RUNNER, vllm_config.parallel_config.worker_cls)

    def parts(self, vllm_config: Any) -> list[str]:
        return parts_of(vllm_config)
