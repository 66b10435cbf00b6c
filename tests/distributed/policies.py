# SPDX-License-Identifier: Apache-2.0
"""Planners that misbehave. The planner's process imports this module, so it imports neither torch nor pytest."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ascend_eplb.planning.request import PlanAnswer, PlanRequest, plan_request
from vllm_ascend_eplb.planning.schedule import schedule_rounds
from vllm_ascend_eplb.values.plan import Plan
from vllm_ascend_eplb.values.rounds import rounds_to_array
from vllm_ascend_eplb.values.topology import Topology


def answer_once(request: PlanRequest) -> Plan:
    """Plan in the first cycle only."""
    return plan_request(request) if request.number == 1 else never_answer(request)


def plan_at_a_signal(request: PlanRequest) -> Plan:
    """In the third cycle, give the signal "asked" and wait for "go"."""
    if request.number == 3:
        _signal("asked").touch()
        _wait_for_signal("go")
    return plan_request(request)


def never_answer(request: PlanRequest) -> Plan:
    time.sleep(3600)
    raise AssertionError("the planner must be killed before it answers")


def _signal(name: str) -> Path:
    return Path(os.environ["EPLB_TEST_SIGNALS"], name)


def _wait_for_signal(name: str) -> None:
    while not _signal(name).exists():
        time.sleep(0.001)


def talk_nonsense(request: PlanRequest) -> Plan:
    """Write a different malformed answer into the pipe of answers in every odd cycle."""
    good = plan_request(request)
    answers = sys._getframe(1).f_locals["answers"]
    pipe = answers._writer.fileno()
    rounds = rounds_to_array(
        schedule_rounds(request.placement, good.moves, Topology(request.node_of_rank), request.buffer_experts)
    )
    number = request.number

    def answer(**changes: Any) -> None:
        values = {"number": number, "plan": good, "rounds": rounds, **changes}
        answers.put(PlanAnswer(**values))

    def changed(column: int, value: int) -> np.ndarray:
        array = rounds.copy()
        array[0, column] = value
        return array

    if number == 1:  # no pickle at all
        answers._sem.acquire(False)  # as for every message
        answers._writer.send_bytes(b"\x80\x05garbage" * 20)
    elif number == 3:  # a message that claims 2**62 bytes
        os.write(pipe, struct.pack("!i", -1) + struct.pack("!Q", 1 << 62) + b"x" * 100)
        time.sleep(3600)
    elif number == 5:  # objects that are no answers, then numbers of other cycles, then the right answer twice
        for thing in ("a string", None, [1, 2], {"number": number}, np.zeros(3)):
            answers.put(thing)
        for wrong_number in (number - 1, number + 1, "5", np.array([5, 5]), None):
            answer(number=wrong_number)
        answer()
    elif number == 7:  # floats where integers belong
        answer(rounds=rounds.astype(np.float64) + 0.5)
    elif number == 9:  # another shape
        answer(plan=replace(good, physical_to_logical=good.physical_to_logical[:, :-2]))
    elif number == 11:  # a slot out of range
        answer(rounds=changed(3, 10_000))
    elif number == 13:  # an expert that does not exist
        answer(rounds=changed(4, request.num_experts))
    elif number == 15:  # a source that holds another expert
        answer(rounds=changed(6, int(rounds[0, 6]) ^ 1))
    elif number == 17:  # moves that lose an expert
        row = np.array([[0, -1, 0, slot, 1, 0, 1] for slot in (0, 12)], dtype=np.int32)
        answer(rounds=row)
    elif number == 19:  # not a number
        answer(plan=replace(good, par_after=good.par_after * np.nan))
    elif number == 21:  # no plan at all
        answer(plan="better luck next time")
    elif number == 23:  # rounds that do not lead to the plan's placement
        answer(rounds=rounds[:1])
    elif number == 25:  # more rows than the plan could ever have
        answer(rounds=np.tile(rounds, (50, 1)))
    elif number == 27:  # useless but valid: two copies of an expert on a rank
        return plan_duplicate(request)
    return good


def plan_duplicate(request: PlanRequest) -> Plan:
    """One move: a second copy of a rank's expert replaces an expert on that rank that has another copy."""
    target = request.physical_to_logical.copy()
    row, size = target[0], request.placement.slots_per_rank
    neighbour = [first + (slot + 1) % size for first in range(0, len(row), size) for slot in range(size)]
    copies = np.bincount(row)
    slot = next(
        slot for slot, next_slot in enumerate(neighbour) if copies[row[slot]] > 1 and row[slot] != row[next_slot]
    )
    row[slot] = row[neighbour[slot]]
    return Plan.between(request.placement, target, request.load.sum(axis=0))


def late_once(request: PlanRequest) -> Plan:
    if request.number == 1:
        _wait_for_signal("given up")
    return plan_request(request)


def misbehave(request: PlanRequest) -> Plan:
    """Plan, with a different fault in each of the first five cycles."""
    good = plan_request(request)
    if request.number == 1:
        raise MemoryError("planted")
    if request.number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if request.number == 3:  # an expert is lost: the scheduler in the child notices
        return replace(good, moves=np.array([[0, slot, 1, slot] for slot in (0, 12)], dtype=np.int32))
    if request.number == 4:  # a plan for another shape
        return replace(good, physical_to_logical=good.physical_to_logical[:, :-1])
    if request.number == 5:  # moves that do not lead to the plan's placement
        return replace(good, physical_to_logical=request.physical_to_logical, moves=good.moves)
    return good


def always_fail(request: PlanRequest) -> Plan:
    raise ArithmeticError(f"planted in cycle {request.number}")


def plan_windows(request: PlanRequest) -> Plan:
    """Plan from a load of four equal windows."""
    return plan_request(replace(request, load=np.concatenate([request.load] * 4)))
