# SPDX-License-Identifier: Apache-2.0
"""What the balancer does not support on vLLM, refused before any worker starts."""

from __future__ import annotations

from typing import Any

from ...settings.config import EplbConfig
from ...settings.fit import refuse_options
from ..parts import has_experts


def _executor(vllm_config: Any) -> str:
    """What runs the workers, by vLLM's name for it; a class of somebody else's by its own. Workers on GPUs that Ray
    started are those of "mp" in every respect, also in what they find in the environment."""
    from vllm import envs

    backend = vllm_config.parallel_config.distributed_executor_backend
    on_gpus = vllm_config.device_config.device_type == "cuda"
    if backend == "ray" and on_gpus and envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        return "mp"
    return backend if isinstance(backend, str) else getattr(backend, "__name__", str(backend))


def _freezes(compilation: Any, option: str) -> bool:
    """Whether inductor would bake weights into compiled code by an option, so that it never sees an expert that
    moved. On a CPU vLLM turns freezing on with max_autotune."""
    from torch._inductor import config

    default = option == "freezing" and config.freezing
    compiled = compilation.mode != type(compilation.mode).NONE
    return compiled and bool(compilation.inductor_compile_config.get(option, default))


def refuse_what_is_not_supported(vllm_config: Any, config: EplbConfig) -> None:
    """Ways to run a model for which this version has no proof that balancing is right."""
    drafter, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    has_map = config.expert_map_path is not None or config.expert_map_record_path is not None
    options = (
        (
            "--prefill-context-parallel-size",
            _value(vllm_config, "parallel_config.prefill_context_parallel_size", 1),
            1,
            "leave it out",
        ),
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
            "--decode-context-parallel-size",
            _value(vllm_config, "parallel_config.decode_context_parallel_size", 1),
            1,
            "leave it out",
        ),
        ("--distributed-executor-backend", _executor(vllm_config), "mp", "leave it out"),
        (
            "--data-parallel-backend",
            _value(vllm_config, "parallel_config.data_parallel_backend", "mp"),
            "mp",
            "over several hosts use --data-parallel-address",
        ),
        ("--enable-elastic-ep", _value(vllm_config, "parallel_config.enable_elastic_ep", False), False, "leave it out"),
        ("--enable-dbo", _value(vllm_config, "parallel_config.enable_dbo", False), False, "leave it out"),
        ("--ubatch-size", _value(vllm_config, "parallel_config.ubatch_size", 0), 0, "leave it out"),
        ("--enable-lora", vllm_config.lora_config is not None, False, "leave it out"),
        ("--enable-sleep-mode", _value(vllm_config, "model_config.enable_sleep_mode", False), False, "leave it out"),
        (
            "--weight-transfer-config",
            _value(vllm_config, "weight_transfer_config", None) is not None,
            False,
            "update weights through the workers' reload_weights",
        ),
        ("--cpu-offload-gb", _value(vllm_config, "offload_config.uva.cpu_offload_gb", 0), 0, "leave it out"),
        (
            "--offload-group-size",
            _value(vllm_config, "offload_config.prefetch.offload_group_size", 0),
            0,
            "leave it out",
        ),
        (
            "--speculative-config with a draft model that has experts, of method",
            drafter.method if has_experts(drafter) else "mtp",
            "mtp",
            "use a draft model without experts",
        ),
        (
            "a draft model that has experts, and --pipeline-parallel-size",
            stages if has_experts(drafter) else 1,
            1,
            "use one of the two",
        ),
        (  # each rank would route a slice of the drafter's batch, whose length with padding it does not say
            "a draft model that has experts, and --data-parallel-size with --tensor-parallel-size",
            parallel.tensor_parallel_size if has_experts(drafter) and parallel.data_parallel_size > 1 else 1,
            1,
            "use one of the two",
        ),
        (  # a map is of the layers of one model
            "an expert_map_path or expert_map_record_path, and a draft model that has experts,",
            has_map and has_experts(drafter),
            False,
            "use one of the two",
        ),
        (
            "inductor_compile_config.freezing",
            _freezes(vllm_config.compilation_config, "freezing"),
            False,
            "it constant-folds weights that EPLB must move",
        ),
        (
            "inductor_compile_config.max_autotune",
            vllm_config.device_config.device_type == "cpu" and _freezes(vllm_config.compilation_config, "max_autotune"),
            False,
            "on a CPU it constant-folds weights that EPLB must move",
        ),
    )
    refuse_options(options)


def _value(config: Any, path: str, default: object) -> Any:
    """What is at ``path`` of a configuration; ``default`` where this vLLM has no such thing."""
    for name in path.split("."):
        config = getattr(config, name, None)
        if config is None:
            return default
    return config
