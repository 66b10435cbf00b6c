# SPDX-License-Identifier: Apache-2.0
"""The layout: folders import in one direction, the core imports no engine, planning no torch, and files are short."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import vllm_ascend_eplb

PACKAGE = Path(vllm_ascend_eplb.__file__).parent
ROOT = Path(__file__).parents[2]

NO_TORCH = ("values", "files", "settings", "observe", "planning", "simulate", "report")
NO_ENGINE = ("load", "agreement", "transfer", "routing", "balancer")
ENGINES = ("adaptors", "cli")
STATIONS = NO_TORCH + NO_ENGINE + ENGINES
"""All folders. A folder imports only from folders before it. ``plugin`` and ``__init__`` may import all of them."""

SHARED = {"__version__", "_planner"}
"""Names that every folder may import from the package itself: the version and the compiled planner."""

MOST_LINES = 400
LONGER = {
    "vllm_ascend_eplb/planning/schedule.py",
    "vllm_ascend_eplb/transfer/loader.py",
    "tests/distributed/test_faults.py",
    "tests/e2e/test_start.py",
    "tests/npu/programs/ascend.py",
    "tests/unit/agreement/test_cycle_exhaustive.py",
    "tests/unit/files/test_expert_map.py",
    "tests/unit/load/test_ops.py",
    "tests/unit/planning/test_planner.py",
    "tests/unit/settings/test_config.py",
    "csrc/planner/scratch.cpp",
    "csrc/planner/search.cpp",
    "tests/npu/emulated_cann/hccl/api.cpp",
}
"""Longer files. Their docstring, or first comment, says why they are one idea."""

CODE = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module("vllm_ascend_eplb." + name)
print(sorted(name for name in ("vllm", "torch_npu", "vllm_ascend", "torch") if name in sys.modules))
"""


def modules(folders: Iterable[str] = STATIONS) -> dict[str, Path]:
    """Paths of the modules of ``folders``, by dotted name within the package."""
    files = {path.relative_to(PACKAGE): path for folder in folders for path in (PACKAGE / folder).rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()}


def imports(name: str, source: str, known: Iterable[str]) -> set[str]:
    """The modules of the package that a source imports, also within functions. A name imported from the package itself
    counts as a module."""
    package = name if name in {module.rpartition(".")[0] for module in known} else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package.split(".") if package else []
            base = ".".join([*above[: len(above) + 1 - node.level], *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = (node.module or "").partition(".")[2]
        else:
            if isinstance(node, ast.Import):
                own = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
                found |= {module.partition(".")[2] for module in own}
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}" if base else alias.name
            found.add(inner if inner in known or not base else base)
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path.read_text(), known) for name, path in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import one another; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if target != name and (found := visit(target, [*path, name])):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


FOLDERS = (PACKAGE.name, "csrc", "tests", "benchmarks", "examples", "scripts", "docs")


def sources(*suffixes: str) -> list[Path]:
    """All files of the repository with these suffixes, ``.py`` by default, but setup.py."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
    return [path for path in paths if path.suffix in (suffixes or (".py",)) and path.is_file()]


def purpose(path: Path) -> str:
    """The docstring of a Python file, or the comment that begins a C++ file."""
    text = path.read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text.partition("#")[0]


def imported_by(names: Iterable[str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", CODE, " ".join(names)], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_planning_and_files_import_no_torch():
    assert imported_by(modules(NO_TORCH)) == "[]"


def test_the_core_imports_no_engine():
    assert imported_by(modules(NO_ENGINE)) == "['torch']"


def engine_imports(source: str) -> list[str]:
    """Modules of vLLM that a test imports in its own process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "pytest.importorskip",
            "importlib.import_module",
        ):
            found += [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
    return [name for name in found if name.split(".")[0] == "vllm"]


def test_unit_tests_import_no_engine():
    paths = [path for path in sources() if path.is_relative_to(ROOT / "tests" / "unit")]
    assert len(paths) > 70
    assert [path.name for path in paths if engine_imports(path.read_text(encoding="utf-8"))] == []
    source = "import vllm.config, vllm_ascend_eplb\ndef f():\n  from vllm import envs\npytest.importorskip('vllm')"
    assert engine_imports(source) == ["vllm.config", "vllm", "vllm"]


def test_the_tiers_name_every_folder():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(STATIONS)
    assert len(modules()) > 80


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a folder after the importing one, or from elsewhere in the package."""
    place = {folder: number for number, folder in enumerate(STATIONS)}
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets - SHARED
        if place.get(target.split(".")[0], len(place)) > place[name.split(".")[0]]
    ]


def test_no_folder_imports_from_a_later_one():
    edges = graph()
    assert upward(edges) == []
    assert sum(map(len, edges.values())) > 200
    source = "from ..balancer.start import start_balancer"
    assert upward({"load.recorder": imports("load.recorder", source, modules())}) == [
        "load.recorder imports balancer.start"
    ]


def test_no_modules_import_each_other_in_a_circle():
    edges = graph()
    assert circle(edges) == []
    edges["values.placement"] = edges["values.placement"] | {"planning.planner"}
    assert "values.placement" in circle(edges)


def test_the_adaptor_of_vllm_knows_nothing_of_ascend():
    edges = graph()
    knowing = {name for name in edges if name.startswith("adaptors.vllm") and "adaptors.ascend" in str(edges[name])}
    assert knowing == set()
    assert "adaptors.ascend" in str(edges["adaptors.ascend.runner"])  # so that the test can fail


def test_no_file_is_long_without_a_reason():
    code = sources(".py", ".cpp", ".h", ".cu")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in code}
    assert {name for name, lines in lengths.items() if lines > MOST_LINES} == LONGER
    assert [name for name in sorted(LONGER) if "One file, because" not in purpose(ROOT / name)] == []
    assert "One file, because" not in purpose(ROOT / "csrc" / "planner" / "search.h")  # so that the test can fail


def test_no_folder_holds_a_single_file():
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) > 10
    assert [path.name for path in folders if len([f for f in path.glob("*.py") if f.name != "__init__.py"]) < 2] == []


@pytest.mark.parametrize("name", ["plan", "dispatch_shares", "Placement"])
def test_public_names(name):
    assert callable(getattr(vllm_ascend_eplb, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vllm_ascend_eplb.no_such_name


def loggers(source):
    """The names of the loggers that a source gets; None for a computed name."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger":
            yield call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None


def test_every_logger_is_one_that_a_server_shows():
    """vLLM gives handlers only to loggers below its own name; other loggers depend on the release."""
    names = [(path.name, name) for path in PACKAGE.rglob("*.py") for name in loggers(path.read_text())]
    assert len(names) > 10
    assert [entry for entry in names if not str(entry[1]).startswith("vllm.eplb")] == []
    assert list(loggers("import logging\nlogging.getLogger(__name__)")) == [None]


def bound_names(source: str) -> Iterable[tuple[int, str]]:
    """Line and name of every variable, argument and import that a source names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name
        elif isinstance(node, ast.FunctionDef) and node.name == "__eq__":
            node.args.args.clear()  # Python itself names the argument "other"


PRONOUNS = {"each", "its", "other", "others", "one"}


def test_variables_say_what_they_hold():
    assert len(sources()) > 300
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        for line, name in bound_names(path.read_text(encoding="utf-8"))
        if name in PRONOUNS
    ]
    assert found == []
    source = "for each in rows:\n  f = lambda its: (found := its)\ndef __eq__(self, other): ..."
    assert {name for _, name in bound_names(source)} & PRONOUNS == {"each", "its"}
