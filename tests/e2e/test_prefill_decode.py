# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode in separate engines: the prefill engine writes the KV cache of the prompts into a folder, and the
decode engine reads it. Both balance with their own settings, and answers equal those of one process. So do those of
an engine of both roles, whose data-parallel parts hand prompts to each other.

The engines are data-parallel: vLLM's ExampleConnector names files by prompt and layer, so tensor-parallel ranks would
overwrite each other's heads.
"""

from __future__ import annotations

import json
import shutil

import pytest

from .conftest import BUSY, prompts

TOKENS = 24
BLOCK = 32
"""Tokens of a block. Only whole blocks of a prompt go from one engine to the other."""

ALL = prompts(6)


@pytest.fixture(scope="module")
def expected(reference):
    """The first tokens of the answers of one process."""
    return [answer[:TOKENS] for answer in reference]


def serve(runs, name, folder, role, redundant, stage, max_tokens, cycles=10, prompts=ALL, **job):
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return runs(
        name,
        ranks=1,
        eplb={**BUSY, "num_redundant_experts": redundant, "eplb_heat_collection_stage": stage},
        arguments={
            "data_parallel_size": 2,
            "kv_transfer_config": transfer,
            "block_size": BLOCK,
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,  # ExampleConnector would keep the first chunk of a prompt only
            "max_num_batched_tokens": 512,
        },
        probe=True,
        cycles=cycles,
        parts=[0, 1],
        prompts=prompts,
        max_tokens=max_tokens,
        **job,
    )


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    """The runs of the prefill engine and then of the decode engine, which is corrupted at the end."""
    folder = tmp_path_factory.mktemp("kv")
    prefill = serve(runs, "prefill", folder, "kv_producer", 4, "prefill", 1)
    assert prefill.code == 0, prefill.log[-6000:]
    decode = serve(runs, "decode", folder, "kv_consumer", 0, "decode", TOKENS, corrupt=True)
    assert decode.code == 0, decode.log[-6000:]
    shutil.rmtree(folder)
    return prefill, decode


def turns(tokens, expected):
    return [tokens[begin : begin + len(expected)] for begin in range(0, len(tokens), len(expected))]


def test_both_engines_answer_as_one_process_does(both, expected):
    """Negative control: the decode engine's maps are switched without weights."""
    prefill, decode = both
    first = [answer[:1] for answer in expected]
    assert all(turn == first for turn in turns(prefill.result["tokens"], first))
    assert all(turn == expected for turn in turns(decode.result["tokens"], expected))
    assert decode.result["corrupt_tokens"] != expected


def test_decode_engine_takes_prompts_from_the_other(both):
    _, decode = both
    assert "External Cache Hit!" in decode.log
    taken = decode.result["cached"]
    assert taken > 0
    assert taken % BLOCK == 0


def test_both_engines_balance_by_their_own_settings(both):
    """The engines have different redundancy and count different stages; both move experts with the right weights."""
    for run, redundant in zip(both, (4, 0), strict=True):
        ranks = run.result["ranks"]
        stats = json.loads(ranks[0]["stats"])
        assert stats["cycles_done"] >= 10
        assert stats["experts_moved"] > 0
        assert f"{redundant} redundant experts, on cpu" in run.log
        assert [rank["wrong_experts"] for rank in ranks] == [0, 0]
        assert ranks[0]["digest"] == ranks[1]["digest"]
    decode = both[1].result["ranks"]
    assert sum(map(sum, (rank["counted"] for rank in decode))) < sum(map(sum, (rank["routed"] for rank in decode)))


def test_an_engine_of_both_roles_answers_as_one_process_does(runs, expected, tmp_path):
    """``kv_both``: the first data-parallel part leaves the KV cache of every prompt, the second one takes it, turn by
    turn, while experts move. Negative control: maps switched without weights."""
    run = serve(runs, "kv both", tmp_path, "kv_both", 4, "all", TOKENS, cycles=4, prompts=ALL[:2], corrupt=True)
    assert run.code == 0, run.log[-6000:]
    first = expected[:12]
    assert all(turn == first for turn in turns(run.result["tokens"], first))
    assert len(run.result["tokens"]) >= 2 * len(first)  # a turn of each part
    assert run.result["corrupt_tokens"] != first
    assert any(tmp_path.glob("*/*.safetensors"))
    assert run.log.count("External Cache Hit!") >= len(first)
    ranks = run.result["ranks"]
    stats = json.loads(ranks[0]["stats"])
    assert stats["cycles_done"] >= 4
    assert stats["experts_moved"] > 0
    assert [rank["wrong_experts"] for rank in ranks] == [0, 0]
    assert ranks[0]["digest"] == ranks[1]["digest"]
