# SPDX-License-Identifier: Apache-2.0
"""Reload and sleep: an engine loads other weights, or gives the memory of weights away, while the balancer runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..agreement.exchange import exchange_bytes, require_equal
from ..agreement.phases import Command, Phase
from .work import Parts, Work

NO_DEADLINE = 10**9
"""Steps: longer than any plan takes."""


TURN_SECONDS = 0.0005
"""Where steps are made without forwards: pause before the next turn where the last one changed nothing."""


@contextlib.contextmanager
def new_weights(parts: Parts, work: Work, back_to_start: Callable[[], None]) -> Iterator[None]:
    """Around the loading of weights; all ranks together, at the same step, between two forwards. Blocks.

    An engine loads weights into the slots as they were at the start. So the placement of the start is put in force
    before, and the experts' checksums are learned again afterwards.

    Args:
        parts, work: of the balancer.
        back_to_start: drops what is under way and switches to the placement of the start.

    Raises:
        StartError: the ranks are not at the same step. Nothing was changed.
        RuntimeError: afterwards, copies of an expert differ from each other.
    """
    come_to_rest(parts, work, back_to_start)
    group, num_ranks = parts.adaptor.control_group, parts.adaptor.topology.num_ranks
    sound = b"" if parts.loader.poisoned else b"sound"
    intact = all(exchange_bytes(group, num_ranks, sound))
    try:
        yield
    finally:  # on a rank that failed, too: the others wait for its sums
        differing = parts.loader.learn_checksums(work.placement) if intact else parts.differing
    if differing > parts.differing:
        raise RuntimeError(
            f"copies of {differing - parts.differing} experts differ from each other after weights were loaded: "
            "the server would answer wrongly; restart it, or leave eplb_config out"
        )


def come_to_rest(parts: Parts, work: Work, drop: Callable[[], None]) -> None:
    """Ends what is under way; all ranks together, at the same step, between two forwards. Blocks.

    Args:
        parts, work: of the balancer.
        drop: drops the cycle, once nothing is in flight.

    Raises:
        StartError: the ranks are not at the same step. Nothing was changed.
    """
    require_equal(
        parts.adaptor.control_group,
        parts.adaptor.topology.num_ranks,
        {"the step": work.state.step, "the phase": work.state.phase.name, "the placement": work.placement.digest},
    )
    wait_until_idle(parts)
    drop()


def move_back(parts: Parts, work: Work, turn: Callable[[], object]) -> None:
    """Moves every expert back to where it was loaded, because a part of the weights is about to be loaded there; all
    ranks together, at rest. Blocks: steps follow one another without forwards, and none is too late for a plan.

    Args:
        parts, work: of the balancer.
        turn: makes one step of the agreed state.

    Raises:
        RuntimeError: balancing is off, or the cycle failed; on all ranks alike.
    """
    before = work.state
    work.state = replace(
        before,
        wanted=Command.RESTORE,
        due=before.step,
        collect_steps=NO_DEADLINE,
        listen_at=before.step + NO_DEADLINE,  # an operator's order waits: it would end this one
    )
    while work.state.wanted is Command.RESTORE and work.state.failures == before.failures:
        if work.state.phase is Phase.OFF:
            break
        turn()
        time.sleep(TURN_SECONDS)
    ordered = before.wanted if before.wanted is not Command.RESTORE else Command.NONE
    due = work.state.step + before.collect_steps
    work.state = replace(
        work.state, wanted=ordered, due=due, collect_steps=before.collect_steps, listen_at=before.listen_at
    )
    if work.placement != parts.start:
        raise RuntimeError(
            "experts could not be moved back to where weights are loaded, so that no weights were taken: "
            f"{work.reason or 'balancing is off'}; restart the server"
        )


def wait_until_idle(parts: Parts) -> None:
    """Waits until no weights are in flight and no bulk operation is under way on this rank."""
    while parts.loader.in_flight and not parts.loader.poisoned:
        parts.loader.tick()
        time.sleep(0.001)
    while parts.control.bulk_busy:
        time.sleep(0.001)
