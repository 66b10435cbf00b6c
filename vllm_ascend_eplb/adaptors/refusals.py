# SPDX-License-Identifier: Apache-2.0
"""Options that are not supported together with balancing on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..settings.config import EplbConfig
from .parts import has_experts

Option = tuple[str, object, object, str]
"""Name, value, allowed value, way out; see :func:`vllm_ascend_eplb.settings.fit.refuse_options`."""


def common_options(vllm_config: Any, config: EplbConfig, draft_methods: tuple[str, ...]) -> tuple[Option, ...]:
    """The options that vLLM and vllm-ascend have in common, with their values.

    Args:
        vllm_config: the complete configuration of vLLM.
        config: the settings.
        draft_methods: methods of draft models that may have experts.
    """
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    draft, allowed = has_experts(speculative), " or ".join(draft_methods)
    return (
        (
            "a draft model with experts and --pipeline-parallel-size",
            stages if draft else 1,
            1,
            "use one of the two",
        ),
        (
            "--speculative-config with a draft model with experts, of method",
            speculative.method if draft and speculative.method not in draft_methods else allowed,
            allowed,
            "use a draft model without experts",
        ),
        without_parallel(vllm_config, "enable_elastic_ep", False),
        ("--enable-lora", vllm_config.lora_config is not None, False, "leave it out"),
        *_shared_weights(vllm_config),
    )


SHARING_FORMATS = ("ipc_cache", "modelexpress", "netloader", "rfork")
"""Values of ``--load-format`` by which another process has or gets the weights of this server as they lie in memory:
vLLM's weight cache, ModelExpress, and vllm-ascend's two loaders from a running server. It would get moved experts in
the order of the checkpoint, or see them change."""


def _shared_weights(vllm_config: Any) -> Iterator[Option]:
    """Loaders, of the model and of a draft model, whose weights other processes read."""
    for option, path in (
        ("--load-format", "load_config.load_format"),
        ("a draft model's --load-format", "speculative_config.draft_load_config.load_format"),
    ):
        found = str(value_at(vllm_config, path, "auto"))
        if found in SHARING_FORMATS:
            yield (option, found, "formats that share no memory with other processes", "leave it out")


def sleeps(vllm_config: Any) -> bool:
    """Whether vLLM may give the memory of the weights away and take it again."""
    return bool(value_at(vllm_config, "model_config.enable_sleep_mode", False))


def transfers_weights(vllm_config: Any) -> bool:
    """Whether a trainer gives the workers new weights through vLLM."""
    return value_at(vllm_config, "weight_transfer_config", None) is not None


def has_map(config: EplbConfig) -> bool:
    """Whether a map is read or recorded."""
    return config.expert_map_path is not None or config.expert_map_record_path is not None


def value_at(config: Any, path: str, default: object) -> Any:
    """The value at a dotted path of a configuration; ``default`` where this version has no such field, or None."""
    for name in path.split("."):
        config = getattr(config, name, None)
        if config is None:
            return default
    return config


def without_parallel(vllm_config: Any, field: str, allowed: object) -> Option:
    """The option of a field of the parallel configuration, with the only value that is supported."""
    value = value_at(vllm_config, f"parallel_config.{field}", allowed)
    return (f"--{field.replace('_', '-')}", value, allowed, "leave it out")
