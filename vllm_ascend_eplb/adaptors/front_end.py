# SPDX-License-Identifier: Apache-2.0
"""Turns the balancer on in a vLLM configuration, in the front-end process, before any worker starts."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from ..observe import prometheus as metrics
from ..observe.stats_file import note_first_rank, provide_stats_path
from ..settings.config import EplbConfig, remarks
from ..settings.fit import ModelShape, ServerShape, fit, refuse_vllms_own
from ..settings.messages import EplbConfigError
from .ascend import hand_over as ascend_config
from .ascend import refusals as ascend_refusals
from .handed_over import settings_of
from .parts import parts_of, pipeline_parts
from .vllm.refusals import refuse_what_is_not_supported
from .vllm.seams import CHECKED_VERSIONS, is_checked
from .vllm.worker import worker_class_name

logger = logging.getLogger("vllm.eplb")


def hook(engine_args: type) -> None:
    """Wraps ``EngineArgs.create_engine_config``; idempotent."""
    original = engine_args.create_engine_config  # type: ignore[attr-defined]
    if getattr(original, "_eplb", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = settings_of(self.additional_config)
        for line in remarks(self.additional_config):
            logger.warning(line)
        if not config.active:
            return original(self, *args, **kwargs)
        refuse_vllms_own(config, self.enable_eplb, self.eplb_config)
        try:
            vllm_config = original(_with_switch(self, config), *args, **kwargs)
        except EplbConfigError:
            raise
        except Exception:
            _explain(self, config)
            raise
        _balance(vllm_config, config)
        return vllm_config

    create_engine_config._eplb = True  # type: ignore[attr-defined]
    engine_args.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def _with_switch(engine_args: Any, config: EplbConfig) -> Any:
    """The arguments with vLLM's own switch for EPLB on, where vLLM's checks of it apply: not on a CPU, for which they
    refuse it whatever else is given; there the switch is set behind them. On Ascend, with the settings in the form that
    vllm-ascend accepts."""
    import vllm
    from vllm.platforms import current_platform

    switched = copy.copy(engine_args)
    if ascend_config.on_ascend():
        switched.additional_config = ascend_config.hand_over(engine_args.additional_config)
        if not (ascend_config.second_runner() and settings_of(switched.additional_config).active):
            return switched
    else:
        unchecked = not is_checked(vllm.__version__) and not config.allow_unchecked_vllm
        if current_platform.is_cpu() or unchecked or not engine_args.enable_expert_parallel:
            return engine_args
    switched.enable_eplb = True
    switched.eplb_config = _eplb_config(switched.eplb_config, config.num_redundant_experts)
    return switched


def _eplb_config(given: Any, num_redundant: int) -> Any:
    """vLLM's settings of its own balancer, as ours needs them; a copy, because others hold the same object."""
    made = copy.copy(given)
    made.num_redundant_experts = num_redundant
    made.use_async = ascend_config.on_ascend()  # which vllm-ascend turns on in any case, with a warning
    made.communicator = made.communicator or "torch_gloo"
    return made


def _explain(engine_args: Any, config: EplbConfig) -> None:
    """Where vLLM refuses a configuration for a reason of ours as well, ours says the way out.

    Raises:
        EplbConfigError: there is such a reason.
    """
    try:
        model = engine_args.create_model_config()
        num_experts, num_layers = model.get_num_experts(), moe_layers(model)
        if ascend_config.on_ascend() and engine_args.speculative_config is not None:
            num_layers = None  # a map may be of the drafter's layers, too
    except Exception:  # vLLM's own error says what is wrong with the model
        return
    server = ServerShape(_expert_parallel_size(engine_args), engine_args.enable_expert_parallel)
    fit(config, ModelShape(num_experts, num_layers), server)


def _balance(vllm_config: Any, config: EplbConfig) -> None:
    """Checks the settings against model and server, and changes the configuration so that the workers balance.

    Raises:
        EplbConfigError: what cannot work, and the way out.
    """
    import vllm

    if ascend_config.on_ascend() and not settings_of(vllm_config.additional_config).active:
        return  # a release that was not checked
    parallel = vllm_config.parallel_config
    note_first_rank(parallel.data_parallel_rank)
    num_layers = moe_layers(vllm_config.model_config)
    if ascend_config.on_ascend():
        num_layers = ascend_refusals.layers_of_map(config, num_layers, vllm_config.speculative_config)
    model = ModelShape(vllm_config.model_config.get_num_experts(), num_layers)
    num_redundant = fit(config, model, ServerShape(_expert_parallel_size(parallel), parallel.enable_expert_parallel))
    if ascend_config.on_ascend():
        ascend_refusals.refuse_what_is_not_supported(vllm_config)
        if not ascend_config.second_runner():
            # The layers of a drafter are balanced among the model's.
            _say_on(pipeline_parts(parallel.pipeline_parallel_size), config, num_redundant)
            return
    else:
        refuse_what_is_not_supported(vllm_config, config)
        if not is_checked(vllm.__version__) and not config.allow_unchecked_vllm:
            ascend_config.warn_of_unchecked("vLLM", CHECKED_VERSIONS, vllm.__version__)
            return
    # The models build redundant slots and routers with a placement only where vLLM's own switch is on. Its validation
    # has run by now, so on a CPU, where it would refuse, the switch can be set all the same.
    parallel.eplb_config = _eplb_config(parallel.eplb_config, num_redundant)
    parallel.enable_eplb = True
    parallel.worker_cls = worker_class_name(parallel.worker_cls)
    _say_on(parts_of(vllm_config), config, num_redundant)


def _say_on(parts: list[str], config: EplbConfig, num_redundant: int) -> None:
    """Opens what other processes are told through, and says in the log what is on.

    Args:
        parts: the server's balancers, where it has several.
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
    """How many layers of a model have experts, L; None where its configuration does not say it in a way known here.

    The rules are those of vLLM's models: DeepSeek's ``first_k_dense_replace`` and ``moe_layer_freq`` (a number, or a
    list of flags), Qwen's ``mlp_only_layers`` and ``decoder_sparse_step``.
    """
    settings = model_config.hf_text_config
    layers = range(model_config.get_total_num_hidden_layers())
    frequency = getattr(settings, "moe_layer_freq", None)
    if isinstance(frequency, (list, tuple)):
        return sum(1 for each in frequency if each)
    if isinstance(getattr(settings, "first_k_dense_replace", None), int):
        every = frequency or 1
        return sum(1 for layer in layers if layer >= settings.first_k_dense_replace and layer % every == 0)
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
