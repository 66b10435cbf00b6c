# SPDX-License-Identifier: Apache-2.0
"""ControlChannel and flight recorder on one rank, without a process group."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from vllm_ascend_eplb.agreement.channel import (
    FIELDS,
    Agreed,
    ControlChannel,
    ControlError,
    Facts,
    FlightEntry,
    FlightRecorder,
    agree,
)
from vllm_ascend_eplb.agreement.exchange import require_equal
from vllm_ascend_eplb.agreement.phases import CycleSettings, CycleState, Phase
from vllm_ascend_eplb.agreement.transition import advance

LARGE = 2**62 - 1


def test_agreed_facts_are_minimum_and_maximum() -> None:
    agreed = agree([Facts(step=3, rounds_done=4, placement=LARGE), Facts(step=3, rounds_done=2, failure=7)])
    assert agreed.min == Facts(step=3, rounds_done=2)
    assert agreed.max == Facts(step=3, rounds_done=4, failure=7, placement=LARGE)


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_facts_are_read_as_many_posts_later_as_the_lag_is(lag: int) -> None:
    channel = ControlChannel(None, 0, 1, lag)
    for step in range(20):
        channel.post(Facts(step=step, placement=LARGE))
        agreed = channel.read()
        if step < lag:
            assert agreed is None
        else:
            assert agreed == Agreed(Facts(step=step - lag, placement=LARGE), Facts(step=step - lag, placement=LARGE))


def test_facts_from_before_a_pause_are_not_read_after_it() -> None:
    channel = ControlChannel(None, 0, 1, 2)
    for step in range(5):
        channel.post(Facts(step=step))
        channel.read()
    read = []
    for step in range(100, 105):
        channel.post(Facts(step=step))
        read.append(channel.read())
    assert [agreed and agreed.max.step for agreed in read] == [None, None, 100, 101, 102]


def test_channel_that_is_not_read_is_an_error() -> None:
    channel = ControlChannel(None, 0, 1, 1)
    channel.post(Facts())
    channel.post(Facts())
    with pytest.raises(ControlError, match="read after every post"):
        channel.post(Facts())


@pytest.mark.parametrize("lag", [-1, 9])
def test_lag_out_of_range_is_refused(lag: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.8"):
        ControlChannel(None, 0, 1, lag)


def test_several_ranks_need_a_group() -> None:
    with pytest.raises(ValueError, match="process group"):
        ControlChannel(None, 0, 2)


def test_bulk_operations_of_a_single_rank_are_done_at_once() -> None:
    channel = ControlChannel(None, 0, 1)
    load = np.arange(6).reshape(1, 2, 3)
    reduction = channel.reduce_load(load)
    assert reduction.done()
    assert np.array_equal(reduction.result(), load)
    assert channel.broadcast(b"plan", 4).result() == b"plan"
    assert channel.broadcast(b"", 0).result() == b""
    with pytest.raises(ControlError, match="agreed on 5 bytes"):
        channel.broadcast(b"plan", 5)


def test_bulk_operations_take_no_memory() -> None:
    channel = ControlChannel(None, 0, 1)
    channel.reserve(1 << 20)
    load, plan = np.ones((1024, 1024), dtype=np.int64), bytes(1 << 20)
    tracemalloc.start()
    reduction = channel.reduce_load(load)
    message = channel.broadcast(plan, len(plan))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1 << 16
    assert np.shares_memory(reduction.result(), load)
    assert message.result() == plan


def test_a_single_rank_agrees_with_itself_at_start() -> None:
    require_equal(None, 1, {"version": "1"})


def test_flight_record_can_be_written_read_and_replayed(tmp_path: Path) -> None:
    settings = CycleSettings(collect_steps=5, execution_steps=1, first_collect_steps=3)
    state, recorder, channel = CycleState.start(settings), FlightRecorder(16), ControlChannel(None, 0, 1)
    states = []
    for _ in range(40):
        facts = agreed = None
        if state.active:
            facts = Facts(step=state.step, epoch=state.epoch, ready=1)
            channel.post(facts)
            agreed = channel.read()
        state, _ = advance(state, agreed, settings)
        states.append(state)
        recorder.record(state.phase, facts, agreed)
    assert {state.phase for state in states} >= {Phase.COLLECT, Phase.SNAPSHOT, Phase.REDUCE, Phase.PLAN}
    recorder.dump(tmp_path / "flight.json", rank=0, reason="test", settings=settings)
    entries = FlightRecorder.load(tmp_path / "flight.json")
    assert tuple(entries) == recorder.entries
    assert len(entries) == 16
    replayed = states[-17]
    for entry in entries:
        replayed, _ = advance(replayed, entry.agreed, settings)
        assert replayed.phase == entry.phase
    assert replayed == states[-1]


def test_flight_record_of_another_version_is_refused(tmp_path: Path) -> None:
    recorder = FlightRecorder()
    recorder.record(1, Facts(), None)
    path = tmp_path / "flight.json"
    recorder.dump(path)
    path.write_text(path.read_text().replace('"poisoned"', '"spoiled"'))
    with pytest.raises(ValueError, match="records the fields"):
        FlightRecorder.load(path)
    assert FlightEntry(1, Facts(), None) == recorder.entries[0]
    assert "poisoned" in FIELDS
