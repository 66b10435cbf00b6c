# SPDX-License-Identifier: Apache-2.0
"""The settings on their way through vllm-ascend, which knows a part of ``eplb_config`` and refuses the rest.

In the front-end process, before vLLM builds its configuration, ``hand_over`` takes our settings out of ``eplb_config``
and leaves what vllm-ascend accepts; in the workers, ``settings_of`` reads them again. They travel as an attribute of
that dictionary (:class:`HandedOver`): since 0.30 vllm-ascend refuses every key that it does not know, and vLLM copies
its own configuration field by field.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import EplbConfig, EplbConfigError, refuse_options
from ..expert_map import MAX_MAP_BYTES, ExpertMapError, read_expert_map
from ..files import FileError, parse_json, read_bounded, show
from .drafter import drafter_layers, has_experts

logger = logging.getLogger("vllm.eplb")

CHECKED_VERSIONS = ("0.23.0.post1", "0.30.0rc2")
"""Releases of vllm-ascend whose sources were read and on which the tests ran."""

DEAF_TO_MAPS = ("0.30.0rc2",)
"""Releases that load weights in vLLM's order, whatever ``expert_map_path`` says, and route by the map all the same."""

SWITCH = "DYNAMIC_EPLB"
"""Environment variable that vllm-ascend wants to be true before it accepts dynamic_eplb."""

SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""Environment variable that chooses vLLM's second model runner, which knows other settings than the first."""

SECOND_RUNNER_VERSIONS = ("0.30.0rc2",)
"""Releases of vllm-ascend whose second model runner is balanced, too."""


@dataclass(frozen=True)
class Needed:
    """An environment variable: what it is set to, what it may have been set to, and why nothing else will do."""

    name: str
    value: str
    accepted: tuple[str, ...]
    because: str


NEEDED = (
    Needed(SWITCH, "true", ("true", "1"), "with which vllm-ascend refuses it"),
    Needed(SECOND_RUNNER, "0", ("0",), "and only the first model runner of this vllm-ascend is balanced"),
)
"""What dynamic balancing needs to have in the environment for the first model runner."""

NEEDED_BY_SECOND = (Needed(SWITCH, "false", ("false", "0"), "with which its second model runner does not start"),)
"""And for the second."""

STOCK_KEYS = ("expert_heat_collection_interval", "algorithm_execution_interval", "num_redundant_experts")
"""What vllm-ascend is told besides ``dynamic_eplb`` and the map to load by. Not the policy: under its number 3 its
layers count load in another form. Not the map to record: it would write to the same file."""


class HandedOver(dict[str, Any]):
    """``eplb_config`` as :func:`hand_over` left it: what vllm-ascend is told, and our settings beside it. Copies of it,
    pickled ones too, have them as well.

    Args:
        stock: vllm-ascend's own keys.
        settings: ours, as the user gave them.
    """

    def __init__(self, stock: Mapping[str, Any], settings: EplbConfig) -> None:
        super().__init__(stock)
        # Only what was given: some defaults depend on what is left out.
        self.settings = settings.model_dump(exclude_unset=True)


