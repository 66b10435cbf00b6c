# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves a model with quantised experts (W8A8 and W4A8, in ModelSlim's form) with our
balancer: the real torch_npu on emulated CANN. There is one server per way; tests run in the order of this file.

Slots are compared bit for bit. Tokens are compared by share: vllm-ascend refuses float32 with quantised weights, and
float16 rounds differently from the reference's float32, and differently for every placement, because ranks add in
another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import npus, serving
from .rows import assert_rows_counted
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, Pairs, agreement, serve_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
LEAST, MOST = 0.97, 0.95
"""The share of equal tokens: at least LEAST with the right weights, at most MOST with wrong ones."""


WAYS: dict[str, dict[str, Any]] = {
    "W8A8 on A2": {"device": "A2"},
    "W8A8 on A3": {"device": "A3"},
    "W8A8 on A3, fused MC2": {"device": "A3", "beside": {"enable_fused_mc2": 1}},
    "W4A8 on A3, fused MC2": {"device": "A3", "beside": {"enable_fused_mc2": 1}},
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(way: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    serving.quantised_model(folder, way.split()[0])
    return folder


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]) -> list[list[list[int]]]:
    texts = [text for batch in batches for text in batch]
    flat = serving.transformers_tokens(tmp_path_factory.mktemp("transformers"), texts, TOKENS, model)
    return [flat[i : i + len(batches[0])] for i in range(0, len(flat), len(batches[0]))]


@pytest.fixture(scope="module")
def server(way: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpuServer]:
    folder = tmp_path_factory.mktemp("server")
    server = NpuServer(SETTINGS, folder, **WAYS[way], dtype="float16", model=str(model), probe=True).started()
    server.call("probe_watch")
    yield server
    server.stop()


def experts(server: NpuServer) -> dict[str, set[str]]:
    """The digests of the copies in the slots of all ranks, by expert."""
    found: dict[str, set[str]] = {}
    for rank in server.call("probe_experts"):
        for expert, digests in rank.items():
            found.setdefault(expert, set()).update(digests)
    return found


def ask(server: NpuServer, batches: list[list[str]], want: list[list[list[int]]]) -> Pairs:
    return [
        pair
        for batch, wanted in zip(batches, want, strict=True)
        for pair in zip(server.complete(batch, TOKENS), wanted, strict=True)
    ]


def test_integers_and_scales_move_together(
    server: NpuServer, batches: list[list[str]], answers: list[list[list[int]]]
) -> None:
    before, moved = experts(server), server.cycles_done()
    assert len(before) == 6 * 64
    assert len({digest for digests in before.values() for digest in digests}) == 6 * 64  # no two experts are alike
    assert agreement(serve_until(server, batches, answers, 10, exact=False)) >= LEAST
    stats = server.stats()
    assert stats is not None
    assert stats.cycles_failed == 0
    assert server.cycles_done() >= moved + 10
    assert experts(server) == before


def test_every_token_is_counted_once(server: NpuServer, way: str) -> None:
    first, *_ = server.call("probe_watched")
    assert_rows_counted(first, ranks=2, gathered="A2" in way, fused="fused" in way)


def test_no_race_and_no_wrong_order(server: NpuServer) -> None:
    assert not server.unexpected_races()[:3]


def test_weights_that_did_not_move_change_tokens(
    server: NpuServer, batches: list[list[str]], answers: list[list[list[int]]]
) -> None:
    """Negative control. It runs last on this server, because it switches maps and leaves the weights."""
    before = experts(server)
    assert set(server.call("probe_freeze_weights")) == {"1"}
    shares: list[float] = []
    while not shares or (min(shares) > MOST and len(shares) < 20):
        shares.append(agreement(ask(server, batches, answers)))
    assert min(shares) <= MOST, shares
    assert experts(server) != before
