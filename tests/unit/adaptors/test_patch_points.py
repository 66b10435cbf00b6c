# SPDX-License-Identifier: Apache-2.0
"""The patch points, looked for in the sources of vLLM: of the installed release, of those that ``scripts/matrix.sh``
installed, and of those unpacked in ``build/src``. Nothing of vLLM is imported."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from vllm_ascend_eplb.adaptors.ascend import second_runner
from vllm_ascend_eplb.adaptors.vllm.patch_points import PATCH_POINTS, patch_points
from vllm_ascend_eplb.adaptors.vllm.versions import CHECKED_VERSIONS, READ_VERSIONS, is_checked

REPOSITORY = Path(__file__).parents[3]
RUNNER, RUNNER_2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
MAPPING = "eplb_map_to_physical_and_record"
BY_NAME = {
    "vllm.models.deepseek_v4.nvidia.model",
    "vllm.models.kimi_k3.nvidia.model",
    "vllm.model_executor.layers.fused_moe.deep_gemm_mega_moe",
}
"""Modules that import the mapping by name. On a CPU it is replaced in them too; on a GPU it stays vLLM's."""


def sources() -> dict[str, Path]:
    """Folders that hold a ``vllm``, by a name for each."""
    found = {}
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.submodule_search_locations:
        found["installed"] = Path(next(iter(spec.submodule_search_locations))).parent
    for path in sorted((REPOSITORY / "build").glob("vllm-*/lib/python*/site-packages")):
        found[path.parents[2].name] = path
    for path in sorted((REPOSITORY / "build" / "src").glob("*")):
        found[f"source {path.name}"] = path
    return {name: path for name, path in found.items() if (path / "vllm" / "version.py").exists()}


SOURCES = sources()
each_source = pytest.mark.parametrize("root", SOURCES.values(), ids=SOURCES.keys())

pytestmark = pytest.mark.skipif(not SOURCES, reason="no vLLM here")


@cache
def tree(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def look_up(root: Path, module: str, name: str) -> ast.AST:
    """The definition or import of a dotted name in a module; one in an ``if`` counts too.

    Raises:
        LookupError, OSError: there is none.
    """
    found: ast.AST = tree(root, module)
    for part in name.split("."):
        for node in ast.walk(found):
            if isinstance(node, ast.ImportFrom) and part in {each.asname or each.name for each in node.names}:
                break
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part and node is not found:
                break
        else:
            raise LookupError(f"{module} has no {name}")
        found = node
    return found


def calls(function: ast.AST) -> list[str]:
    """What a function calls, in the order of its lines."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def parameters(function: ast.AST) -> set[str]:
    assert isinstance(function, ast.FunctionDef)
    return {each.arg for each in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]}


@each_source
@pytest.mark.parametrize("point", PATCH_POINTS, ids=lambda point: f"{point.module.rpartition('.')[2]}.{point.name}")
def test_every_patch_point_is_there(root: Path, point) -> None:  # type: ignore[no-untyped-def]
    look_up(root, point.module, point.name)


def test_missing_patch_point_is_noticed() -> None:
    root = next(iter(SOURCES.values()))
    with pytest.raises(LookupError):
        look_up(root, RUNNER, "GPUModelRunner.no_such_method")
    with pytest.raises(OSError, match="no_such_module"):
        look_up(root, "vllm.no_such_module", "anything")


@each_source
def test_v1_steps_behind_the_data_parallel_collective_of_real_and_dummy_forwards(root: Path) -> None:
    point = "self._determine_batch_execution_and_padding"
    for name in ("execute_model", "_dummy_run"):
        called = calls(look_up(root, RUNNER, f"GPUModelRunner.{name}"))
        assert called.count(point) == 1
        runs = [index for index, each in enumerate(called) if each in ("self._model_forward", "self.model")]
        assert runs
        assert called.index(point) < min(runs)
    collective = calls(look_up(root, RUNNER, f"GPUModelRunner.{point.partition('.')[2]}"))
    assert "coordinate_batch_across_dp" in collective
    assert {"skip_eplb", "is_profile"} <= parameters(look_up(root, RUNNER, "GPUModelRunner._dummy_run"))
    assert "self.eplb_state.step" in calls(look_up(root, RUNNER, "GPUModelRunner.eplb_step"))


@each_source
def test_v2_steps_behind_the_data_parallel_collective_of_real_and_dummy_forwards(root: Path) -> None:
    execute, dummy = (look_up(root, RUNNER_2, f"GPUModelRunner.{name}") for name in ("execute_model", "_dummy_run"))
    called = calls(execute)
    assert called.count("self.eplb.prepare_forward") == 1
    assert called.index("dispatch_cg_and_sync_dp") < called.index("self.eplb.prepare_forward")
    for run in ("self.model", "self.cudagraph_manager.run_fullgraph"):
        assert called.index("self.eplb.prepare_forward") < called.index(run)
    assert "dummy_run" in parameters(execute)
    assert calls(dummy).count("self.execute_model") == 1  # a dummy run reaches the same point
    assert {"skip_eplb", "is_profile"} <= parameters(dummy)
    after = {
        name: [ast.unparse(each) for each in look_up(root, RUNNER_2, f"GPUModelRunner.{name}").decorator_list]  # type: ignore[attr-defined]
        for name in ("_dummy_run", "sample_tokens", "pool")
    }
    assert "step_eplb_after(is_dummy=True)" in after["_dummy_run"]
    assert "step_eplb_after()" in after["sample_tokens"]
    assert "step_eplb_after()" in after["pool"]
    controller = "vllm.v1.worker.gpu.eplb_utils"
    assert "EplbState" in calls(look_up(root, controller, "EPLBController.prepare_load"))
    assert "self.state.step" in calls(look_up(root, controller, "EPLBController.step"))
    assert "self.state.prepare_forward" in calls(look_up(root, controller, "EPLBController.prepare_forward"))
    assert "decode_query_len" in ast.unparse(tree(root, RUNNER_2))


@each_source
def test_who_takes_the_mapping_by_name_is_known(root: Path) -> None:
    """A model that takes it by name must pass what ours takes, too."""
    users = set()
    for path in (root / "vllm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^    {MAPPING},$|import .*\b{MAPPING}\b", text, re.MULTILINE):
            users.add(".".join(path.relative_to(root).with_suffix("").parts))
    assert users <= BY_NAME, "another module takes the mapping by name; see that it is covered"
    assert users
    taken = parameters(look_up(root, "vllm.model_executor.layers.fused_moe.router.base_router", MAPPING))
    for module in users:
        for node in ast.walk(tree(root, module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == MAPPING:
                assert not node.args
                assert {each.arg for each in node.keywords} <= taken


def test_versions() -> None:
    assert set(CHECKED_VERSIONS) <= set(READ_VERSIONS)
    assert is_checked(f"{CHECKED_VERSIONS[-1]}.7+cpu")
    assert not is_checked("0.99.1")
    assert not is_checked("0.3.2")


def test_the_page_shows_this_table() -> None:
    page = (REPOSITORY / "docs" / "patch_points.md").read_text(encoding="utf-8")
    assert patch_points() in page
    assert patch_points(second_runner.PATCH_POINTS) in page
    for version in READ_VERSIONS:
        assert version in page
    for module in BY_NAME:
        assert f"`{module}`" in page
