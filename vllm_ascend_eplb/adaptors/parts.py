# SPDX-License-Identifier: Apache-2.0
"""The parts of a served model that are balanced: pipeline stages, and the draft model."""

from __future__ import annotations

from typing import Any

DRAFT = "drafter"
"""Name of the balancer of a draft model with experts, in the log, the statistics and the metrics; the model's balancer
has no name."""


def has_experts(speculative: Any) -> bool:
    """Whether the draft model is a model of its own with experts.

    Args:
        speculative: vLLM's speculative configuration, or None. A method without weights of its own (ngram) carries the
            configuration of the model.
    """
    if speculative is None or speculative.draft_model_config in (None, speculative.target_model_config):
        return False
    return bool(speculative.draft_model_config.get_num_experts())


def draft_layers(speculative: Any) -> int | None:
    """Number of layers with experts of a draft model in the model's checkpoint (MTP); None if its configuration does
    not have it.

    Args:
        speculative: vLLM's speculative configuration, of a draft model with experts.
    """
    layers = getattr(speculative.draft_model_config.hf_config, "n_predict", None)
    return layers if isinstance(layers, int) else None


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether ``model_config`` is the configuration of the draft model, and not of the model."""
    speculative = vllm_config.speculative_config
    if speculative is None or model_config is vllm_config.model_config:
        return False
    return model_config is speculative.draft_model_config


def pipeline_parts(stages: int) -> list[str]:
    """Names of the balancers of the pipeline stages; empty if there is one stage."""
    return [f"stage{stage}" for stage in range(stages)] if stages > 1 else []


def parts_of(vllm_config: Any) -> list[str]:
    """Names of the balancers of a server; empty if there is one."""
    if has_experts(vllm_config.speculative_config):
        return ["", DRAFT]
    return pipeline_parts(vllm_config.parallel_config.pipeline_parallel_size)
