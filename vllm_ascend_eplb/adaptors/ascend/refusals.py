# SPDX-License-Identifier: Apache-2.0
"""What the balancer does not support on vllm-ascend, refused before any worker starts."""

from __future__ import annotations

import os
from typing import Any

from ...settings.fit import refuse_options
from ..handed_over import settings_of
from ..refusals import common_options, has_map, sleeps, transfers_weights, without_parallel


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
        (  # 0.23.0.post1 also has a variable for it
            "additional_config.enable_fused_mc2",
            fused := additional.get("enable_fused_mc2", os.environ.get("VLLM_ASCEND_ENABLE_FUSED_MC2", 0)),
            fused if str(fused) in ("0", "1") else "0 or 1",
            "use 1, or leave it out",
        ),
        ("additional_config.mix_placement", bool(additional.get("mix_placement")), False, "leave it out"),
    )
    refuse_options(options, engine="vllm-ascend")
