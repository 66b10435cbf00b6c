# SPDX-License-Identifier: Apache-2.0
"""Reload and sleep: an engine loads other weights, or frees the memory of weights, while the balancer runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..agreement.exchange import exchange_bytes, require_equal
from ..agreement.phases import Command, Phase
from .work import Parts, Work

NO_DEADLINE = 10**9
"""Steps: more than any plan takes."""


TURN_SECONDS = 0.0005
"""Pause before the next turn if the last one changed nothing, where turns are made without forwards."""


@contextlib.contextmanager
def new_weights(parts: Parts, work: Work, back_to_start: Callable[[], None]) -> Iterator[None]:
    """Context for the loading of weights; all ranks together, at the same step, between two forwards. Blocks.

    An engine loads weights by the start placement. So that placement is put in force before, and the experts'
    checksums are learned again afterwards.

    Args:
        parts, work: parts and state of the balancer.
        back_to_start: drops the cycle under way and switches to the start placement.

    Raises:
        StartError: the ranks are not at the same step. Nothing was changed.
        RuntimeError: copies of an expert differ after weights were loaded.
    """
    come_to_rest(parts, work, back_to_start)
    group, num_ranks = parts.adaptor.control_group, parts.adaptor.topology.num_ranks
    sound = b"" if parts.loader.poisoned else b"sound"
    intact = all(exchange_bytes(group, num_ranks, sound))
    try:
        yield
    finally:  # also on a rank that failed, because the other ranks wait for its sums
        differing = parts.loader.learn_checksums(work.placement) if intact else parts.differing
    if differing > parts.differing:
        raise RuntimeError(
            f"copies of {differing - parts.differing} experts differ from each other after weights were loaded: "
            "the server would answer wrongly; restart it, or leave eplb_config out"
        )


def come_to_rest(parts: Parts, work: Work, drop: Callable[[], None]) -> None:
    """Waits for transfers in flight and drops the cycle; all ranks together, at the same step, between two forwards.
    Blocks.

    Args:
        parts, work: parts and state of the balancer.
        drop: drops the cycle; called when nothing is in flight.

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
    """Moves every expert back to its start slots, because a part of the weights is about to be loaded there; all
    ranks together, at rest. Blocks: makes steps without forwards until the experts are back, without a deadline.

    Args:
        parts, work: parts and state of the balancer.
        turn: makes one step of the agreed state.

    Raises:
        RuntimeError: balancing is off, or the cycle failed; raised on all ranks alike.
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
