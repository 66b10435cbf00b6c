# SPDX-License-Identifier: Apache-2.0
"""Error messages about settings: value, allowed range, way out."""

from __future__ import annotations

import difflib
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
"""Settings that once stood at the top level of additional_config, with their names in eplb_config."""


RENAMED = {old: new for old, new in MOVED_INTO_EPLB_CONFIG.items() if old != new}


RENAMED["load_collection_phase"] = "eplb_heat_collection_stage"


OF_OTHERS = {"load_collection_phase", "stair_config"}
"""Settings of vllm-ascend's own EPLB under its second model runner, which stand in eplb_config, too."""


OF_VLLM = {
    "enable_eplb": "dynamic_eplb",
    "step_interval": "expert_heat_collection_interval",
    "num_redundant_experts": "num_redundant_experts",
    "log_balancedness_interval": "log_balancedness_interval",
    "window_size": "",
    "log_balancedness": "",
    "use_async": "",
    "communicator": "",
    "enable_migration_batching": "",
}
"""Settings of vLLM's own EPLB, and the setting here that does the same; empty if there is none."""


WITHOUT_COUNTERPART = {
    "gate_eplb": "it is a switch of older vllm-ascend releases without a counterpart here; leave it out",
    "stair_config": "it belongs to vllm-ascend's own EPLB under its second model runner; leave it out",
    "window_size": "it belongs to vLLM's own EPLB; here a window is as long as expert_heat_collection_interval",
    "log_balancedness": "it belongs to vLLM's own EPLB; write log_balancedness_interval, in steps, instead",
    "use_async": 'it belongs to vLLM\'s own EPLB; leave it out ("mode": "sync" waits for the transfers)',
    "communicator": "it belongs to vLLM's own EPLB; the setting here is transport",
    "enable_migration_batching": "it belongs to vLLM's own EPLB; leave it out",
}
"""Settings of other balancers without a counterpart here, and what to do with them."""


def unknown_key(key: object, known: tuple[str, ...]) -> str:
    """The line about a key that ``eplb_config`` does not have."""
    name = key if isinstance(key, str) else ""
    if name in RENAMED:
        whose = "the name of another EPLB's setting" if name in OF_OTHERS else "an old name"
        return f"eplb_config.{name} is {whose}; write {RENAMED[name]} instead"
    if name in WITHOUT_COUNTERPART:
        hint = WITHOUT_COUNTERPART[name]
    elif OF_VLLM.get(name):
        hint = f"it belongs to vLLM's own EPLB; write {OF_VLLM[name]} instead"
    elif "eplb_config" in name.lower() or name == "additional_config":
        hint = 'the settings stand in it directly: {"eplb_config": {"dynamic_eplb": true, ...}}'
    else:
        near = difflib.get_close_matches(name[:200].lower().replace("-", "_"), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"eplb_config has no setting {show_value(key)}; {hint}"


def bad_value(key: str, given: object, value: object, field: FieldInfo) -> str:
    """The line about a value that a setting does not accept.

    Args:
        key: name of the setting.
        given: the value as it was written.
        value: the same in the type of the setting, if it could be converted.
        field: the setting in the schema.
    """
    default = to_json(field.default)
    base, hint = base_type(field), ""
    right_type = type(value) is base or (base is float and type(value) is int)
    if given is None:
        wrong = "no value"
    elif not right_type:
        wrong = kind_of(given)
    elif base is str:
        wrong = "not one of the choices" if _choices(field) else "not a path"
    else:
        wrong = "not a list of such numbers" if base is list else "out of range"
    if isinstance(value, str):
        hint = _hint_for_text(value, field)
    return (
        f"eplb_config.{key} = {show_value(given)} is {wrong}; allowed: {allowed_of(field)}{hint}; "
        f"leave it out for the default, {default}"
    )


def _hint_for_text(value: str, field: FieldInfo) -> str:
    word = value[:200].strip().lower()
    if word in ("null", "none") and type(None) in typing.get_args(field.annotation):
        return " (write null without quotes)"
    choices = ("true", "false") if base_type(field) is bool else _choices(field)
    if base_type(field) is bool and word.startswith(("enable", "disable", "activ")):
        return f" (did you mean {'false' if word.startswith('disable') else 'true'}?)"
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
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


def base_type(field: FieldInfo) -> Any:
    """bool, int, float, list or str (also for a choice of words)."""
    only = _alternatives(field)[0]
    return str if _choices(field) else typing.get_origin(only) or only


def allowed_of(field: FieldInfo) -> str:
    """The values that a field accepts, in words, from the constraints of the schema."""
    low = next((m.ge for m in field.metadata if isinstance(m, annotated_types.Ge)), None)
    high = next((m.le for m in field.metadata if isinstance(m, annotated_types.Le)), None)
    base, choices = base_type(field), _choices(field)
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
    return clip(" ".join(text.split()))


def clip(text: str) -> str:
    """Text on one line and of bounded length."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else text[:197] + "..."
