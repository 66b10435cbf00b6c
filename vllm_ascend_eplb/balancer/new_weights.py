# SPDX-License-Identifier: Apache-2.0
"""Reload and sleep: an engine loads other weights, or frees the memory of weights, while the balancer runs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..agreement.exchange import exchange_bytes, require_equal
from ..agreement.phases import Command, Phase
from ..agreement.transition import abandon
from .lead import Lead
from .rollout import Rollout
from .work import Parts, Work

logger = logging.getLogger("vllm.eplb")

NO_DEADLINE = 10**9
"""Steps: more than any plan takes."""


TURN_SECONDS = 0.0005
"""Pause before the next turn if the last one changed nothing, where turns are made without forwards."""


class NewWeights:
    """What the balancer does when an engine loads other weights, or frees their memory. All ranks call each method
    together, at the same step, between two forwards; every call blocks.

    Args:
        parts, work: parts and state of the balancer.
        rollout, lead: collaborators that learn of it; ``lead`` on EP rank 0 only.
        forget: drops what was prepared for a cycle.
        turn: makes one step of the agreed state.
    """

    def __init__(
        self,
        parts: Parts,
        work: Work,
        rollout: Rollout,
        lead: Lead | None,
        *,
        forget: Callable[[], None],
        turn: Callable[[], None],
    ) -> None:
        self._parts, self._work = parts, work
        self._rollout, self._lead = rollout, lead
        self._forget, self._turn = forget, turn

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Context for the loading of weights.

        An engine loads weights by the start placement. So that placement is put in force before, and the experts'
        checksums are learned again afterwards.

        Raises:
            StartError: the ranks are not at the same step. Nothing was changed.
            RuntimeError: copies of an expert differ after weights were loaded.
        """
        parts = self._parts
        self._come_to_rest()
        self._back_to_start()
        group, num_ranks = parts.adaptor.control_group, parts.adaptor.topology.num_ranks
        sound = b"" if parts.loader.poisoned else b"sound"
        intact = all(exchange_bytes(group, num_ranks, sound))
        try:
            yield
        finally:  # also on a rank that failed, because the other ranks wait for its sums
            differing = parts.loader.learn_checksums(self._work.placement) if intact else parts.differing
        if differing > parts.differing:
            raise RuntimeError(
                f"copies of {differing - parts.differing} experts differ from each other after weights were loaded: "
                "the server would answer wrongly; restart it, or leave eplb_config out"
            )

    def rest(self, *, at_start: bool) -> None:
        """Ends the cycle under way, before the memory of the weights is freed.

        Args:
            at_start: whether to switch to the start placement as well, because the weights will be loaded again.

        Raises:
            StartError: the ranks are not at the same step. Nothing was changed.
        """
        self._come_to_rest()
        if at_start:
            self._back_to_start()
        else:
            self._drop_cycle()
        self._rollout.settle()

    def move_back(self) -> None:
        """Moves every expert back to its start slots, because a part of the weights is about to be loaded there. Makes
        steps without forwards until the experts are back, without a deadline.

        Raises:
            StartError: the ranks are not at the same step. Nothing was changed.
            RuntimeError: balancing is off, or the cycle failed; raised on all ranks alike.
        """
        parts, work = self._parts, self._work
        if work.placement == parts.start:
            return
        self.rest(at_start=False)
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
            self._turn()
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

    def _come_to_rest(self) -> None:
        """Waits for transfers in flight."""
        parts, state = self._parts, self._work.state
        require_equal(
            parts.adaptor.control_group,
            parts.adaptor.topology.num_ranks,
            {"the step": state.step, "the phase": state.phase.name, "the placement": self._work.placement.digest},
        )
        wait_until_idle(parts)

    def _drop_cycle(self) -> None:
        """Drops the cycle; rounds that were committed stay in force."""
        parts, work = self._parts, self._work
        parts.recorder.flush(work.placement)
        work.state = replace(abandon(work.state, parts.settings), wanted=work.state.wanted)
        self._forget()

    def _back_to_start(self) -> None:
        """Drops the cycle and switches the maps to the start placement, whose weights are about to be loaded."""
        parts, work = self._parts, self._work
        before = work.placement
        work.state = abandon(work.state, parts.settings)
        self._forget()
        self._rollout.back_to(parts.start)
        logger.info(
            "%s: weights are reloaded; from step %d on the placement is the initial one", parts.title, work.state.step
        )
        if self._lead is not None:
            self._lead.went_back(before)


def wait_until_idle(parts: Parts) -> None:
    """Waits until no weights are in flight and no bulk operation is under way on this rank."""
    while parts.loader.in_flight and not parts.loader.poisoned:
        parts.loader.tick()
        time.sleep(0.001)
    while parts.control.bulk_busy:
        time.sleep(0.001)
