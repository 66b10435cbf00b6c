# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines that share the experts: the same answers, also while one of them has nothing to do."""

from __future__ import annotations

import pytest

from examples.demo.server import Server

from .conftest import BUSY, START_SECONDS, prompts
from .test_server import complete


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(2, BUSY, tmp_path_factory.mktemp("server"), 16)
    server.command[server.command.index("--tensor-parallel-size")] = "--data-parallel-size"
    server.start()
    for _ in server.wait_until_ready(START_SECONDS):
        pass
    yield server
    assert server.stop() == []


def test_answers_are_those_of_one_process_while_experts_move(server, reference):
    texts = [text for batch in prompts(6) for text in batch]
    for _ in range(20):
        assert complete(server, texts) == reference
        stats = server.stats()
        if stats.cycles_done >= 10:
            break
    assert stats.cycles_done >= 10
    assert stats.cycles_failed == 0
    assert [each.rank for each in stats.ranks] == [0, 1]  # of both engines
    assert all(each.longest_step_seconds > 0 for each in stats.ranks)


def test_an_idle_engine_stays_in_step(server, reference):
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
    assert after.window.tokens % (4 * 6) == 0
