# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines that share the experts give the answers of one process, also while one engine is idle, and
every token is counted once."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from vllm_ascend_eplb.observe.stats import EplbStats

from .audit import AUDIT, FIRST, audited_steps
from .conftest import BUSY, prompts
from .private_server import PrivateServer
from .test_server import complete

TOP_K, NUM_LAYERS = 4, 6
"""Experts per token and layers of the model."""


@pytest.fixture(scope="module")
def audit(tmp_path_factory) -> Path:
    """The folder with a file per worker, with a line per step; see audit.py."""
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def server(tmp_path_factory, audit):
    server = PrivateServer(tmp_path_factory.mktemp("server"), "data", BUSY, forked=True)
    server.run_first(FIRST, **{AUDIT: str(audit), "VLLM_PLUGINS": "eplb,eplb_page"})
    try:
        server.start_and_wait()
        yield server
    finally:
        server.remove()


def test_answers_are_those_of_one_process_while_experts_move(server, reference):
    texts = [text for batch in prompts(6) for text in batch]
    for _ in range(20):
        assert complete(server, texts) == reference
        stats = server.stats()
        if stats.cycles_done >= 10:
            break
    assert stats.cycles_done >= 10
    assert stats.cycles_failed == 0
    assert [rank.rank for rank in stats.ranks] == [0, 1]  # both engines
    assert all(rank.longest_step_seconds > 0 for rank in stats.ranks)
    shown = EplbStats.from_json(httpx.get(f"{server.url}/eplb/stats", timeout=30).text)
    assert [rank.rank for rank in shown.ranks] == [0, 1]


def test_idle_engine_stays_in_step(server, reference):
    texts = [text for batch in prompts(6) for text in batch]
    before = server.stats()
    for text, expected in zip(texts, reference, strict=True):
        assert complete(server, [text]) == [expected]
        after = server.stats()
        if after.cycles_done >= before.cycles_done + 2:
            break
    assert after.step > before.step
    assert after.cycles_done > before.cycles_done
    assert after.cycles_failed == 0
    # the idle engine's dummy batches count nothing: every counted token went to top-4 experts of 6 layers
    assert after.window.tokens % (TOP_K * NUM_LAYERS) == 0


def test_every_step_counts_its_tokens_once_in_every_layer(server, audit, reference):
    """The tests above made steps with and without requests on both engines; all of them are checked."""
    texts = [text for batch in prompts(2) for text in batch]
    complete(server, texts)
    engines = audited_steps(audit)
    assert len(engines) == 2
    for steps in engines:
        wrong = [step for step in steps if step[2] != [step[0] * TOP_K] * NUM_LAYERS]
        assert wrong == []
        assert all(recorded == (tokens > 0) for tokens, recorded, _ in steps)
        assert len({tokens for tokens, *_ in steps}) > 5  # prompts, decoding, dummy batches: a constant cannot pass
        assert sum(tokens for tokens, *_ in steps) > 1000
    assert any(tokens == 0 for steps in engines for tokens, *_ in steps)


def test_server_terminated_under_requests_leaves_nothing(server, reference):
    """The last test on this server, because it ends the server."""
    texts = [text for batch in prompts(6) for text in batch]
    assert server.end_by(signal.SIGTERM, list(zip(texts, reference, strict=True))) == []
