# SPDX-License-Identifier: Apache-2.0
"""Turns the balancer on in a vLLM configuration, in the front-end process, before any worker starts."""

from __future__ import annotations

import functools
import logging
from typing import Any

from ..observe import prometheus as metrics
from ..observe.stats_file import note_first_rank, provide_stats_path
from ..settings.config import EplbConfig, remarks
from ..settings.fit import ModelShape, ServerShape, fit, refuse_vllms_own
from ..settings.messages import EplbConfigError
from .ascend.engine import FirstRunner, SecondRunner
from .ascend.hand_over import on_ascend, second_runner
from .engine import Engine
from .handed_over import settings_of
from .patching import patch_once
from .vllm.engine import Vllm

logger = logging.getLogger("vllm.eplb")


def hook(engine_args: type) -> None:
    """Wraps ``EngineArgs.create_engine_config``; idempotent."""
    patch_once(engine_args, "create_engine_config", _balancing)


def _balancing(original: Any) -> Any:
    """``create_engine_config`` that switches balancing on if the settings ask for it."""

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = settings_of(self.additional_config)
        for line in remarks(self.additional_config):
            logger.warning(line)
        if not config.active:
            return original(self, *args, **kwargs)
        engine = engine_in_use()
        verdict = engine.verdict(config)
        if not verdict.balances:
            vllm_config = original(engine.without_balancing(self), *args, **kwargs)
            logger.warning(verdict.warning)
            return vllm_config
        refuse_vllms_own(config, self.enable_eplb, self.eplb_config)
        try:
            vllm_config = original(engine.with_balancing(self, config), *args, **kwargs)
        except EplbConfigError:
            raise
        except Exception:
            _explain(engine, self, config)
            raise
        _balance(engine, vllm_config, config)
        if verdict.warning:
            logger.warning(verdict.warning)
        return vllm_config

    return create_engine_config


def engine_in_use() -> Engine:
    """The engine whose configuration is built: vLLM, or vllm-ascend with the chosen model runner."""
    if not on_ascend():
        return Vllm()
    return SecondRunner() if second_runner() else FirstRunner()


def _explain(engine: Engine, engine_args: Any, config: EplbConfig) -> None:
    """Raises the balancer's error, with its way out, if the balancer refuses a configuration that vLLM has refused.

    Raises:
        EplbConfigError: the balancer refuses the configuration, too.
    """
    try:
        model = engine_args.create_model_config()
        num_experts = model.get_num_experts()
        num_layers = engine.layers_of_map(config, moe_layers(model), engine_args.speculative_config)
    except Exception:  # vLLM's own error tells what is wrong with the model
        return
    server = ServerShape(_expert_parallel_size(engine_args), engine_args.enable_expert_parallel)
    fit(config, ModelShape(num_experts, num_layers), server)


def _balance(engine: Engine, vllm_config: Any, config: EplbConfig) -> None:
    """Checks the settings against model and server, and changes the configuration so that the workers balance.

    Raises:
        EplbConfigError: a setting cannot work; the message has the way out.
    """
    parallel = vllm_config.parallel_config
    note_first_rank(parallel.data_parallel_rank)
    num_layers = engine.layers_of_map(config, moe_layers(vllm_config.model_config), vllm_config.speculative_config)
    model = ModelShape(vllm_config.model_config.get_num_experts(), num_layers)
    num_redundant = fit(config, model, ServerShape(_expert_parallel_size(parallel), parallel.enable_expert_parallel))
    engine.refuse_unsupported(vllm_config, config)
    engine.switch_on(vllm_config, num_redundant)
    _announce(engine.parts(vllm_config), config, num_redundant)


def _announce(parts: list[str], config: EplbConfig, num_redundant: int) -> None:
    """Opens the statistics and metrics of the server, and logs that balancing is on.

    Args:
        parts: names of the balancers of the server; empty if there is one.
    """
    from vllm.platforms import current_platform

    doing = "static placement"
    if config.dynamic:
        provide_stats_path()
        metrics.watch(parts)
        doing = f"{config.policy_name} policy, a cycle every {config.expert_heat_collection_interval} steps"
        if config.mode == "observe":
            doing += " (observing only)"
    logger.info(
        "EPLB is on: %s, %d redundant experts%s, on %s",
        doing,
        num_redundant,
        f", starting from {config.expert_map_path}" if config.expert_map_path is not None else "",
        current_platform.device_type,
    )


def moe_layers(model_config: Any) -> int | None:
    """Number of layers with experts, L; None if the model's configuration does not have it in a known form.

    The rules are those of vLLM's models: DeepSeek's ``first_k_dense_replace`` and ``moe_layer_freq`` (a number, or a
    list of flags), Qwen's ``mlp_only_layers`` and ``decoder_sparse_step``.
    """
    settings = model_config.hf_text_config
    layers = range(model_config.get_total_num_hidden_layers())
    frequency = getattr(settings, "moe_layer_freq", None)
    if isinstance(frequency, (list, tuple)):
        return sum(1 for flag in frequency if flag)
    if isinstance(getattr(settings, "first_k_dense_replace", None), int):
        period = frequency or 1
        return sum(1 for layer in layers if layer >= settings.first_k_dense_replace and layer % period == 0)
    if isinstance(getattr(settings, "decoder_sparse_step", None), int) and settings.decoder_sparse_step > 0:
        dense = set(getattr(settings, "mlp_only_layers", None) or ())
        return sum(1 for layer in layers if layer not in dense and (layer + 1) % settings.decoder_sparse_step == 0)
    return None


def _expert_parallel_size(parallel: Any) -> int:
    return int(
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * getattr(parallel, "prefill_context_parallel_size", 1)
    )
