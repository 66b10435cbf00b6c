# SPDX-License-Identifier: Apache-2.0
"""Shell scripts that run tests, with a stand-in for pytest that notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDIN = """#!/bin/sh
echo "$NPU_TEST_RUNNER $NPU_TEST_ASCEND $NPU_TEST_REQUIRED $*" >>asked.txt
[ "$NPU_TEST_RUNNER" != "$FAILING" ]
"""


@pytest.mark.parametrize("failing", ["V1", "V2", "none"])
def test_candidates_halves_both_run_and_are_timed(tmp_path: Path, failing: str) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "candidate_npu_test.sh", tmp_path / "scripts")
    python = tmp_path / ".venv-npu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STANDIN)
    python.chmod(0o755)
    result = subprocess.run(
        [tmp_path / "scripts" / "candidate_npu_test.sh", "1.2.3", "--quiet"],
        env={**os.environ, "FAILING": failing},
        capture_output=True,
        text=True,
    )
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert [line.split()[:5] for line in asked] == [[runner, "1.2.3", "1", "-m", "pytest"] for runner in ("V1", "V2")]
    for line in asked:
        *files, last = line.split()[5:]
        assert last == "--quiet"
        assert files
        assert all((ROOT / file).exists() for file in files)
    assert (result.returncode != 0) == (failing != "none")
    assert (f"failed with model runner: {failing}" in result.stderr) == (failing != "none")
    kept = (tmp_path / "build" / "durations-candidate.txt").read_text()
    assert kept == result.stdout
    assert kept.startswith("vllm-ascend 1.2.3: ")
    assert kept.count(" s") == 3
