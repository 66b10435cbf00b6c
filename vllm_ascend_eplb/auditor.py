# SPDX-License-Identifier: Apache-2.0
"""Auditor: the updator's hand in the audits of the weights (audit.py), on every rank.

Between two cycles it sums a few slots at each step. When an audit is agreed on it tells whether this rank holds damage;
on EP rank 0 it says which slots are damaged, and plans what mends them.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from .audit import Damage, find_damage, repair_rounds
from .config import EplbConfig
from .placement import Int32Array, Placement
from .rounds import LAYER, SLOT, Round
from .transfer import D2DExpertWeightLoader

logger = logging.getLogger("vllm.eplb")

SHOWN = 8
"""Damaged slots that a line in the log names."""


class Auditor:
    """One rank's audits, pass after pass.

    Args:
        loader: knows the slots, and the checksums that their experts have.
        config: the settings; its ``audit_interval`` is not 0.
        title: how lines in the log begin.
    """

    def __init__(self, loader: D2DExpertWeightLoader, config: EplbConfig, title: str) -> None:
        self._loader, self._config, self._title = loader, config, title
        self._slots = loader.audit(config.audit_interval)
        self._table = loader.checksums
        self._error: Exception | None = None
        self._last_damage: list[Damage] = []

    def step(self) -> None:
        """Sums a few slots. An exception is raised when the audit is agreed on, so that the other ranks learn of it."""
        if self._table is not self._loader.checksums:  # the weights are others since a moment ago
            self._table = self._loader.checksums
            self.restart()
        if self._error is None:
            try:
                self._slots.step()
            except Exception as error:
                self._error = error

    @property
    def failed(self) -> bool:
        """Whether summing threw an exception in this pass."""
        return self._error is not None

    def complete(self) -> bool:
        """Whether all slots of this rank have been summed.

        Raises:
            Exception: what summing them threw.
        """
        if self._error is not None:
            raise self._error
        return self._slots.complete

    def restart(self) -> None:
        """Begins a new pass."""
        self._error = None
        self._slots.restart()

    def committed(self, moves: Int32Array) -> None:
        """Slots of this rank that the moves [N, 5] of a round wrote are summed again."""
        owners, slots = np.divmod(moves[:, SLOT], self._loader.slots_per_rank)
        mine = owners == self._loader.rank
        self._slots.written(moves[mine, LAYER], slots[mine])

    def damaged(self, placement: Placement) -> int:
        """Slots of this rank that do not hold their expert; the pass is complete."""
        table = self._loader.checksums
        return 0 if table is None else self._slots.damaged(placement, table, self._loader.rank)

    def sums(self, placement: Placement) -> npt.NDArray[np.int64]:
        """[L, P], zero for the slots of other ranks: their sum over the ranks is the table of all slots."""
        sums = np.zeros((placement.num_layers, placement.num_slots), dtype=np.int64)
        first = self._loader.rank * placement.slots_per_rank
        sums[:, first : first + placement.slots_per_rank] = self._slots.sums
        return sums

    def plan_repair(self, sums: npt.NDArray[np.int64], placement: Placement, step: int) -> tuple[int, list[Round]]:
        """On EP rank 0: says in the log what is damaged.

        Args:
            sums: [L, P], of all slots.
            placement: in force.
            step: of the audit, for the log.

        Returns:
            Damaged slots, and the rounds that mend them as far as good copies are known and ``audit_action`` asks
            for it.
        """
        table, config = self._loader.checksums, self._config
        if table is None:
            return 0, []
        damage, count = find_damage(sums, placement, table, self._loader.topology)
        rounds: list[Round] = []
        if config.audit_action == "repair" and config.mode != "observe":
            rounds = repair_rounds(damage, placement.slots_per_rank, self._loader.buffer_experts)
        mending = sum(len(each.moves) for each in rounds)
        if mending or damage != self._last_damage:
            self._last_damage = damage
            logger.error(
                "%s audit at step %d: %d of %d slots do not hold the weights of their expert: %s; %s",
                self._title,
                step,
                count,
                sums.size,
                "; ".join(each.text(placement.slots_per_rank) for each in damage[:SHOWN])
                + ("; ..." if count > SHOWN else ""),
                self._what_is_done(mending, count, len(damage)),
            )
        return count, rounds

    def _what_is_done(self, mending: int, count: int, known: int) -> str:
        if mending == count:
            return "good copies are being sent there"
        if self._config.audit_action == "repair":
            why = "the next ones follow" if count > known else "the others have none: load the weights anew"
            return f"{mending} get good copies, {why}"
        return 'answers may be wrong: load the weights anew, or set "audit_action": "repair" in eplb_config'
