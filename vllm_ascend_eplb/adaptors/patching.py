# SPDX-License-Identifier: Apache-2.0
"""Replaces an attribute of the engine once, however often a plugin is loaded or a worker is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MARK = "_eplb_patch"


def patch_once(owner: Any, name: str, replace: Callable[[Any], Any]) -> Any:
    """Puts ``replace(original)`` in place of an attribute, unless our patch is there already.

    Args:
        owner: a module, a class or an instance; an instance is patched alone, not its class.
        name: the attribute.
        replace: makes the replacement, a function, method, class or object that can hold attributes.

    Returns:
        The patched attribute.

    Raises:
        AttributeError: ``owner`` has no such attribute.
    """
    original = getattr(owner, name)
    if is_patch(original):
        return original
    made = replace(original)
    setattr(getattr(made, "__func__", made), _MARK, True)  # a method holds no attributes of its own
    setattr(owner, name, made)
    return made


def is_patch(found: Any) -> bool:
    """Whether an object was made by :func:`patch_once`, or is a subclass of a class that was.

    Does not use ``getattr`` for the mark: some objects of vLLM answer to any attribute, and log it.
    """
    kinds = found.__mro__ if isinstance(found, type) else (found,)
    return any(_MARK in getattr(kind, "__dict__", {}) for kind in kinds)
