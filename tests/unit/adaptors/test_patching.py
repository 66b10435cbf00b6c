# SPDX-License-Identifier: Apache-2.0
"""patch_once replaces an attribute once, and only on the given object."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest

from vllm_ascend_eplb.adaptors.patching import is_patch, patch_once


def louder(original: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any) -> str:
        return str(original(*args)) + "!"

    return call


class Runner:
    def say(self) -> str:
        return "hello"


def test_second_patch_changes_nothing() -> None:
    class Patched(Runner):
        pass

    first = patch_once(Patched, "say", louder)
    assert patch_once(Patched, "say", louder) is first
    assert Patched().say() == "hello!"
    assert Runner().say() == "hello"


def test_instance_is_patched_alone() -> None:
    patched, untouched = Runner(), Runner()
    for _ in range(2):
        patch_once(patched, "say", louder)
    assert (patched.say(), untouched.say()) == ("hello!", "hello")


def test_class_in_a_module_is_replaced_once() -> None:
    module: Any = ModuleType("engine")
    module.Worker = Runner
    made = patch_once(module, "Worker", lambda base: type("Balanced", (base,), {}))
    assert issubclass(made, Runner)
    module.Worker = type("Users", (made,), {})  # a user's subclass of our class balances, too
    assert patch_once(module, "Worker", lambda base: None) is module.Worker
    assert not is_patch(Runner)


def test_objects_that_answer_to_any_name_are_patched() -> None:
    class Platform:
        def __getattr__(self, name: str) -> str:
            return name

    module: Any = ModuleType("parallel")
    module.platform = Platform()
    made = patch_once(module, "platform", lambda original: Runner())
    assert isinstance(made, Runner)
    assert patch_once(module, "platform", lambda original: None) is made


def test_missing_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError, match="shout"):
        patch_once(Runner(), "shout", louder)
