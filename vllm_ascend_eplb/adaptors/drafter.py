# SPDX-License-Identifier: Apache-2.0
"""What is known of a drafter, the model that guesses tokens ahead, from vLLM's configuration."""

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
