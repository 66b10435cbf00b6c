# SPDX-License-Identifier: Apache-2.0
"""Runs a function after a module is imported, or at once if it is imported already.

A plugin is loaded in every process of the engine, before it is known which modules that process needs. Importing
modules only to patch them would take seconds, and can close import cycles.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Patch = Callable[[ModuleType], None]


def after_import(name: str, patch: Patch) -> None:
    """Calls ``patch(module)`` when the module ``name`` has been executed."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        patch(module)
        return
    _FINDER.patches.setdefault(name, []).append(patch)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _PatchingLoader(Loader):
    def __init__(self, loader: Loader, patches: list[Patch]) -> None:
        self._loader, self._patches = loader, patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for patch in self._patches:
            patch(module)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.patches: dict[str, list[Patch]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patches = self.patches.pop(fullname, None)
        if patches is None:
            return None
        spec = importlib.util.find_spec(fullname)  # asks the other finders; this one has forgotten the name
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _PatchingLoader(spec.loader, patches)
        return spec


_FINDER = _Finder()
