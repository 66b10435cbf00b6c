# SPDX-License-Identifier: Apache-2.0
"""KV caches that leave one engine and are read by another, while the experts of both move."""

from __future__ import annotations

import json

from .conftest import BUSY, prompts
from .test_offline import TOKENS, assert_equal_every_turn, equal_tokens


def test_tokens_are_equal_where_kv_caches_are_handed_over(runs, reference, tmp_path_factory):
    """``kv_both``: the first data-parallel engine writes the KV cache of every prompt, the second one reads it, turn by
    turn. vLLM's ExampleConnector names files by layer alone, so that engines of one tensor-parallel rank are needed.

    Negative control: with maps switched without weights, the tokens differ.
    """
    folder = tmp_path_factory.mktemp("kv")
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    run = runs(
        "kv",
        ranks=1,
        eplb=BUSY,
        parts=[0, 1],
        arguments={
            "data_parallel_size": 2,
            "kv_transfer_config": transfer,
            "block_size": 32,  # prompts have about a hundred tokens, and whole blocks are handed over
            "enable_prefix_caching": False,  # which would be asked first
        },
        corrupt=True,
        prompts=prompts(6),
        cycles=4,
        max_tokens=TOKENS,
    )
    assert run.code == 0, run.log[-6000:]
    assert [rank["failures"] for rank in run.result["ranks"]] == [0, 0]
    stats = json.loads(run.result["ranks"][0]["stats"])
    assert stats["cycles_done"] >= 4
    assert stats["experts_moved"] > 4 * 6 * 64 / 2
    assert any(folder.glob("*/*.safetensors"))
    assert run.log.count("External Cache Hit!") >= len(reference)
    assert_equal_every_turn(run.result["tokens"], reference)
    equal, total = equal_tokens(run.result["corrupt_tokens"], reference)
    assert equal < total * 0.7
