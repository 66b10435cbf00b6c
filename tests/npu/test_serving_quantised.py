# SPDX-License-Identifier: Apache-2.0
"""The unmodified vllm-ascend serves a model with quantised experts (W8A8, ModelSlim's form) with our balancer: the real
torch_npu on emulated CANN. There is one server per generation of NPUs; tests run in the order of this file.

Slots are compared bit for bit. Tokens are compared by share: vllm-ascend refuses float32 with quantised weights, and
float16 rounds differently from the reference's float32, and differently for every placement, because ranks add in
another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import npus, serving
from .serving import MISSING, SETTINGS, TOKENS, NpuServer, Pairs, agreement, serve_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
LEAST, MOST = 0.97, 0.95
"""The share of equal tokens: at least LEAST with the right weights, at most MOST with wrong ones."""


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]) -> tuple[Path, list[list[list[int]]]]:
    """The model and its answers."""
    folder = tmp_path_factory.mktemp("quantised")
    model = folder / "model"
    serving.quantised_model(model)
    flat = serving.transformers_tokens(folder, [text for batch in batches for text in batch], TOKENS, model)
    return model, [flat[i : i + len(batches[0])] for i in range(0, len(flat), len(batches[0]))]


@pytest.fixture(scope="module", params=["A2", "A3"])
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quantised: tuple[Path, list[list[list[int]]]],
) -> Iterator[NpuServer]:
    server = NpuServer(
        SETTINGS,
        tmp_path_factory.mktemp("server"),
        device=request.param,
        dtype="float16",
        model=str(quantised[0]),
        probe=True,
    ).started()
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
    server: NpuServer, batches: list[list[str]], quantised: tuple[Path, list[list[list[int]]]]
) -> None:
    before, moved = experts(server), server.cycles_done()
    assert len(before) == 6 * 64
    assert len({digest for digests in before.values() for digest in digests}) == 6 * 64  # no two experts are alike
    assert agreement(serve_until(server, batches, quantised[1], 10, exact=False)) >= LEAST
    stats = server.stats()
    assert stats is not None
    assert stats.cycles_failed == 0
    assert server.cycles_done() >= moved + 10
    assert experts(server) == before


def test_no_race_and_no_wrong_order(server: NpuServer) -> None:
    assert not server.unexpected_races()[:3]


def test_weights_that_did_not_move_change_tokens(
    server: NpuServer, batches: list[list[str]], quantised: tuple[Path, list[list[list[int]]]]
) -> None:
    """Negative control. It runs last on this server, because it switches maps and leaves the weights."""
    before = experts(server)
    assert set(server.call("probe_freeze_weights")) == {"1"}
    shares: list[float] = []
    while not shares or (min(shares) > MOST and len(shares) < 20):
        shares.append(agreement(ask(server, batches, quantised[1])))
    assert min(shares) <= MOST, shares
    assert experts(server) != before
