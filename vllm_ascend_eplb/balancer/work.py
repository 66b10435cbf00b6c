# SPDX-License-Identifier: Apache-2.0
"""What the collaborators of EplbUpdator share: the parts of a balancer, and what holds on this rank at this step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..agreement.channel import ControlChannel
from ..agreement.phases import CycleSettings, CycleState, Do, Failure, Phase
from ..files.map_recorder import MapRecorder
from ..load.recorder import LoadRecorder
from ..observe.keeper import StatsKeeper
from ..observe.stats_file import StatsFile
from ..planning.process import EplbProcess
from ..settings.config import EplbConfig
from ..transfer.loader import D2DExpertWeightLoader
from ..values.placement import Placement
from .orders import OrderBox
from .served_model import EplbAdaptor

logger = logging.getLogger("vllm.eplb")


@dataclass
class Parts:
    """All that a balancer is made of; start.py builds it. Everybody reads a part where it is used, so tests and
    benchmarks may replace one.

    Attributes:
        adaptor: the model.
        config: the settings, equal on all ranks.
        settings: of the clock, derived from ``config``.
        control: agrees with the other ranks.
        loader: moves weights.
        stats: the statistics of this rank.
        differing: experts whose copies differed from each other when the weights were loaded first.
        planner: EP rank 0's planner process; None elsewhere.
        stats_file: where EP rank 0 publishes its statistics; None for nowhere.
        orders: where EP rank 0 finds what an operator orders; None for nowhere.
        map_recorder: where EP rank 0 records the placement in force; None for nowhere.
    """

    adaptor: EplbAdaptor
    config: EplbConfig
    settings: CycleSettings
    control: ControlChannel
    loader: D2DExpertWeightLoader
    stats: StatsKeeper
    differing: int = 0
    planner: EplbProcess | None = None
    stats_file: StatsFile | None = None
    orders: OrderBox | None = None
    map_recorder: MapRecorder | None = None

    @property
    def rank(self) -> int:
        return self.adaptor.rank

    @property
    def title(self) -> str:
        """How log lines begin."""
        return self.adaptor.title

    @property
    def recorder(self) -> LoadRecorder:
        return self.adaptor.recorder

    @property
    def start(self) -> Placement:
        """The placement that the engine loads weights into."""
        return self.adaptor.placement


@dataclass
class Work:
    """What holds on this rank at this step.

    Attributes:
        title, rank: for the log.
        state: the agreed state; equal on all ranks.
        placement: in force on this rank.
        failure: what went wrong on this rank in the cycle under way; the other ranks learn of it.
        reason: the failure in words.
        offer: on EP rank 0, once it has decided: the plan to broadcast, empty if there is nothing to carry out.
    """

    title: str
    rank: int
    state: CycleState
    placement: Placement
    failure: Failure = Failure.NONE
    reason: str = ""
    offer: bytes | None = None

    def begin(self) -> None:
        """Forgets the last cycle."""
        self.failure, self.reason, self.offer = Failure.NONE, "", None

    def fail(self, failure: Failure, error: BaseException) -> None:
        """Notes the first failure of the cycle, for the facts of the next step, and logs it."""
        if self.failure is not Failure.NONE:
            return
        self.failure = failure
        self.reason = f"{failure.text}: {type(error).__name__}: {error}"
        logger.warning("%s rank %d: %s", self.title, self.rank, self.reason)


BETWEEN_CYCLES = (Phase.COLLECT, Phase.LISTEN, Phase.AUDIT)
"""Phases in which no slot is written and none is on its way to another rank."""


FAILS_AS = {
    Phase.SNAPSHOT: Failure.SNAPSHOT,
    Phase.REDUCE: Failure.REDUCE,
    Phase.PLAN: Failure.PLANNER_FAILED,
    Phase.BROADCAST: Failure.PLAN_INVALID,
    Phase.MOVE: Failure.PREPARE,
    Phase.AUDIT: Failure.AUDIT,
}
"""What an exception in the background of a phase is to the other ranks."""


MAY_FAIL: dict[Do, Failure] = {
    Do.SNAPSHOT: Failure.SNAPSHOT,
    Do.REQUEST_PLAN: Failure.PLANNER_FAILED,
    Do.PREPARE: Failure.PREPARE,
    Do.PLAN_REPAIR: Failure.AUDIT,
}
"""Actions that nothing depends on yet: an exception drops the cycle."""
