# SPDX-License-Identifier: Apache-2.0
"""Reload and sleep: an engine loads other weights, or gives the memory of weights away, while the balancer runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ..agreement.exchange import exchange_bytes, require_equal
from .work import Parts, Work


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


def wait_until_idle(parts: Parts) -> None:
    """Waits until no weights are in flight and no bulk operation is under way on this rank."""
    while parts.loader.in_flight and not parts.loader.poisoned:
        parts.loader.tick()
        time.sleep(0.001)
    while parts.control.bulk_busy:
        time.sleep(0.001)
