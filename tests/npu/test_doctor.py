# SPDX-License-Identifier: Apache-2.0
"""``doctor`` with the real vllm-ascend: its version, its runner and its environment are checked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from . import npus
from .serving import MISSING, SECOND_RUNNER, environment

pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def test_doctor_checks_vllm_ascend(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(npus.PYTHON), "-m", "vllm_ascend_eplb.cli", "doctor", "--json"],
        cwd=npus.ROOT,
        env=environment(tmp_path / "report", DYNAMIC_EPLB="true" if SECOND_RUNNER else "false"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["vllm-ascend"]["status"] == "ok", findings
    assert findings["vllm-ascend's runner"]["status"] == "ok"
    assert ("the second one" in findings["vllm-ascend's runner"]["text"]) == SECOND_RUNNER
    assert "8 NPU" in findings["devices"]["text"]
    assert findings["DYNAMIC_EPLB"]["status"] == "wrong"
    assert [finding["what"] for finding in findings.values() if finding["status"] == "wrong"] == ["DYNAMIC_EPLB"]
