# SPDX-License-Identifier: Apache-2.0
"""Reads the settings given to ``doctor``, and checks them against the sizes of a model and a server."""

from __future__ import annotations

import json

from ..files.disk import FileError, read_bounded, show, unique_keys
from ..files.json_cause import json_cause
from ..settings.config import EplbConfig
from ..settings.fit import ModelShape, ServerShape, fit
from ..settings.messages import EplbConfigError
from .finding import Finding
from .output import CommandError

MAX_CONFIG_BYTES = 1 << 20


def read_settings(text: str | None) -> EplbConfig | None:
    """The settings of ``--config``: JSON, or a file with JSON; with or without ``eplb_config`` around them.

    Raises:
        CommandError: the text is not a JSON object.
        EplbConfigError: a setting is not allowed.
    """
    if text is None:
        return None
    where = "--config"
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise CommandError('--config is empty; write {"dynamic_eplb": true, ...}')
    if not text.lstrip().startswith(("{", "[", '"')):
        where = f"--config: {show(text)}"
        try:
            text = read_bounded(text, MAX_CONFIG_BYTES, "settings").decode("utf-8-sig")
        except UnicodeDecodeError:
            raise CommandError(f"{where} is not UTF-8 text; give settings as JSON") from None
        except FileError as error:
            raise CommandError(f"--config is neither JSON nor a file: {error}") from None
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise CommandError(f"{where} is not JSON: {json_cause(text, error)} (character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{where} is not JSON ({show(str(error))})") from None
    if not isinstance(value, dict):
        raise CommandError(f'{where} is not a JSON object; write {{"dynamic_eplb": true, ...}}')
    if "eplb_config" not in value:
        value = {"eplb_config": value}
    return EplbConfig.from_additional_config(value)


def check_settings(settings: EplbConfig | None, experts: int | None, ranks: int | None) -> list[Finding]:
    """Findings about the settings, for a model with ``experts`` logical experts on ``ranks`` ranks."""
    if settings is None:
        return []
    if not settings.active:
        return [
            Finding("settings", "note", 'dynamic_eplb is not set: nothing is switched on; set "dynamic_eplb": true')
        ]
    if experts is None or ranks is None:
        return [Finding("settings", "ok", "valid; give --experts and --ranks to check them against a model")]
    try:
        redundant = fit(settings, ModelShape(experts), ServerShape(ranks))
    except EplbConfigError as error:
        return [Finding("settings", "wrong", str(error))]
    slots = f"{(experts + redundant) // ranks} slots per rank and layer"
    if not settings.dynamic:
        return [Finding("settings", "ok", f"static placement from {settings.expert_map_path}, {slots}")]
    doing = "observing only" if settings.mode == "observe" else "balancing"
    every = f"a cycle every {settings.expert_heat_collection_interval} steps"
    return [Finding("settings", "ok", f"{doing}: policy {settings.policy_name}, {every}, {slots}")]
