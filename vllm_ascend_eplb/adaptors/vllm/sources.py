# SPDX-License-Identifier: Apache-2.0
"""Reads the source text of vLLM without importing it, because an import may take seconds, or claim a GPU."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path


class SourceError(LookupError):
    """The sources have no such module or name."""


def installed_root() -> Path | None:
    """The folder that holds the installed package ``vllm``; None where it is not installed from files."""
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]).parent if places else None


@cache
def tree(root: Path, module: str) -> ast.Module:
    """The syntax tree of a module.

    Args:
        root: the folder that holds the packages.
        module: dotted name.

    Raises:
        SourceError: there is no such file, or it cannot be parsed.
    """
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise SourceError(f"{module} cannot be read: {error}") from None


def look_up(root: Path, module: str, name: str) -> ast.AST:
    """The definition or import of a dotted name in a module, also inside of an ``if``.

    Raises:
        SourceError: there is none.
    """
    found: ast.AST = tree(root, module)
    for part in name.split("."):
        for node in ast.walk(found):
            if isinstance(node, ast.ImportFrom) and part in {alias.asname or alias.name for alias in node.names}:
                break
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part and node is not found:
                break
        else:
            raise SourceError(f"{module} has no {name}")
        found = node
    return found


def calls(function: ast.AST) -> list[str]:
    """The names of the functions that a function calls, in the order of lines."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def parameters(function: ast.AST) -> set[str]:
    """Names of the parameters of a function; empty for anything else."""
    if not isinstance(function, ast.FunctionDef):
        return set()
    return {arg.arg for arg in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]}


def attributes_of(module: ast.AST, owner: str) -> set[str]:
    """Attributes that a module uses of an expression, such as ``self.state``."""
    nodes = (node for node in ast.walk(module) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if ast.unparse(node.value) == owner}


def inherits(root: Path, module: str, name: str, base: str) -> bool:
    """Whether a class has a class named ``base`` among its ancestors, as far as the sources show.

    A base class that is not a plain name, or whose module is outside of ``root``, counts as none.

    Raises:
        SourceError: there is no such class.
    """
    found = look_up(root, module, name)
    if isinstance(found, ast.ImportFrom):
        alias = next(alias for alias in found.names if (alias.asname or alias.name) == name)
        return alias.name == base or inherits(root, _imported_from(root, module, found), alias.name, base)
    if not isinstance(found, ast.ClassDef):
        raise SourceError(f"{module}.{name} is not a class")
    return any(parent == base or _inherits_or_not(root, module, parent, base) for parent in _plain_names(found.bases))


def _inherits_or_not(root: Path, module: str, name: str, base: str) -> bool:
    try:
        return inherits(root, module, name, base)
    except (SourceError, RecursionError):
        return False


def _plain_names(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        node = node.value if isinstance(node, ast.Subscript) else node
        if isinstance(node, ast.Name):
            yield node.id


def _imported_from(root: Path, module: str, node: ast.ImportFrom) -> str:
    """The module that an import in ``module`` names, absolute or relative."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = root.joinpath(*parts).is_dir()
    kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*kept, *([node.module] if node.module else [])])
