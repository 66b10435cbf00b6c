# SPDX-License-Identifier: Apache-2.0
"""The parts of a served model that are balanced: pipeline stages, and the draft model."""

from __future__ import annotations

from typing import Any


def has_experts(drafter: Any) -> bool:
    """Whether a drafter is a model of its own with experts. Without weights of its own it carries the model's
    configuration.

    Args:
        drafter: vLLM's speculative configuration; None where nothing is guessed.
    """
    if drafter is None or drafter.draft_model_config in (None, drafter.target_model_config):
        return False
    return bool(drafter.draft_model_config.get_num_experts())


def drafter_layers(drafter: Any) -> int | None:
    """How many layers with experts a drafter in the model's checkpoint (MTP) has; None where its configuration does not
    say it.

    Args:
        drafter: vLLM's speculative configuration, of a drafter that has experts.
    """
    layers = getattr(drafter.draft_model_config.hf_config, "n_predict", None)
    return layers if isinstance(layers, int) else None


def is_drafter(vllm_config: Any, model_config: Any) -> bool:
    """Whether this is the configuration of the drafter, not of the model. A drafter without weights has the model's."""
    speculative = vllm_config.speculative_config
    if speculative is None or model_config is vllm_config.model_config:
        return False
    return model_config is speculative.draft_model_config


DRAFTER = "drafter"
"""What the balancer of a drafter with experts is called, beside the model's, which has no name."""


def pipeline_parts(stages: int) -> list[str]:
    """What the balancers of a model's pipeline stages are called; none where there is one stage."""
    return [f"stage{stage}" for stage in range(stages)] if stages > 1 else []


def parts_of(vllm_config: Any) -> list[str]:
    """The balancers of a server, where it has several."""
    if has_experts(vllm_config.speculative_config):
        return ["", DRAFTER]
    return pipeline_parts(vllm_config.parallel_config.pipeline_parallel_size)
