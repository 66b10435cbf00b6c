# SPDX-License-Identifier: Apache-2.0
"""Real NPUs: the same text with balancing off and on, as in vllm-ascend's own CI; and, beyond that CI, experts moved
and PAR fell.

NPU_TEST_MODEL names the model (default: examples/tiny_moe), NPU_TEST_RANKS the tensor-parallel size (default: 2).
"""

import os
from pathlib import Path

import pytest

from examples.demo.server import MODEL

from . import npus, serving

pytestmark = pytest.mark.skipif(not npus.REAL, reason="for real NPUs: make npu-test")
SETTINGS: dict[str, object] = {
    "dynamic_eplb": True,
    "expert_heat_collection_interval": 40,
    "algorithm_execution_interval": 5,
    "min_gain": 0.0,
    "target_par": 1.0,
}


def test_text_is_the_same_while_experts_move(tmp_path: Path) -> None:
    model, ranks = os.environ.get("NPU_TEST_MODEL", str(MODEL)), int(os.environ.get("NPU_TEST_RANKS", "2"))
    batches = serving.prompts(4)
    answers = []
    for name, settings in (("off", None), ("on", {**SETTINGS, "num_redundant_experts": ranks})):
        folder = tmp_path / name
        folder.mkdir()
        server = serving.NpuServer(settings, folder, ranks, dtype="auto", model=model).started()
        try:
            answers.append([[server.complete(batch, 48) for batch in batches] for _ in range(4)])
            stats = server.stats()
        finally:
            server.stop()
    assert answers[0] == answers[1]
    assert stats is not None
    assert stats.experts_moved > 0
    assert stats.cycles_failed == 0
    later = [cycle for cycle in stats.cycles if cycle.par is not None and cycle.par_start is not None][1:]
    assert sum(cycle.par.mean for cycle in later) < sum(cycle.par_start.mean for cycle in later)
