# SPDX-License-Identifier: Apache-2.0
"""The settings on their way through vllm-ascend, which knows a part of ``eplb_config`` and refuses the rest.

In the front-end process, before vLLM builds its configuration, ``hand_over`` takes our settings out of ``eplb_config``
and leaves what vllm-ascend accepts; in the workers, ``settings_of`` reads them again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..config import EplbConfig, EplbConfigError

SETTINGS = "vllm_ascend_eplb"
"""Key of additional_config under which our settings travel to the workers; vllm-ascend ignores it."""

SWITCH = "DYNAMIC_EPLB"
"""Environment variable that vllm-ascend wants to be true before it accepts dynamic_eplb."""

STOCK_KEYS = (
    "dynamic_eplb",
    "expert_heat_collection_interval",
    "algorithm_execution_interval",
    "num_redundant_experts",
)
"""What vllm-ascend is told. Not the policy: under its number 3 its layers count load in another form."""


def on_ascend() -> bool:
    """Whether vLLM runs on vllm-ascend's platform."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type) == "npu"


def settings_of(additional_config: object) -> EplbConfig:
    """Our settings, wherever they stand.

    Args:
        additional_config: vLLM's dictionary, before or after :func:`hand_over`.

    Raises:
        EplbConfigError: a key or value that is not allowed.
    """
    if isinstance(additional_config, Mapping) and SETTINGS in additional_config:
        return EplbConfig.from_additional_config({"eplb_config": additional_config[SETTINGS]})
    return EplbConfig.from_additional_config(additional_config)


def hand_over(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration in the dialect that vllm-ascend accepts: its own keys in ``eplb_config``, all of ours
    under :data:`SETTINGS`. Sets the environment variable that it asks for; processes started later inherit it.

    Raises:
        EplbConfigError: a setting cannot work, or the environment contradicts it.
    """
    config = settings_of(additional_config)
    if not config.active or SETTINGS in additional_config:
        return additional_config
    if config.weighted_dispatch:
        raise EplbConfigError(
            "eplb_config.weighted_dispatch = true is not supported on Ascend in this version (allowed: false); "
            "leave it out"
        )
    switch_on()
    stock = {key: getattr(config, key) for key in STOCK_KEYS}
    return {**additional_config, "eplb_config": stock, SETTINGS: config.model_dump()}


def switch_on() -> None:
    """Sets the environment variable without which vllm-ascend refuses ``dynamic_eplb``.

    Raises:
        EplbConfigError: it is set to something else.
    """
    if os.environ.get(SWITCH, "true").lower() not in ("true", "1"):
        raise EplbConfigError(
            f"eplb_config.dynamic_eplb is true, but the environment says {SWITCH}={os.environ[SWITCH]}, with which "
            f"vllm-ascend refuses it; unset it, or: export {SWITCH}=true"
        )
    os.environ[SWITCH] = "true"


def refuse_what_is_not_supported(vllm_config: Any) -> None:
    """Ways to run a model on vllm-ascend for which this version has no proof that balancing is right.

    Raises:
        EplbConfigError: one of them is asked for.
    """
    parallel = vllm_config.parallel_config
    both = parallel.tensor_parallel_size > 1 and parallel.data_parallel_size > 1
    additional = vllm_config.additional_config
    for name, value, allowed, way_out in (
        (
            "--tensor-parallel-size with --data-parallel-size",
            (parallel.tensor_parallel_size, parallel.data_parallel_size) if both else 1,
            1,
            "use one of the two",
        ),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size, 1, "use --tensor-parallel-size"),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size, 1, "leave it out"),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size, 1, "leave it out"),
        ("--enable-lora", vllm_config.lora_config is not None, False, "leave it out"),
        ("--speculative-config", vllm_config.speculative_config is not None, False, "leave it out"),
        ("additional_config.mix_placement", bool(additional.get("mix_placement")), False, "leave it out"),
        ("additional_config.enable_fused_mc2", additional.get("enable_fused_mc2", 0), 0, "leave it out"),
    ):
        if value != allowed:
            raise EplbConfigError(
                f"eplb_config together with {name} {value} is not supported with vllm-ascend in this version (allowed: "
                f"{allowed}); {way_out}, or leave eplb_config out"
            )
