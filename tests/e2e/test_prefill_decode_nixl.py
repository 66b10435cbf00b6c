# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server as in test_prefill_decode_servers.py, with NixlConnector: the decode server
reads the KV cache from the prefill server's memory, while both move experts."""

from __future__ import annotations

import importlib.util
from typing import Any

import httpx
import pytest

from .conftest import BUSY
from .kv_proxy import both_roles
from .test_prefill_decode_servers import TOKENS, ask_until, expected, texts
from .test_server import complete

__all__ = ["expected", "texts"]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="no nixl"),
]


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    settings = {**BUSY, "expert_heat_collection_interval": 2, "transfer_buffer_experts": 256}
    with both_roles(
        tmp_path_factory.mktemp("roles"),
        {**settings, "eplb_heat_collection_stage": "prefill"},
        {**settings, "num_redundant_experts": 0, "eplb_heat_collection_stage": "decode"},
        nixl=True,
    ) as found:
        yield found


def swap_blocks(handed: dict[str, Any]) -> dict[str, Any]:
    """Lets the decode server read the blocks of a prompt in the wrong order."""
    return {**handed, "remote_block_ids": [group[::-1] for group in handed["remote_block_ids"]]}


def transfers(server) -> float:
    """How often the server has read a prompt's cache from the other."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:nixl_xfer_time_seconds_count"))


def test_answers_are_those_of_one_process_while_both_balance(roles, texts, expected):
    """Negative control: the blocks of a prompt are read in the wrong order."""
    _, decode, _, proxy = roles
    ask_until(roles, texts, expected, 10)
    assert transfers(decode) >= 2 * len(texts)
    with proxy.doing_between(swap_blocks):
        assert complete(proxy, texts, TOKENS) != expected
    ask_until(roles, texts, expected, 10)
