# SPDX-License-Identifier: Apache-2.0
"""What the balancer does not support on vLLM, refused before any worker starts."""

from __future__ import annotations

from typing import Any

from ...settings.config import EplbConfig
from ...settings.fit import refuse_options
from ..parts import has_experts
from ..refusals import Option, common_options, sleeps, transfers_weights, value_at
from .cooperative import beside_nccl, is_megakernel
from .ep_backends import beside_ep_backend


def refuse_unsupported(vllm_config: Any, config: EplbConfig) -> None:
    """Refuses ways to run a model in which balancing is not proved right in this version.

    Raises:
        EplbConfigError: the configuration has one of them.
    """
    parallel, draft = vllm_config.parallel_config, has_experts(vllm_config.speculative_config)
    options = (
        *common_options(vllm_config, config, draft_methods=("mtp", "eagle")),
        ("--distributed-executor-backend", executor(vllm_config), "mp", "leave it out"),
        (
            "--data-parallel-backend",
            value_at(vllm_config, "parallel_config.data_parallel_backend", "mp"),
            "mp",
            "over several hosts use --data-parallel-address",
        ),
        *beside_new_weights(vllm_config),
        (  # transport pull reads peers' memory through a mapping, which is not valid any more after sleep
            '--enable-sleep-mode and "transport"',
            config.transport if sleeps(vllm_config) else "gloo",
            "gloo",
            "set it",
        ),
        (  # no test has both
            "a draft model with experts and --enable-dbo or --ubatch-size",
            draft and bool(value_at(vllm_config, "parallel_config.use_ubatching", False)),
            False,
            "leave one of them out",
        ),
        *(  # no test has both
            (
                f"a draft model with experts and --{name}-context-parallel-size",
                size if draft else 1,
                1,
                "use one of the two",
            )
            for name, size in (
                ("prefill", parallel.prefill_context_parallel_size),
                ("decode", parallel.decode_context_parallel_size),
            )
        ),
        ("--cpu-offload-gb", value_at(vllm_config, "offload_config.uva.cpu_offload_gb", 0), 0, "leave it out"),
        (
            "--offload-group-size",
            value_at(vllm_config, "offload_config.prefetch.offload_group_size", 0),
            0,
            "leave it out",
        ),
        (  # each rank would route a slice of the draft model's batch, and its padded length is not known
            "a draft model with experts and --data-parallel-size with --tensor-parallel-size",
            parallel.tensor_parallel_size if draft and parallel.data_parallel_size > 1 else 1,
            1,
            "use one of the two",
        ),
        (  # each stage has a balancer of its own, which knows the placement of its layers only
            "an expert_map_record_path and --pipeline-parallel-size",
            parallel.pipeline_parallel_size if config.expert_map_record_path is not None else 1,
            1,
            "use one of the two",
        ),
        (
            "inductor_compile_config.freezing",
            _freezes(vllm_config.compilation_config, "freezing"),
            False,
            "it constant-folds weights that the balancer must move",
        ),
        (
            "inductor_compile_config.max_autotune",
            vllm_config.device_config.device_type == "cpu" and _freezes(vllm_config.compilation_config, "max_autotune"),
            False,
            "on a CPU it constant-folds weights that the balancer must move",
        ),
        *beside_ep_backend(vllm_config),
        *beside_nccl(vllm_config, config),
        *beside_map(vllm_config, config),
    )
    refuse_options(options)


def beside_new_weights(vllm_config: Any) -> list[Option]:
    """Options that are unsupported together with new weights for a running server."""
    draft = has_experts(vllm_config.speculative_config)
    return [
        (f"{name} and a draft model with experts", given and draft, False, "use one of the two")
        for name, given in (
            ("--weight-transfer-config", transfers_weights(vllm_config)),
            ("--enable-sleep-mode", sleeps(vllm_config)),
        )
    ]


def beside_map(vllm_config: Any, config: EplbConfig) -> list[Option]:
    """Kernels that are unsupported with a map, because their loader takes ids of logical experts."""
    backend = value_at(vllm_config, "kernel_config.moe_backend", "auto")
    if config.expert_map_path is None or not is_megakernel(backend):
        return []
    return [("an expert_map_path and --moe-backend", backend, "any that is not a megakernel", "use one of the two")]


def executor(vllm_config: Any) -> str:
    """The executor of the workers: vLLM's name for it, or the name of a class of another package. Workers on GPUs that
    Ray started count as "mp" if vLLM's executor for Ray is a subclass of that executor."""
    backend = vllm_config.parallel_config.distributed_executor_backend
    on_gpus = vllm_config.device_config.device_type == "cuda"
    if backend == "ray" and on_gpus and _ray_is_multiprocess(vllm_config):
        return "mp"
    return backend if isinstance(backend, str) else getattr(backend, "__name__", str(backend))


def _ray_is_multiprocess(vllm_config: Any) -> bool:
    """Whether vLLM's executor for Ray is its second one. vLLM 0.30 to 0.32 choose it by an environment variable, which
    0.33 does not have."""
    from vllm import envs

    chosen = getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", None)
    if chosen is not None:
        return bool(chosen)
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    return issubclass(Executor.get_class(vllm_config), MultiprocExecutor)


def _freezes(compilation: Any, option: str) -> bool:
    """Whether inductor would constant-fold weights by an option, so that compiled code would not see moved experts. On
    a CPU vLLM turns freezing on with max_autotune."""
    from torch._inductor import config

    default = option == "freezing" and config.freezing
    compiled = compilation.mode != type(compilation.mode).NONE
    return compiled and bool(compilation.inductor_compile_config.get(option, default))
