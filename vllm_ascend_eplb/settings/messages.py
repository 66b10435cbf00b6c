# SPDX-License-Identifier: Apache-2.0
"""The words of errors about settings: value, allowed range, way out."""

from __future__ import annotations

import difflib
import math
import reprlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

import annotated_types
from pydantic.fields import FieldInfo


class EplbConfigError(ValueError):
    """A setting that cannot work. The message is one line: key, value, what is allowed, way out."""


MOVED_INTO_EPLB_CONFIG = {
    "dynamic_eplb": "dynamic_eplb",
    "expert_map_path": "expert_map_path",
    "expert_map_record_path": "expert_map_record_path",
    "eplb_policy_type": "eplb_policy_type",
    "num_redundant_experts": "num_redundant_experts",
    "num_iterations_eplb_update": "expert_heat_collection_interval",
    "num_wait_worker_iterations": "algorithm_execution_interval",
    "init_redundancy_expert": "num_redundant_experts",
}
"""Settings that once stood at the top level of additional_config, and where they stand now."""


RENAMED = {old: new for old, new in MOVED_INTO_EPLB_CONFIG.items() if old != new}


RENAMED["load_collection_phase"] = "eplb_heat_collection_stage"


OF_OTHERS = {"load_collection_phase", "stair_config"}
"""Settings of vllm-ascend's own EPLB under its second model runner, which stand at the same place."""


def unknown_key(key: object, known: tuple[str, ...]) -> str:
    name = key if isinstance(key, str) else ""
    if name in RENAMED:
        whose = "the name of another EPLB's setting" if name in OF_OTHERS else "an old name"
        return f"eplb_config.{name} is {whose}; write {RENAMED[name]} instead"
    near = difflib.get_close_matches(name[:200].lower().replace("-", "_"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"eplb_config has no setting {show_value(key)}; {hint}"


def bad_value(key: str, value: object, field: FieldInfo) -> str:
    default = to_json(field.default)
    base, hint = _base_type(field), ""
    right_type = type(value) is base or (base is float and type(value) is int)
    if not right_type:
        wrong = kind_of(value)
    elif base is str:
        wrong = "not one of the choices" if _choices(field) else "no path"
    else:
        wrong = "no list of such numbers" if base is list else "out of range"
    if isinstance(value, str):
        hint = _hint_for_text(value, field)
    elif isinstance(value, float) and base is int and math.isfinite(value) and value == int(value):
        hint = f" (write {int(value)} without a decimal point)"
    return (
        f"eplb_config.{key} = {show_value(value)} is {wrong}; allowed: {allowed_of(field)}{hint}; "
        f"leave it out for the default, {default}"
    )


def _hint_for_text(value: str, field: FieldInfo) -> str:
    base = _base_type(field)
    if base is bool and value.lower() in ("true", "false"):
        return f" (write {value.lower()} without quotes)"
    if base in (int, float) and value.replace(".", "", 1).isascii() and value.replace(".", "", 1).isdigit():
        return f" (write {_clip(value)} without quotes)"
    choices = _choices(field)
    near = difflib.get_close_matches(value[:200].lower(), choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """The members of a field's type, without None."""
    annotation = field.annotation
    if typing.get_origin(annotation) is Literal:
        return (annotation,)
    return tuple(a for a in typing.get_args(annotation) if a is not type(None)) or (annotation,)


def _choices(field: FieldInfo) -> tuple[str, ...]:
    only = _alternatives(field)[0]
    return tuple(typing.get_args(only)) if typing.get_origin(only) is Literal else ()


def _base_type(field: FieldInfo) -> Any:
    only = _alternatives(field)[0]
    return str if _choices(field) else typing.get_origin(only) or only


def allowed_of(field: FieldInfo) -> str:
    """What a field accepts, in words, from the very constraints that check it."""
    low = next((m.ge for m in field.metadata if isinstance(m, annotated_types.Ge)), None)
    high = next((m.le for m in field.metadata if isinstance(m, annotated_types.Le)), None)
    base, choices = _base_type(field), _choices(field)
    if choices:
        text = " | ".join(choices)
    elif base is bool:
        text = "true | false"
    elif base is int:
        text = f"integer {low}..{high}"
    elif base is float:
        text = f"number {low}..{high}"
    elif base is list:
        entry = typing.get_args(typing.get_args(_alternatives(field)[0])[0])[1]
        low, high = (next(getattr(m, name) for m in entry.metadata if hasattr(m, name)) for name in ("ge", "le"))
        text = f"list of numbers {low}..{high}"
    else:
        text = "a path"
    return f"{text} | null" if type(None) in typing.get_args(field.annotation) else text


def to_json(value: object) -> str:
    """A default or constant as it is written in JSON."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number with a decimal point"),
    (str, "a string"),
    (Mapping, "a dictionary"),
    (list, "a list"),
)


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    return next((name for kind, name in _KINDS if isinstance(value, kind)), f"of type {type(value).__name__}")


_repr = reprlib.Repr()


_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def show_value(value: object) -> str:
    """A value as JSON would show it, on one line and of bounded length."""
    if value is None or isinstance(value, bool):
        return to_json(value)
    try:
        text = _repr.repr(value)
    except Exception:  # an integer too long to print, an object whose __repr__ fails
        text = f"<{type(value).__name__}>"
    return _clip(" ".join(text.split()))


def _clip(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
