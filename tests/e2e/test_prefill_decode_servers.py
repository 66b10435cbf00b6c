# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server at once, each balanced by settings of its own, behind a proxy: the answers are
those of one process, also where either server is killed and started again."""

from __future__ import annotations

import concurrent.futures

import pytest

from .conftest import BUSY, prompts, wait_until
from .kv_proxy import both_roles
from .test_server import complete

pytestmark = pytest.mark.soak

TOP_K, LAYERS = 4, 6
TOKENS = 16
"""Of an answer, so that a round is short; 48 while a server is killed."""

ROUNDS = 30
"""At most so many, until both servers have balanced often enough."""


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    settings = {**BUSY, "expert_heat_collection_interval": 2, "transfer_buffer_experts": 256}
    with both_roles(
        tmp_path_factory.mktemp("roles"),
        {**settings, "eplb_heat_collection_stage": "prefill"},
        {**settings, "num_redundant_experts": 0, "eplb_heat_collection_stage": "decode"},
    ) as found:
        yield found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for batch in prompts(6)[:2] for text in batch]


@pytest.fixture(scope="module")
def expected(reference) -> list[list[int]]:
    return [answer[:TOKENS] for answer in reference[:12]]


def ask_until(roles, texts, expected, cycles: int) -> None:
    """Round after round, each prompt computed anew, until both servers have done so many cycles."""
    prefill, decode, store, proxy = roles
    for _ in range(ROUNDS):
        store.clear()
        assert complete(proxy, texts, TOKENS) == expected
        if min(prefill.cycles(), decode.cycles()) >= cycles:
            break
    for server in (prefill, decode):
        stats = server.stats()
        assert stats.cycles_done >= cycles
        assert stats.cycles_failed == 0
        assert stats.experts_moved > 0


def test_answers_are_those_of_one_process_while_both_balance(roles, texts, expected):
    """Negative control: a KV cache that is damaged on its way from one server to the other."""
    _, decode, store, proxy = roles
    ask_until(roles, texts, expected, 10)
    assert decode.log_path.read_text().count("External Cache Hit!") >= len(texts)

    damaged = []
    with proxy.doing_between(store.damage):
        for text in texts[:4]:  # one by one: all that is stored is of one prompt
            store.clear()
            damaged += complete(proxy, [text], TOKENS)
    assert damaged != expected[:4]
    ask_until(roles, texts, expected, 10)


def test_each_server_counts_the_tokens_of_its_stage(roles):
    """After the test above, which sent both kinds of steps to both servers."""
    prefill, decode, *_ = roles
    for server in (prefill, decode):
        steps = server.steps()
        wrong = [step for step in steps if step[2] != [step[0] * TOP_K * step[1]] * LAYERS]
        assert wrong == []
        assert sum(tokens for tokens, counted, _ in steps if counted) > 1000
    # the decode server computes the tails of prompts, which it does not count
    assert any(tokens > 0 and not counted for tokens, counted, _ in decode.steps())
    assert all(tokens > 0 for tokens, counted, _ in prefill.steps() if counted)


@pytest.mark.parametrize("killed", ["prefill", "decode"])
def test_answers_are_equal_again_once_a_killed_server_is_back(roles, texts, expected, reference, killed):
    """Two rounds are under way: the prompts of the second one come from the store where it has them."""
    prefill, decode, store, proxy = roles
    server = prefill if killed == "prefill" else decode
    ask_until(roles, texts, expected, 1)
    store.clear()
    step, before = decode.stats().step, proxy.sent_again[server.url]
    begun = {"prefill": lambda: any(store.path.iterdir()), "decode": lambda: decode.stats().step > step + 3}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [complete(proxy, texts) for _ in range(2)])
        wait_until(begun[killed], 60, "a step with these requests")
        server.kill()
        if killed == "prefill":
            store.drop_parts()
        wait_until(lambda: proxy.sent_again[server.url] > before, 60, "a request that is not answered")
        server.start()
        server.wait()
        assert answers.result(timeout=400) == [reference[:12]] * 2
    ask_until(roles, texts, expected, 1)  # it balances again
