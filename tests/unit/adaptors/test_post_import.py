# SPDX-License-Identifier: Apache-2.0
"""Patches run once, after a module was executed, however the module is imported."""

import importlib
import sys

import pytest

from vllm_ascend_eplb.adaptors.post_import import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "eplb_patched").mkdir()
    (tmp_path / "eplb_patched" / "__init__.py").write_text("")
    (tmp_path / "eplb_patched" / "inner.py").write_text("value = 1\n")
    yield "eplb_patched.inner"
    for name in ("eplb_patched", "eplb_patched.inner"):
        sys.modules.pop(name, None)


def test_patch_waits_for_the_import(module):
    seen = []
    after_import(module, lambda m: seen.append(m.value))
    after_import(module, lambda m: setattr(m, "value", 2))
    assert module not in sys.modules
    assert seen == []
    loaded = importlib.import_module(module)
    assert seen == [1]
    assert loaded.value == 2
    importlib.reload(loaded)
    assert seen == [1]


def test_imported_module_is_patched_at_once(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda m: seen.append(m.value))
    assert seen == [1]


def test_other_imports_are_left_alone(module):
    after_import("eplb_patched.absent", lambda m: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("eplb_patched.absent")
    assert importlib.import_module(module).value == 1


def test_failing_import_still_fails(module, tmp_path):
    (tmp_path / "eplb_patched" / "broken.py").write_text("raise ZeroDivisionError\n")
    after_import("eplb_patched.broken", lambda m: None)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("eplb_patched.broken")
