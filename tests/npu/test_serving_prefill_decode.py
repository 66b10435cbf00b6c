# SPDX-License-Identifier: Apache-2.0
"""A prefill server and then a decode server of the unmodified vllm-ascend, which hand over the KV cache in a folder:
the real torch_npu on emulated CANN, as A3. Both balance by settings of their own.

The decode server sends all its batches by MC2, so vllm-ascend leaves out the exchange of batch sizes between its
engines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from . import npus
from .serving import (
    MAX_SEQUENCES,
    MISSING,
    SETTINGS,
    TOKENS,
    NpuServer,
    freeze_weights_until_noticed,
    prompts,
    serve_until,
    transformers_tokens,
)

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(npus.REAL, reason="tests the emulated stack"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
TOP_K = 4
BLOCK = 128
"""Tokens of a block, the only number that vllm-ascend's attention takes; whole blocks are handed over."""
CYCLES = 10
MOST_ROUNDS = 60
DOMAINS = ("english", "japanese", "python", "russian")
BATCHES = [batch for domain, batch in zip(DOMAINS, prompts(3, 600), strict=True) if domain != "japanese"]
"""Prompts that are longer than a block."""


def serve(folder: Path, role: str, settings: dict[str, object], arguments: tuple[str, ...], **further: object):
    """A server of two data-parallel engines with a role."""
    transfer = {
        "kv_connector": "PairConnector",
        "kv_connector_module_path": "tests.npu.kv_pairs",
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
    }
    (folder / role).mkdir()
    return NpuServer(
        None,
        folder / role,
        ranks=1,
        device="A3",
        probe=True,
        arguments=(
            *("--data-parallel-size", "2", "--block-size", str(BLOCK), "--kv-transfer-config", json.dumps(transfer)),
            *("--additional-config", json.dumps({"eplb_config": {**SETTINGS, **settings}, **further})),
            *arguments,
        ),
    ).started()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    (folder / "kv").mkdir()
    return folder


@pytest.fixture(scope="module")
def want(folder: Path) -> list[list[list[int]]]:
    """The answers of transformers, by batch."""
    flat = transformers_tokens(folder, [text for batch in BATCHES for text in batch], TOKENS)
    return [flat[begin : begin + len(BATCHES[0])] for begin in range(0, len(flat), len(BATCHES[0]))]


def test_prefill_server_moves_experts_and_first_tokens_are_equal(folder: Path, want: list[list[list[int]]]) -> None:
    """A step has one prompt for each engine, so that prompts make many steps. Every round computes all prompts, so the
    load stays the same; the policy moves experts all the same."""
    arguments = ("--max-num-seqs", "1", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "512")
    settings = {"eplb_heat_collection_stage": "prefill", "policy": "random", "transfer_buffer_experts": 64}
    server = serve(folder, "kv_producer", settings, arguments)
    try:
        for _ in range(MOST_ROUNDS):
            for entry in (folder / "kv").iterdir():
                shutil.rmtree(entry)
            for batch, expected in zip(BATCHES, want, strict=True):
                assert server.complete(batch, 1) == [answer[:1] for answer in expected]
            if server.cycles_done() >= CYCLES:
                break
        stats = server.stats()
        assert stats is not None
        assert stats.cycles_done >= CYCLES
        assert stats.cycles_failed == 0
        assert not server.unexpected_races()[:3]
    finally:
        assert server.stop() == []
    assert len(list((folder / "kv").iterdir())) == sum(map(len, BATCHES))


@pytest.fixture(scope="module")
def decode(folder: Path) -> Iterator[NpuServer]:
    """After the test above, whose server has left the KV cache of every prompt."""
    settings = {"num_redundant_experts": 0, "eplb_heat_collection_stage": "decode"}
    server = serve(folder, "kv_consumer", settings, ("--max-num-batched-tokens", "128"), enable_prefill_mc2=True)
    server.call("probe_watch")
    yield server
    server.stop()


def test_decode_server_moves_experts_and_tokens_are_equal(decode: NpuServer, want: list[list[list[int]]]) -> None:
    serve_until(decode, BATCHES, want, CYCLES)
    stats = decode.stats()
    assert stats is not None
    assert stats.cycles_failed == 0
    assert all(cycle.moved > 0 for cycle in stats.cycles if cycle.result == "done")
    assert decode.log.count("External Cache Hit!") >= CYCLES
    assert not decode.unexpected_races()[:3]


def test_engines_of_a_kv_consumer_count_the_same_steps(decode: NpuServer, want: list[list[list[int]]]) -> None:
    """The second engine alone computes the tails of prompts, while the first one is idle. Slots count a step if
    no engine has more tokens than decoding takes. Negative control: steps chosen by the first engine's batch."""
    for _ in range(4):
        assert decode.complete(BATCHES[0][:1], TOKENS, engine=1) == want[0][:1]
    first = decode.call("probe_watched")[0]
    loads = np.array(first["loads"])
    own, counted = [], []
    for window in first["batches"][: len(loads)]:
        sent = [tokens for _, tokens in window]
        counted.append(TOP_K * sum(sum(step) for step in sent if max(step) <= MAX_SEQUENCES))
        own.append(TOP_K * sum(sum(step) for step in sent if step[0] <= MAX_SEQUENCES))
    np.testing.assert_array_equal(loads.sum(axis=2), np.array(counted)[:, None].repeat(loads.shape[1], axis=1))
    assert own != counted


def test_damaged_kv_cache_changes_tokens(decode: NpuServer, folder: Path, want: list[list[list[int]]]) -> None:
    """Negative control: the decode server answers by what the prefill server computed."""
    shutil.copytree(folder / "kv", folder / "kept")
    for file in (folder / "kv").glob("*/*.safetensors"):
        save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    assert decode.complete(BATCHES[0], TOKENS) != want[0]
    shutil.rmtree(folder / "kv")
    (folder / "kept").rename(folder / "kv")
    assert decode.complete(BATCHES[0], TOKENS) == want[0]


def test_weights_that_did_not_move_change_tokens(decode: NpuServer, want: list[list[list[int]]]) -> None:
    """Negative control. It runs last, because it leaves wrong weights."""
    freeze_weights_until_noticed(decode, BATCHES, want)
