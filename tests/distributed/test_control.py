# SPDX-License-Identifier: Apache-2.0
"""Agreement between processes: all ranks read the same result at the same step, even if some ranks are late."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_ascend_eplb.agreement.channel import Agreed, ControlChannel, ControlError, Facts
from vllm_ascend_eplb.agreement.exchange import StartError, require_equal

from .pace import give_signal, wait_for, wait_for_signal
from .ranks import Ranks, run_ranks

pytestmark = pytest.mark.distributed


def chat(ranks: Ranks, lag: int) -> list[Agreed | None]:
    channel = ControlChannel(ranks.control, ranks.rank, ranks.num_ranks, lag)
    luck = random.Random(ranks.rank)
    heard: list[Agreed | None] = []
    for step in range(120):
        if luck.random() < 0.1:
            time.sleep(luck.random() * 0.02)
        if 50 <= step < 60:
            continue  # nothing is posted between cycles
        channel.post(Facts(step=step, ready=ranks.rank, failure=step * ranks.rank, placement=2**62 - 1))
        heard.append(channel.read())
    assert channel.waiting.reads == 110 - lag
    return heard


@pytest.mark.parametrize(("num_ranks", "lag"), [(2, 1), (4, 3)])
def test_all_ranks_read_the_same_at_the_same_step(num_ranks: int, lag: int) -> None:
    heard = run_ranks(num_ranks, chat, lag)
    assert all(said == heard[0] for said in heard)
    steps = [step for step in range(120) if not 50 <= step < 60]
    for position, agreed in enumerate(heard[0]):
        step = steps[position] - lag
        if position < lag or 50 <= position < 50 + lag:
            assert agreed is None
        else:
            assert agreed is not None
            assert (agreed.min.step, agreed.max.step) == (step, step)
            assert (agreed.min.ready, agreed.max.ready) == (0, num_ranks - 1)
            assert (agreed.min.failure, agreed.max.failure) == (0, step * (num_ranks - 1))
            assert agreed.min.placement == agreed.max.placement == 2**62 - 1


def bulk(ranks: Ranks) -> tuple[list[bool], int, bytes, str]:
    channel = ControlChannel(ranks.control, ranks.rank, ranks.num_ranks)
    load = np.full((3, 5, 7), 10**15 + ranks.rank, dtype=np.int64)
    if ranks.rank == 1:
        wait_for_signal("reducing")
    reduction = channel.reduce_load(load)
    early = [reduction.done()]
    if ranks.rank == 0:
        give_signal("reducing")
    refused = ""
    if ranks.rank == 0:
        try:
            channel.broadcast(b"", 0)
        except ControlError as error:
            refused = str(error)
    for step in range(50):  # agreement continues during the reduction
        channel.post(Facts(step=step))
        channel.read()
    wait_for(reduction.done, "the reduction")
    total = reduction.result()
    plan = bytes(range(256)) * 100
    message = channel.broadcast(plan if ranks.rank == 0 else None, len(plan))
    wait_for(message.done, "the broadcast")
    return early, 0 if total is None else int(total.sum()), message.result(), refused


def test_load_and_plan_travel_without_blocking() -> None:
    results = run_ranks(2, bulk)
    assert results[0][0] == [False]  # rank 1 was late, and rank 0 did not wait for it
    assert results[0][1] == 105 * (2 * 10**15 + 1)
    assert results[1][1] == 0
    assert all(result[2] == bytes(range(256)) * 100 for result in results)
    assert "still under way" in results[0][3]


def compare(ranks: Ranks, values: list[dict[str, object]]) -> str:
    try:
        require_equal(ranks.control, ranks.num_ranks, values[ranks.rank])
    except StartError as error:
        return str(error)
    return ""


def test_ranks_with_different_values_are_named() -> None:
    same = {"version": "1", "placement": 5}
    assert run_ranks(2, compare, [same, same]) == ["", ""]
    for said in run_ranks(3, compare, [same, same, {**same, "placement": 6}]):
        assert "rank 2 differs from rank 0 in placement: 6 against 5" in said


def lose_a_peer(ranks: Ranks, said: str) -> None:
    channel = ControlChannel(ranks.control, ranks.rank, ranks.num_ranks)
    for step in range(3):
        channel.post(Facts(step=step))
        channel.read()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for step in range(3, 10):
            channel.post(Facts(step=step))
            channel.read()
    except ControlError as error:
        Path(said).write_text(str(error))


def test_dead_peer_is_an_error_and_not_an_endless_wait(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, lose_a_peer, str(said), survive=lambda: said.exists() and said.stat().st_size > 0)
    assert "a peer exited" in said.read_text()
