# SPDX-License-Identifier: Apache-2.0
"""The patch points exist in the sources of vLLM: in the installed release, in those that ``scripts/matrix.sh``
installed and in those unpacked in ``build/src``. vLLM is not imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vllm_ascend_eplb.adaptors.ascend import second_runner
from vllm_ascend_eplb.adaptors.vllm.patch_points import PATCH_POINTS, patch_points
from vllm_ascend_eplb.adaptors.vllm.self_test import differences
from vllm_ascend_eplb.adaptors.vllm.sources import SourceError, installed_root, look_up, parameters, tree
from vllm_ascend_eplb.adaptors.vllm.versions import CHECKED_VERSIONS

REPOSITORY = Path(__file__).parents[3]
RUNNER = "vllm.v1.worker.gpu_model_runner"
MAPPING = "eplb_map_to_physical_and_record"
BY_NAME = {
    "vllm.models.deepseek_v4.nvidia.model",
    "vllm.models.kimi_k3.nvidia.model",
    "vllm.model_executor.layers.fused_moe.deep_gemm_mega_moe",
}
"""Modules that import the mapping by name. On a CPU the mapping is replaced in them, too; on a GPU it stays vLLM's."""


def sources() -> dict[str, Path]:
    """Folders that have a ``vllm``, by name."""
    found = {}
    root = installed_root()
    if root is not None:
        found["installed"] = root
    for path in sorted((REPOSITORY / "build").glob("vllm-*/lib/python*/site-packages")):
        found[path.parents[2].name] = path
    for path in sorted((REPOSITORY / "build" / "src").glob("*")):
        found[f"source {path.name}"] = path
    return {name: path for name, path in found.items() if (path / "vllm" / "version.py").exists()}


SOURCES = sources()
each_source = pytest.mark.parametrize("root", SOURCES.values(), ids=SOURCES.keys())

pytestmark = pytest.mark.skipif(not SOURCES, reason="no vLLM here")


@each_source
@pytest.mark.parametrize("point", PATCH_POINTS, ids=lambda point: f"{point.module.rpartition('.')[2]}.{point.name}")
def test_every_patch_point_exists(root: Path, point) -> None:  # type: ignore[no-untyped-def]
    look_up(root, point.module, point.name)


def test_missing_patch_point_is_found() -> None:
    root = next(iter(SOURCES.values()))
    with pytest.raises(SourceError):
        look_up(root, RUNNER, "GPUModelRunner.no_such_method")
    with pytest.raises(SourceError, match="no_such_module"):
        look_up(root, "vllm.no_such_module", "anything")


@each_source
@pytest.mark.parametrize("platform", ["cuda", "cpu", "npu"])
def test_self_test_finds_no_difference(root: Path, platform: str) -> None:
    """The self-test checks more than names: the order of calls around forward_before, parameters, and the parts of the
    state that runners use."""
    assert differences(root, platform) == []


@each_source
def test_importers_of_the_mapping_are_known(root: Path) -> None:
    """A model that imports the mapping by name must pass only arguments that our replacement accepts."""
    users = set()
    for path in (root / "vllm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^    {MAPPING},$|import .*\b{MAPPING}\b", text, re.MULTILINE):
            users.add(".".join(path.relative_to(root).with_suffix("").parts))
    assert users <= BY_NAME, "another module imports the mapping by name; make sure that it is replaced there"
    assert users
    taken = parameters(look_up(root, "vllm.model_executor.layers.fused_moe.router.base_router", MAPPING))
    for module in users:
        for node in ast.walk(tree(root, module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == MAPPING:
                assert not node.args
                assert {keyword.arg for keyword in node.keywords} <= taken


def test_patch_points_page_shows_this_table() -> None:
    page = (REPOSITORY / "docs" / "patch_points.md").read_text(encoding="utf-8")
    assert patch_points() in page
    assert patch_points(second_runner.PATCH_POINTS) in page
    for version in CHECKED_VERSIONS:
        assert version in page
    for module in BY_NAME:
        assert f"`{module}`" in page
