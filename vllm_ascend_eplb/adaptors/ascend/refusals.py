# SPDX-License-Identifier: Apache-2.0
"""What the balancer does not support on vllm-ascend, refused before any worker starts."""

from __future__ import annotations

from typing import Any

from ...files.expert_map import read_expert_map
from ...settings.config import EplbConfig
from ...settings.fit import refuse_options
from ..handed_over import settings_of
from ..parts import drafter_layers, has_experts
from .hand_over import SECOND_RUNNER, second_runner


def layers_of_map(config: EplbConfig, layers: int | None, drafter: Any) -> int | None:
    """How many layers ``expert_map_path`` must have: those of the model and behind them its drafter's, as a server that
    balances both records them. A map of the model alone is taken, too, where the drafter has one layer: vllm-ascend
    then spreads the experts of that layer as without a map.

    Args:
        layers: of the model with experts; None where that is not known.
        drafter: vLLM's speculative configuration.

    Returns:
        None where that is not known.
    """
    if config.expert_map_path is None or layers is None or not has_experts(drafter):
        return layers
    further = drafter_layers(drafter)
    if further is None:
        return None
    alone = further == 1 and read_expert_map(config.expert_map_path).num_layers == layers
    return layers if alone else layers + further


def refuse_what_is_not_supported(vllm_config: Any) -> None:
    """Ways to run a model on vllm-ascend for which this version has no proof that balancing is right.

    Raises:
        EplbConfigError: one of them is asked for.
    """
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    additional, drafter = vllm_config.additional_config, vllm_config.speculative_config
    config = settings_of(additional)
    has_map = config.expert_map_path is not None or config.expert_map_record_path is not None
    options = (
        (
            "--pipeline-parallel-size with --data-parallel-size",
            parallel.data_parallel_size if stages > 1 else 1,
            1,
            "use one of the two",
        ),
        (  # a map is of all layers of a model, and each stage has some of them
            "an expert_map_path or expert_map_record_path and --pipeline-parallel-size",
            stages if has_map else 1,
            1,
            "use one of the two",
        ),
        (
            "a draft model that has experts, and --pipeline-parallel-size",
            stages if has_experts(drafter) else 1,
            1,
            "use one of the two",
        ),
        (  # there it is a model of its own, and a map is of the layers of one
            f"an expert_map_path or expert_map_record_path, and a draft model that has experts, with {SECOND_RUNNER}=1",
            has_map and has_experts(drafter) and second_runner(),
            False,
            "use one of the two",
        ),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size, 1, "leave it out"),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size, 1, "leave it out"),
        ("--enable-elastic-ep", getattr(parallel, "enable_elastic_ep", False), False, "leave it out"),
        ("--enable-lora", vllm_config.lora_config is not None, False, "leave it out"),
        ("--enable-sleep-mode", vllm_config.model_config.enable_sleep_mode, False, "leave it out"),
        ("--weight-transfer-config", vllm_config.weight_transfer_config is not None, False, "leave it out"),
        (
            "--speculative-config with a draft model that has experts, of method",
            drafter.method if has_experts(drafter) else "mtp",
            "mtp",
            "use a draft model without experts",
        ),
        ("additional_config.mix_placement", bool(additional.get("mix_placement")), False, "leave it out"),
        ("additional_config.enable_fused_mc2", additional.get("enable_fused_mc2", 0), 0, "leave it out"),
    )
    refuse_options(options, engine="vllm-ascend")
