# SPDX-License-Identifier: Apache-2.0
"""The versions of vLLM that are balanced, and the differences that the self-test finds in changed sources."""

from __future__ import annotations

import ast
import functools
import shutil
from pathlib import Path

import pytest

from vllm_ascend_eplb.adaptors.vllm import versions
from vllm_ascend_eplb.adaptors.vllm.patch_points import PATCH_POINTS
from vllm_ascend_eplb.adaptors.vllm.self_test import differences
from vllm_ascend_eplb.adaptors.vllm.sources import installed_root
from vllm_ascend_eplb.adaptors.vllm.versions import CHECKED_VERSIONS, is_checked, is_next, verdict

ROOT = installed_root()
needs_vllm = pytest.mark.skipif(ROOT is None, reason="no vLLM here")

NEXT = "{}.{}.0".format(*(int(part) + step for part, step in zip(CHECKED_VERSIONS[-1].split("."), (0, 1), strict=True)))
"""The release after the newest checked one."""

RUNNER = "vllm/v1/worker/gpu_model_runner.py"
RUNNER_2 = "vllm/v1/worker/gpu/model_runner.py"
ROUTER = "vllm/model_executor/layers/fused_moe/router/base_router.py"
CONTROLLER = "vllm/v1/worker/gpu/eplb_utils.py"


def test_checked_versions_include_patch_releases() -> None:
    assert is_checked(f"{CHECKED_VERSIONS[-1]}.7+cpu")
    for version in ("0.99.1", "0.3.2", "0.320.0", "unknown", ""):
        assert not is_checked(version)


def test_next_version_follows_the_checked_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CHECKED_VERSIONS", ("0.30", "0.32"))
    accepted = ["0.33.0", "0.33.1rc1", "0.33.0.dev12+gabc"]
    refused = ["0.29.0", "0.31.0", "0.32.1", "0.34.0", "0.330.0", "1.0.0", "1.33.0", "dev", ""]
    assert [version for version in accepted + refused if is_next(version)] == accepted


@needs_vllm
def test_next_version_is_balanced_with_a_warning() -> None:
    said = verdict(NEXT, "cuda", ROOT)
    assert said.balances
    assert f"this is {NEXT}" in said.warning
    assert CHECKED_VERSIONS[-1] in said.warning
    assert verdict(f"{CHECKED_VERSIONS[-1]}.0", "cuda", ROOT) == (True, "")


@needs_vllm
@pytest.mark.parametrize("version", ["0.29.0", "0.99.1", "1.0.0"])
def test_other_versions_stay_off_with_the_way_out(version: str) -> None:
    said = verdict(version, "cuda", ROOT)
    assert not said.balances
    assert f"this is {version}" in said.warning
    assert '"allow_unchecked_vllm": true' in said.warning


def test_version_without_sources_stays_off() -> None:
    assert not verdict(NEXT, "cuda", None).balances


parsed = functools.cache(ast.parse)


@pytest.fixture(autouse=True)
def equal_files_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed copy of vLLM's files differs in one of them; to parse them all takes a quarter of a second."""
    monkeypatch.setattr(ast, "parse", parsed)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of vLLM that the self-test reads."""
    assert ROOT is not None
    folder = tmp_path_factory.mktemp("copied")
    for module in {point.module for point in PATCH_POINTS}:
        path = Path(*module.split("."))
        path = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@needs_vllm
@pytest.mark.parametrize(
    ("path", "old", "new", "says"),
    [
        (RUNNER, "def eplb_step", "def eplb_done", "eplb_step"),
        (RUNNER, "self._determine_batch_execution_and_padding(", "self._decide(", "once before the model"),
        (RUNNER, "coordinate_batch_across_dp", "coordinate_elsewhere", "coordinate_batch_across_dp"),
        (RUNNER, "skip_eplb", "leave_out_eplb", "skip_eplb"),
        (RUNNER, "self.eplb_state.step(", "self.eplb_state.new_step(", "new_step"),
        (RUNNER_2, "self.eplb.prepare_forward(", "self.eplb.begin(", "prepare_forward"),
        (RUNNER_2, "dispatch_cg_and_sync_dp(", "dispatch_later(", "dispatch_cg_and_sync_dp"),
        (RUNNER_2, "@step_eplb_after(is_dummy=True)", "@step_eplb_after()", "is_dummy=True"),
        (CONTROLLER, "self.state.step(", "self.state.on_layer_committed(", "on_layer_committed"),
        (CONTROLLER, "def prepare_forward(", "def prepare(", "prepare_forward"),
        (ROUTER, "record_enabled:", "record_when:", "record_when"),
    ],
)
def test_self_test_finds_a_change(copied: Path, tmp_path: Path, path: str, old: str, new: str, says: str) -> None:
    """Control: it finds nothing in the same files without the change."""
    assert differences(copied, "cuda") == []
    text = (copied / path).read_text(encoding="utf-8")
    assert old in text
    shutil.copytree(copied, tmp_path, dirs_exist_ok=True)
    (tmp_path / path).write_text(text.replace(old, new), encoding="utf-8")
    found = differences(tmp_path, "cuda")
    assert any(says in line for line in found), found
    assert not verdict(NEXT, "cuda", tmp_path).balances


@needs_vllm
@pytest.mark.parametrize("path", [RUNNER, RUNNER_2, CONTROLLER, ROUTER])
def test_self_test_finds_a_missing_file(copied: Path, tmp_path: Path, path: str) -> None:
    shutil.copytree(copied, tmp_path, dirs_exist_ok=True)
    (tmp_path / path).unlink()
    assert differences(tmp_path, "cuda")
    assert not verdict(NEXT, "cuda", tmp_path).balances
