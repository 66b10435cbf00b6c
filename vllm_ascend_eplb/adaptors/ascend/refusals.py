# SPDX-License-Identifier: Apache-2.0
"""What the balancer does not support on vllm-ascend, refused before any worker starts."""

from __future__ import annotations

import os
from typing import Any

from ...files.expert_map import read_expert_map
from ...settings.config import EplbConfig
from ...settings.fit import refuse_options
from ..handed_over import settings_of
from ..parts import draft_layers, has_experts
from ..refusals import common_options, has_map, sleeps, transfers_weights, without_parallel
from .hand_over import SECOND_RUNNER, second_runner


def layers_of_map(config: EplbConfig, layers: int | None, speculative: Any) -> int | None:
    """How many layers ``expert_map_path`` must have: those of the model, and behind them those of the draft model, as a
    server that balances both records them. Where the draft model has one layer, a map of the model alone is taken, too:
    vllm-ascend then spreads the experts of that layer as without a map.

    Args:
        layers: layers with experts of the model; None where that is not known.
        speculative: vLLM's speculative configuration, or None; a dictionary where vLLM has not read it yet.

    Returns:
        None where that is not known.
    """
    if isinstance(speculative, dict):
        return None
    if config.expert_map_path is None or layers is None or not has_experts(speculative):
        return layers
    further = draft_layers(speculative)
    if further is None:
        return None
    alone = further == 1 and read_expert_map(config.expert_map_path).num_layers == layers
    return layers if alone else layers + further


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuses ways to run a model on vllm-ascend in which balancing is not proved right in this version.

    Raises:
        EplbConfigError: the configuration has one of them.
    """
    additional, parallel = vllm_config.additional_config, vllm_config.parallel_config
    config = settings_of(additional)
    options = (
        *common_options(vllm_config, config, draft_methods=("mtp",)),
        without_parallel(vllm_config, "prefill_context_parallel_size", 1),
        (  # there it is a model of its own, and a map has the layers of one
            f"an expert_map_path or expert_map_record_path and a draft model with experts, with {SECOND_RUNNER}=1",
            has_map(config) and has_experts(vllm_config.speculative_config) and second_runner(),
            False,
            "use one of the two",
        ),
        (  # a map has all layers of a model, and each stage has some of them
            "an expert_map_path or expert_map_record_path and --pipeline-parallel-size",
            parallel.pipeline_parallel_size if has_map(config) else 1,
            1,
            "use one of the two",
        ),
        ("--enable-sleep-mode", sleeps(vllm_config), False, "leave it out"),
        (
            "--weight-transfer-config",
            transfers_weights(vllm_config),
            False,
            "update weights through reload_weights of the workers",
        ),
        (
            "additional_config.enable_fused_mc2",
            fused := additional.get("enable_fused_mc2", os.environ.get("VLLM_ASCEND_ENABLE_FUSED_MC2", 0)),
            fused if str(fused) in ("0", "1") else "0 or 1",
            "use 1, or leave it out",
        ),
        ("additional_config.mix_placement", bool(additional.get("mix_placement")), False, "leave it out"),
    )
    refuse_options(options, engine="vllm-ascend")
