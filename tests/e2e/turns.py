# SPDX-License-Identifier: Apache-2.0
"""Turns of reinforcement learning, over and over, in an engine that balances when it is told to.

In a turn experts move by an order, the engine sleeps, wakes up and takes new weights, and another order moves experts
back to where they were before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import probes
import resources
import weight_probes

from tests.processes import session_members

Answers = list[list[int]]

MOST_ASKED = 60
"""Times that the prompts are asked until a cycle is done."""


def take(
    engine: Any, ask: Callable[[], Answers], count: int, seconds: float, factors: Sequence[float]
) -> list[dict[str, Any]]:
    """Takes so many turns: sleeps of level 1 and 2 in turn, and the next of the updates in each turn.

    Args:
        ask: answers all prompts once.
        seconds: no turn begins later.

    Returns:
        For each turn the placements by rank after each part of it, the tokens before and after the new weights, and
        the resources of all processes of the engine.
    """
    engine.rpc(weight_probes.order, "pause")
    while not all(rank["paused"] for rank in engine.rpc(weight_probes.updated)):
        ask()

    def ask_until_cycle(order: str) -> Answers:
        """Answers until the ordered cycle is done."""
        wanted = max(engine.rpc(probes.cycles_done)) + 1
        engine.rpc(weight_probes.order, order)
        answers: Answers = []
        for _ in range(MOST_ASKED):
            answers += ask()
            if max(engine.rpc(probes.cycles_done)) >= wanted:
                return answers
        raise RuntimeError(f"no cycle is done though {order} was ordered {MOST_ASKED} turns of the prompts ago")

    def placements() -> list[str]:
        return [rank["placement"] for rank in engine.rpc(weight_probes.updated)]

    start = [rank["initial"] for rank in engine.rpc(weight_probes.updated)]
    taken: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for turn in range(count):
        if time.monotonic() > end:
            break
        before = ask_until_cycle("cycle")
        moved = placements()
        engine.sleep(1 + turn % 2)
        asleep = placements()
        engine.update_weights(factors[turn % len(factors)])
        updated = placements()
        after = ask_until_cycle("reapply")
        taken.append(
            {
                "start": start,
                "moved": moved,
                "asleep": asleep,
                "updated": updated,
                "restored": placements(),
                "before": before,
                "after": after,
                "resources": resources.measure([os.getpid(), *session_members(os.getpid())]),
            }
        )
    return taken
