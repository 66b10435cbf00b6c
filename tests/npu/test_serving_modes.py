# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves examples/tiny_moe in the modes ``observe`` and ``sync``, on 2 ranks: the real
torch_npu on emulated CANN."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import npus
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, freeze_weights_until_noticed, serve_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def test_mode_observe_plans_and_moves_nothing(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    """Each plan is measured in the window after it: PAR as it is, and as the plan would have made it."""
    server = NpuServer({**SETTINGS, "mode": "observe"}, tmp_path, probe=True).started()
    try:
        server.call("probe_watch")
        start = [rank["placement"] for rank in server.call("probe_watched")]
        for turn in range(40):
            batch = turn // 3 % len(batches)
            assert server.complete(batches[batch], TOKENS) == want[batch]
            stats = server.stats()
            if stats is not None and stats.cycles_skipped >= 6:
                break
        assert stats is not None
        assert (stats.mode, stats.experts_moved, stats.cycles_done, stats.cycles_failed) == ("observe", 0, 0, 0)
        assert stats.cycles_skipped >= 6
        assert all(re.match(r"observing only: \d+ moves would", cycle.reason) for cycle in stats.cycles)
        assert any(cycle.moves_planned for cycle in stats.cycles)
        measured = [cycle for cycle in stats.cycles if cycle.par_observed is not None]
        assert len(measured) >= 3
        would = sum(cycle.par_observed.mean for cycle in measured)
        assert would < sum(cycle.par_realised.mean for cycle in measured)
        assert [rank["placement"] for rank in server.call("probe_watched")] == start
        assert not server.unexpected_races()[:3]
    finally:
        server.stop()


def test_mode_sync_moves_experts_within_one_step(
    tmp_path: Path, batches: list[list[str]], want: list[list[list[int]]]
) -> None:
    server = NpuServer({**SETTINGS, "mode": "sync"}, tmp_path, probe=True).started()
    try:
        serve_until(server, batches, want, 10)
        stats = server.stats()
        assert stats is not None
        assert (stats.mode, stats.cycles_failed) == ("sync", 0)
        assert stats.experts_moved > 50
        done = re.findall(r"EPLB cycle \d+: .* rounds, (\d+) steps after its load was taken", server.log)
        assert len(done) >= 10
        assert set(done) == {"0"}
        assert not server.unexpected_races()[:3]
        freeze_weights_until_noticed(server, batches, want)
    finally:
        server.stop()
