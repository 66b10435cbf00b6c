# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves a model whose class loads its experts by itself (DeepSeek's), with redundant
experts, on 2 ranks: the real torch_npu on emulated CANN. Tokens are those of the same server without balancing."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import npus, serving
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, freeze_weights_until_noticed, serve_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def test_slots_of_copies_are_filled(tmp_path: Path, batches: list[list[str]]) -> None:
    model = tmp_path / "model"
    serving.model_of_deepseeks_class(model)

    def started(name: str, settings: dict[str, object] | None) -> NpuServer:
        (tmp_path / name).mkdir()
        return NpuServer(settings, tmp_path / name, model=str(model), probe=settings is not None).started()

    alone = started("alone", None)
    try:
        want = [alone.complete(batch, TOKENS) for batch in batches]
    finally:
        assert alone.stop() == []
    server = started("balanced", SETTINGS)
    try:
        serve_until(server, batches, want, 10)
        stats = server.stats()
        assert stats is not None
        assert stats.cycles_failed == 0
        assert stats.experts_moved > 20
        assert not server.unexpected_races()[:3]
        freeze_weights_until_noticed(server, batches, want)  # negative control
    finally:
        assert server.stop() == []