def on_ascend() -> bool:
    """Whether vLLM runs on vllm-ascend's platform."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type) == "npu"


def warn_of_unchecked(what: str, checked: tuple[str, ...], version: str) -> None:
    """Says that balancing stays off with this version of vLLM or vllm-ascend, and how to have it all the same."""
    logger.warning(
        "EPLB stays off: it was checked against %s %s, and this is %s; to balance all the same, set "
        '"allow_unchecked_vllm": true in eplb_config',
        what,
        ", ".join(checked),
        version,
    )


def installed_version() -> str:
    """Of vllm-ascend; empty where it is not installed."""
    try:
        return importlib.metadata.version("vllm-ascend")
    except importlib.metadata.PackageNotFoundError:
        return ""


def settings_of(additional_config: object) -> EplbConfig:
    """Our settings, before or after :func:`hand_over`.

    Args:
        additional_config: vLLM's dictionary.

    Raises:
        EplbConfigError: a key or value that is not allowed.
    """
    given = additional_config.get("eplb_config") if isinstance(additional_config, Mapping) else None
    if isinstance(given, HandedOver):
        return EplbConfig.from_additional_config({"eplb_config": given.settings})
    return EplbConfig.from_additional_config(additional_config)


def hand_over(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration in the dialect that vllm-ascend accepts: its own keys in ``eplb_config``, none of ours.
    Sets the environment variables that this needs; processes started later inherit them. On a release that was not
    checked it is the configuration without ``eplb_config``, unless the settings say otherwise.

    Raises:
        EplbConfigError: a setting cannot work, or the environment contradicts it.
    """
    config = settings_of(additional_config)
    if not config.active or isinstance(additional_config["eplb_config"], HandedOver):
        return additional_config
    version = installed_version()
    if version not in ("", *CHECKED_VERSIONS) and not config.allow_unchecked_vllm:
        warn_of_unchecked("vllm-ascend", CHECKED_VERSIONS, version)
        return {key: value for key, value in additional_config.items() if key != "eplb_config"}
    if second_runner():
        _require(NEEDED_BY_SECOND)
        return {**additional_config, "eplb_config": HandedOver({}, config)}
    if config.weighted_dispatch:
        raise EplbConfigError(
            "eplb_config.weighted_dispatch = true is not supported by vllm-ascend's first model runner in this version "
            f"(allowed: false); leave it out{_or_the_second_runner(version)}"
        )
    switch_on()
    # Also for a placement that stays: only then does its runner build what ours stands in for, and route by our tables.
    stock = {"dynamic_eplb": True, **{key: getattr(config, key) for key in STOCK_KEYS}}
    if config.expert_map_path is not None:
        if version in DEAF_TO_MAPS:
            raise EplbConfigError(
                f"eplb_config.expert_map_path = {show(config.expert_map_path)} cannot be used with vllm-ascend "
                f"{version}, which loads weights in vLLM's order whatever a map says (allowed: null); leave it out"
            )
        _check_map(config.expert_map_path)
        stock["expert_map_path"] = config.expert_map_path
    return {**additional_config, "eplb_config": HandedOver(stock, config)}


def _or_the_second_runner(version: str) -> str:
    return f", or: export {SECOND_RUNNER}=1" if version in SECOND_RUNNER_VERSIONS else ""


def _check_map(path: str) -> None:
    """The map is read by vllm-ascend, which loads the weights by it.

    Raises:
        EplbConfigError: it is not in vllm-ascend's form, no map at all, or has an expert twice on a device.
    """
    try:
        form = parse_json(read_bounded(path, MAX_MAP_BYTES, "expert map"), path) if path.endswith(".json") else None
        if not isinstance(form, dict) or "layer_list" not in form:
            raise EplbConfigError(
                f"eplb_config.expert_map_path: {show(path)} is not in the form that vllm-ascend loads weights by, JSON "
                "with a layer_list in a file that ends in .json; make one with: vllm-ascend-eplb convert"
            )
        read_expert_map(path)
    except (ExpertMapError, FileError) as error:
        raise EplbConfigError(f"eplb_config.expert_map_path: {error}") from None


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


def second_runner() -> bool:
    """Whether the second model runner is chosen, on a vllm-ascend where it is balanced."""
    return installed_version() in SECOND_RUNNER_VERSIONS and os.environ.get(SECOND_RUNNER) == "1"


def contradictions() -> list[Needed]:
    """What the environment sets otherwise than dynamic balancing on vllm-ascend needs it."""
    return _unmet(NEEDED_BY_SECOND if second_runner() else NEEDED)


def _unmet(needed: tuple[Needed, ...]) -> list[Needed]:
    return [its for its in needed if os.environ.get(its.name, its.value).lower() not in its.accepted]


def switch_on() -> None:
    """Sets what dynamic balancing by the first model runner needs to have in the environment.

    Raises:
        EplbConfigError: something of it is set to something else.
    """
    _require(NEEDED)
    os.environ.update({its.name: its.value for its in NEEDED})


def _require(needed: tuple[Needed, ...]) -> None:
    for its in _unmet(needed):
        raise EplbConfigError(
            f"eplb_config.dynamic_eplb is true, but the environment says {its.name}={os.environ[its.name]}, "
            f"{its.because}; unset it, or: export {its.name}={its.value}"
        )


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
            "a drafter that has experts, and --pipeline-parallel-size",
            stages if has_experts(drafter) else 1,
            1,
            "use one of the two",
        ),
        (  # there it is a model of its own, and a map is of the layers of one
            f"an expert_map_path or expert_map_record_path, and a drafter that has experts, with {SECOND_RUNNER}=1",
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
            "--speculative-config with a drafter that has experts, of method",
            drafter.method if has_experts(drafter) else "mtp",
            "mtp",
            "use a drafter without experts",
        ),
        ("additional_config.mix_placement", bool(additional.get("mix_placement")), False, "leave it out"),
        ("additional_config.enable_fused_mc2", additional.get("enable_fused_mc2", 0), 0, "leave it out"),
    )
    refuse_options(options, engine="vllm-ascend")
