# SPDX-License-Identifier: Apache-2.0
"""Whether the settings fit the files, the model and the server that they are given for."""

from __future__ import annotations

from collections.abc import Iterable

from ..files.disk import FileError, check_place
from ..files.map_recorder import load_path
from .messages import EplbConfigError


def refuse_options(options: Iterable[tuple[str, object, object, str]], engine: str = "") -> None:
    """Ways to start an engine for which this version has no proof that balancing is right.

    Args:
        options: name, value, allowed value and way out of each.
        engine: whose, where it matters.

    Raises:
        EplbConfigError: one of them has another value than the allowed one.
    """
    beside = f" with {engine}" if engine else ""
    for name, value, allowed, way_out in options:
        if value != allowed:
            raise EplbConfigError(
                f"eplb_config together with {name} {value} is not supported{beside} in this version (allowed: "
                f"{allowed}); {way_out}, or leave eplb_config out"
            )


def check_record_path(path: str) -> None:
    try:
        check_place(path)
        check_place(load_path(path))
    except FileError as error:
        raise EplbConfigError(f"eplb_config.expert_map_record_path: {error}") from None
