# SPDX-License-Identifier: Apache-2.0
"""The settings as workers find them in vLLM's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..settings.config import EplbConfig


class HandedOver(dict[str, Any]):
    """``eplb_config`` after :func:`hand_over`: the keys for vllm-ascend, and our settings as an attribute, which copies
    and pickles keep.

    Args:
        stock: vllm-ascend's own keys.
        settings: our settings, as the user gave them.
    """

    def __init__(self, stock: Mapping[str, Any], settings: EplbConfig) -> None:
        super().__init__(stock)
        # Only keys that were given: some defaults depend on whether a key was left out.
        self.settings = settings.model_dump(exclude_unset=True)


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
