# SPDX-License-Identifier: Apache-2.0
"""Parts and Work: shared by the collaborators of EplbUpdator, the parts of a balancer and its state on this rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..agreement.channel import ControlChannel
from ..agreement.phases import CycleSettings, CycleState, Do, Failure, Phase
from ..files.map_recorder import DraftMapRecorder, MapRecorder
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
    """The parts of a balancer; start.py builds them. Code reads a part from here at every use, so tests and benchmarks
    may replace one.

    Attributes:
        adaptor: the served model.
        config: the settings, equal on all ranks.
        settings: timing of cycles, derived from ``config``.
        control: channel for agreement with the other ranks.
        loader: moves weights.
        stats: the statistics of this rank.
        differing: number of experts whose copies differed when the weights were first loaded.
        planner: the planner process of EP rank 0; None on other ranks.
        stats_file: statistics file of EP rank 0, or None.
        orders: orders of an operator, on EP rank 0; or None.
        map_recorder: recorder of the placement in force, on EP rank 0; or None.
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
    map_recorder: MapRecorder | DraftMapRecorder | None = None

    @property
    def rank(self) -> int:
        return self.adaptor.rank

    @property
    def title(self) -> str:
        """First words of log lines."""
        return self.adaptor.title

    @property
    def recorder(self) -> LoadRecorder:
        return self.adaptor.recorder

    @property
    def start(self) -> Placement:
        """The placement by which the engine loads weights."""
        return self.adaptor.placement


@dataclass
class Work:
    """The state of the balancer on this rank at this step.

    Attributes:
        title, rank: for the log.
        state: the agreed state; equal on all ranks.
        placement: the placement in force on this rank.
        failure: failure of this rank in the cycle under way; the other ranks learn of it.
        reason: the failure in words.
        offer: on EP rank 0, after its decision: the plan to broadcast, empty if there is nothing to carry out.
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
"""Phases in which no slot is written or transferred."""


FAILS_AS = {
    Phase.SNAPSHOT: Failure.SNAPSHOT,
    Phase.REDUCE: Failure.REDUCE,
    Phase.PLAN: Failure.PLANNER_FAILED,
    Phase.BROADCAST: Failure.PLAN_INVALID,
    Phase.MOVE: Failure.PREPARE,
    Phase.AUDIT: Failure.AUDIT,
}
"""The failure that an exception in the background of a phase is reported as."""


MAY_FAIL: dict[Do, Failure] = {
    Do.SNAPSHOT: Failure.SNAPSHOT,
    Do.REQUEST_PLAN: Failure.PLANNER_FAILED,
    Do.PREPARE: Failure.PREPARE,
    Do.PLAN_REPAIR: Failure.AUDIT,
}
"""Actions whose exception drops the cycle, because nothing depends on them yet."""
