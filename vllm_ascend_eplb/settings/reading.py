# SPDX-License-Identifier: Apache-2.0
"""Converts values from other programs to the type of a setting where that is unambiguous.

vLLM and vllm-ascend check settings with pydantic, which accepts ``"true"`` as a boolean and ``"600"`` as a number. YAML
turns ``1e-2`` into a string; scripts pass ``Path`` and NumPy scalars. An ambiguous value is left as it is, and the
schema refuses it: a boolean is not a number, and text is a number only if it is written as one.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from pydantic.fields import FieldInfo

from ..files.disk import expand_user
from .messages import base_type

_NUMBER = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?", re.ASCII)


_BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
"""Words for booleans that pydantic accepts."""


MAP_PATHS = ("expert_map_path", "expert_map_record_path")
"""Settings that are paths of maps."""

PATHS = (*MAP_PATHS, "calibration_path")
"""Settings that are paths."""


def taken(value: object, field: FieldInfo) -> object:
    """A value converted to the type of its setting; unchanged if it has none of the forms above."""
    value, base = _plain(value), base_type(field)
    if base is bool:
        return _boolean(value)
    if base is int:
        return _integer(value)
    if base is float:
        return _number(value)
    if base is list and isinstance(value, (list, tuple)):
        return [_number(_plain(entry)) for entry in value]
    return value


def taken_path(value: object) -> object:
    """A path as text, with ``~`` expanded, because no shell expands it inside JSON."""
    value = _plain(value)
    return expand_user(value) if isinstance(value, str) else value


def says_off(settings: object) -> bool:
    """Whether settings turn the balancer off: ``dynamic_eplb`` is false in any spelling, and no map is given."""
    if not isinstance(settings, Mapping) or "dynamic_eplb" not in settings:
        return False
    return _boolean(_plain(settings["dynamic_eplb"])) is False and not any(
        is_something(settings.get(name)) for name in MAP_PATHS
    )


def is_something(value: object) -> bool:
    """Whether a value asks for anything: not null, false, zero or empty in any spelling."""
    value = _plain(value)
    if value is None or value is False or (isinstance(value, (str, list, tuple, Mapping)) and not value):
        return False
    return _boolean(value) is not False


def _plain(value: object) -> object:
    """Python's own value for NumPy's and torch's scalars, decimal numbers, paths, enumerations and one-dimensional
    arrays."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
        return path if isinstance(path, str) else value
    if type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, Decimal):  # also of subclasses, which YAML readers make to keep a number's form
        if isinstance(value, kind) and not isinstance(value, np.generic):
            return float(value) if kind is Decimal else kind(value)
    array: Any = value
    try:
        if isinstance(value, np.generic) or getattr(value, "shape", None) == ():
            return array.item()
        if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") and len(array) <= 1 << 16:
            return array.tolist()
    except Exception:  # an object of somebody's that only looks like a scalar or an array
        return value
    return str(value) if isinstance(value, str) else value


def _boolean(value: object) -> object:
    if isinstance(value, str):
        return _BOOLEANS.get(value[:10].strip().lower(), value)
    if type(value) in (int, float) and value in (0, 1):
        return bool(value)
    return value


def _integer(value: object) -> object:
    number: Any = value
    if isinstance(value, str):
        text = value[:100].strip()
        if not _NUMBER.fullmatch(text):
            return value
        if text.lstrip("+-").isdigit():
            return int(text)
        number = float(text)
    if type(number) is float and abs(number) < 1 << 53 and number == int(number):
        return int(number)
    return value


def _number(value: object) -> object:
    if isinstance(value, str) and _NUMBER.fullmatch(value[:100].strip()):
        return float(value)
    return value
