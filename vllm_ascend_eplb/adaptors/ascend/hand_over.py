# SPDX-License-Identifier: Apache-2.0
"""The settings on their way through vllm-ascend, which knows a part of ``eplb_config`` and refuses other keys.

In the front-end process, before vLLM builds its configuration, ``hand_over`` takes our settings out of ``eplb_config``
and leaves the keys that vllm-ascend accepts; in the workers, ``settings_of`` reads the settings again. They travel as
an attribute of that dictionary (:class:`HandedOver`): vllm-ascend refuses unknown keys since 0.30, and vLLM copies its
configuration field by field.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from typing import Any

from ...files.disk import FileError, parse_json, read_bounded, show
from ...files.expert_map import MAX_MAP_BYTES, ExpertMapError, read_expert_map
from ...settings.config import EplbConfig
from ...settings.messages import EplbConfigError
from ...values.placement import Placement
from ..engine import Verdict
from ..handed_over import HandedOver, settings_of
from ..vllm.versions import unchecked_line

logger = logging.getLogger("vllm.eplb")


CHECKED_VERSIONS = ("0.23.0.post1", "0.30.0rc2")
"""Releases of vllm-ascend whose sources were read and on which the tests ran."""


IN_VLLMS_ORDER = ("0.30.0rc2",)
"""Releases whose first model runner loads weights in vLLM's order, whatever its own ``expert_map_path`` says. There the
map is not handed over: the weights are loaded by the loader of this package."""


SWITCH = "DYNAMIC_EPLB"
"""Environment variable without which vllm-ascend refuses dynamic_eplb."""


SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""Environment variable that chooses vLLM's second model runner, which reads other settings than the first."""


SECOND_RUNNER_VERSIONS = ("0.30.0rc2",)
"""Releases of vllm-ascend whose second model runner is balanced, too."""


@dataclass(frozen=True)
class Needed:
    """An environment variable that balancing needs.

    Attributes:
        name: of the variable.
        value: what it is set to where it is unset.
        accepted: values that it may have.
        because: what happens with other values, for the error message.
    """

    name: str
    value: str
    accepted: tuple[str, ...]
    because: str


NEEDED = (
    Needed(SWITCH, "true", ("true", "1"), "with which vllm-ascend refuses it"),
    Needed(SECOND_RUNNER, "0", ("0",), "and only the first model runner of this vllm-ascend is balanced"),
)
"""What dynamic balancing needs in the environment with the first model runner."""


NEEDED_BY_SECOND = (Needed(SWITCH, "false", ("false", "0"), "with which its second model runner does not start"),)
"""And with the second."""


STOCK_KEYS = ("expert_heat_collection_interval", "algorithm_execution_interval", "num_redundant_experts")
"""The keys that vllm-ascend gets, besides ``dynamic_eplb`` and the map to load by. Not the policy: with its number 3
the layers of vllm-ascend count load in another form. Not the map to record: vllm-ascend would write the same file."""


def on_ascend() -> bool:
    """Whether vLLM runs on the platform of vllm-ascend."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type) == "npu"


def verdict(config: EplbConfig) -> Verdict:
    """Whether the installed vllm-ascend is balanced.

    Only checked releases are balanced by default: layers and loading of vllm-ascend changed their meaning between
    release candidates without changing a name that a self-test could miss.
    """
    version = installed_version()
    if version in ("", *CHECKED_VERSIONS) or config.allow_unchecked_vllm:
        return Verdict(True)
    return Verdict(False, unchecked_line("vllm-ascend", CHECKED_VERSIONS, version))


def without_settings(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration without ``eplb_config``."""
    return {key: value for key, value in additional_config.items() if key != "eplb_config"}


def installed_version() -> str:
    """The version of vllm-ascend; empty where it is not installed."""
    try:
        return importlib.metadata.version("vllm-ascend")
    except importlib.metadata.PackageNotFoundError:
        return ""


def hand_over(additional_config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration in the form that vllm-ascend accepts: its own keys in ``eplb_config``, none of ours.

    Sets the environment variables that this needs; processes started later inherit them. Where balancing stays off, the
    result has no ``eplb_config``, and the log says why.

    Raises:
        EplbConfigError: a setting cannot work, or the environment contradicts it.
    """
    config = settings_of(additional_config)
    if not config.active or isinstance(additional_config["eplb_config"], HandedOver):
        return additional_config
    version = installed_version()
    allowed = verdict(config)
    if not allowed.balances:
        logger.warning(allowed.warning)
        return without_settings(additional_config)
    if second_runner():
        _require(NEEDED_BY_SECOND)
        return {**additional_config, "eplb_config": HandedOver({}, config)}
    if config.weighted_dispatch:
        raise EplbConfigError(
            "eplb_config.weighted_dispatch = true is not supported by vllm-ascend's first model runner in this version "
            f"(allowed: false); leave it out{_or_the_second_runner(version)}"
        )
    switch_on()
    # Also with a static placement: only then does its runner build the classes that ours replace.
    stock = {"dynamic_eplb": True, **{key: getattr(config, key) for key in STOCK_KEYS}}
    if config.expert_map_path is not None:
        placement = _read_map(config.expert_map_path)
        if version in IN_VLLMS_ORDER:
            stock["num_redundant_experts"] = placement.num_slots - placement.num_experts
        else:
            stock["expert_map_path"] = config.expert_map_path
    return {**additional_config, "eplb_config": HandedOver(stock, config)}


def _or_the_second_runner(version: str) -> str:
    return f", or: export {SECOND_RUNNER}=1" if version in SECOND_RUNNER_VERSIONS else ""


def _read_map(path: str) -> Placement:
    """Reads a map that weights will be loaded by.

    Raises:
        EplbConfigError: the file is not a map, not in vllm-ascend's form, or has an expert twice on a device.
    """
    try:
        form = parse_json(read_bounded(path, MAX_MAP_BYTES, "expert map"), path) if path.endswith(".json") else None
        if not isinstance(form, dict) or "layer_list" not in form:
            raise EplbConfigError(
                f"eplb_config.expert_map_path: {show(path)} is not in the form that vllm-ascend loads weights by, JSON "
                "with a layer_list in a file that ends in .json; make one with: vllm-ascend-eplb convert"
            )
        return read_expert_map(path)
    except (ExpertMapError, FileError) as error:
        raise EplbConfigError(f"eplb_config.expert_map_path: {error}") from None


def second_runner() -> bool:
    """Whether the second model runner is chosen, on a vllm-ascend where it is balanced."""
    return installed_version() in SECOND_RUNNER_VERSIONS and os.environ.get(SECOND_RUNNER) == "1"


def contradictions() -> list[Needed]:
    """Environment variables whose values contradict dynamic balancing on vllm-ascend."""
    return _unmet(NEEDED_BY_SECOND if second_runner() else NEEDED)


def _unmet(needed: tuple[Needed, ...]) -> list[Needed]:
    return [entry for entry in needed if os.environ.get(entry.name, entry.value).lower() not in entry.accepted]


def switch_on() -> None:
    """Sets the environment variables that dynamic balancing needs with the first model runner.

    Raises:
        EplbConfigError: a variable has another value.
    """
    _require(NEEDED)
    os.environ.update({entry.name: entry.value for entry in NEEDED})


def _require(needed: tuple[Needed, ...]) -> None:
    for entry in _unmet(needed):
        raise EplbConfigError(
            f"eplb_config.dynamic_eplb is true, but the environment says {entry.name}={os.environ[entry.name]}, "
            f"{entry.because}; unset it, or: export {entry.name}={entry.value}"
        )
