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
from dataclasses import dataclass
from typing import Any

from ...files.disk import FileError, parse_json, read_bounded, show
from ...files.expert_map import MAX_MAP_BYTES, ExpertMapError, read_expert_map
from ...settings.messages import EplbConfigError
from ..handed_over import HandedOver, settings_of

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
