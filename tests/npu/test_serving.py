# SPDX-License-Identifier: Apache-2.0
"""The whole stack on A2 (AllGather): vllm-ascend serves a small trained MoE model with our balancer in its place."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from . import npus
from .test_ascend import STACK, STANDINS

MODEL = npus.ROOT / "examples" / "tiny_moe"
pytestmark = [
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(not (STACK / ".stamp").exists(), reason="no vllm-ascend: run scripts/setup_npu_stack.sh"),
]


def serve(folder: Path, mode: str, redundant: int) -> tuple[list[list[int]], str]:
    """Greedy tokens of 8 requests and the log."""
    answer = folder / f"{mode}-{redundant}.json"
    process = subprocess.run(
        [str(npus.PYTHON), "-m", "tests.npu.serve", str(MODEL), mode, str(redundant), str(answer)],
        cwd=npus.ROOT,
        env=npus.environment(
            PYTHONPATH=f"{npus.ROOT}:{STACK / 'site'}:{STANDINS}",
            EMULATED_NPU_RACE="report",
            EMULATED_NPU_COMM_ORDER="report",
            EMULATED_NPU_MEMORY_MB="2048",
            EMULATED_NPU_REPORT=str(folder / f"report-{mode}-{redundant}.txt"),
            HF_HUB_OFFLINE="1",
            TORCHDYNAMO_DISABLE="1",
        ),
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = process.stdout + process.stderr
    assert answer.exists(), log[-6000:]
    return json.loads(answer.read_text()), log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def unbalanced(folder: Path) -> list[list[int]]:
    return serve(folder, "off", 0)[0]


@pytest.mark.parametrize("redundant", [0, 2])
def test_moves_change_no_token(folder: Path, unbalanced: list[list[int]], redundant: int) -> None:
    """With redundant experts vllm-ascend's own EPLB fails here: its dispatcher looks slots up by logical expert."""
    tokens, log = serve(folder, "ours", redundant)
    assert tokens == unbalanced
    cycles = re.findall(r"EPLB cycle \d+: PAR ([\d.]+) -> ([\d.]+) .*? (\d+) experts moved", log)
    assert len(cycles) >= 2, log[-3000:]
    assert all(float(after) < float(before) and int(moved) > 0 for before, after, moved in cycles)
    report = folder / f"report-ours-{redundant}.txt"
    races = report.read_text().split("\n[") if report.exists() else []
    # Upstream's own: vLLM's runner reuses input buffers beside its copies; and the loader's warm-up, before serving.
    ours = [race for race in races if "vllm_ascend_eplb" in race and "in warm_up" not in race]
    assert not ours, ours[:3]
