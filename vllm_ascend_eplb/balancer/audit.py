# SPDX-License-Identifier: Apache-2.0
"""Audit: checks that every live slot still holds the weights of its logical expert.

A flipped bit in a slot, or a slot that holds another expert's weights, silently corrupts outputs. So each rank sums its
slots, a few at every step between two cycles. It compares the sums with the experts' checksums from start-up
(checksum.py), which are the same on all ranks and for all replicas. After a pass over all slots, all ranks learn in one
agreed step whether a rank found damage. Only then do the sums travel. For each damaged slot, EP rank 0 looks for a slot
of the same layer with the expert's weights: a replica, or a slot that was swapped with the damaged one.

``SlotAudit`` sums the slots of one rank; ``Auditor`` drives it, and the repair that may follow, for EplbUpdator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from ..agreement.channel import Bulk
from ..planning.message import pack_plan
from ..transfer.checksum import ChecksumTable, Summer, Sums, wrong_slots
from ..transfer.transport import Streams
from ..values.placement import Int32Array, Int64Array, Placement
from ..values.plan import LAYER, SLOT
from ..values.rounds import Round, rounds_to_array
from .repair import Damage, find_damage, repair_rounds
from .work import Parts, Work

logger = logging.getLogger("vllm.eplb")


STEP_SECONDS = 0.001
"""Most host time that summing may take in one step; at least one slot is summed."""


STEP_BYTES = 64 << 20
"""Most bytes of weights that are summed at one step, but at least one slot: tens of microseconds of a GPU's memory."""


MOST_PLACES = 64
"""Most slots that are summed at one step."""


_NOT_YET = -2


class SlotAudit:
    """Sums this rank's live slots, pass after pass.

    Args:
        slots: for each layer and local slot the expert's tensors, as flat uint8 views of the live weights.
        streams: streams of their device.
        interval: steps that a pass should take.

    The step thread makes all calls. Sums are enqueued on the compute stream, in order with commits; nothing waits for
    them.
    """

    def __init__(self, slots: Sequence[Sequence[Sequence[torch.Tensor]]], streams: Streams, interval: int) -> None:
        self._slots, self._streams = slots, streams
        self.num_layers, self.slots_per_rank = len(slots), len(slots[0])
        count = self.num_layers * self.slots_per_rank
        self._per_step = min(MOST_PLACES, -(-count // interval))
        self._summer = Summer(streams, self._per_step, max(len(layer[0]) for layer in slots))
        self._sums: Int64Array = np.full((self.num_layers, self.slots_per_rank), _NOT_YET, dtype=np.int64)
        self._next = 0
        self._under_way: list[tuple[int, int, int, Sums]] = []  # layer, slot, place, prepared sums
        self._event = streams.event()
        for layer in slots:  # the device's library allocates its memory here, before the engine serves
            self._summer.enqueue(self._summer.place(0, layer[0]))
        self._summer.fetch()

    def step(self) -> None:
        """Collects the sums of the last step, and enqueues the next. Never waits."""
        if self._under_way and not self._collect():
            return
        began, nbytes = time.perf_counter(), 0
        for place in range(self._per_step):
            todo = self._next_slot()
            if todo is None or (place and (nbytes > STEP_BYTES or time.perf_counter() - began > STEP_SECONDS)):
                break
            tensors = self._slots[todo[0]][todo[1]]
            sums = self._summer.place(place, tensors)
            self._summer.enqueue(sums)
            self._under_way.append((*todo, place, sums))
            self._next += 1
            nbytes += sum(tensor.numel() for tensor in tensors)
        if self._under_way:
            self._summer.fetch()
            if self._event is not None:
                self._event.record(self._streams.current())

    def _next_slot(self) -> tuple[int, int] | None:
        while self._next < self._sums.size:
            layer, slot = divmod(self._next, self.slots_per_rank)
            if self._sums[layer, slot] == _NOT_YET:
                return layer, slot
            self._next += 1
        return None

    def _collect(self) -> bool:
        if self._event is not None and not self._event.query():
            return False
        for layer, slot, place, sums in self._under_way:
            self._sums[layer, slot] = self._summer.value(place, sums)
        self._under_way.clear()
        return True

    def written(self, layers: Int32Array, slots: Int32Array) -> None:
        """Marks local slots as unsummed, because their weights changed."""
        self._sums[layers, slots] = _NOT_YET
        gone = set(zip(layers.tolist(), slots.tolist(), strict=True))
        self._under_way = [pending for pending in self._under_way if pending[:2] not in gone]
        self._next = 0

    def restart(self) -> None:
        """Begins a new pass."""
        self._sums.fill(_NOT_YET)
        self._under_way.clear()
        self._next = 0

    @property
    def complete(self) -> bool:
        """Whether every slot has been summed in this pass."""
        if self._under_way:
            self._collect()
        return not self._under_way and bool((self._sums != _NOT_YET).all())

    @property
    def sums(self) -> Int64Array:
        """int64 [L, S], the sums of the complete pass."""
        return self._sums

    def damaged(self, placement: Placement, table: ChecksumTable, rank: int) -> int:
        """Number of slots of this rank that do not hold their expert."""
        first = rank * self.slots_per_rank
        mine = placement.physical_to_logical[:, first : first + self.slots_per_rank]
        return int(np.count_nonzero(wrong_slots(self._sums, mine, table)))


SHOWN = 8
"""Most damaged slots that a log line names."""


class Auditor:
    """Drives the audits of this rank's slots, and their repair.

    A pass over the slots goes on between cycles. When it has ended on all ranks, a repair may follow: a cycle that sums
    checksums over the ranks instead of load, and copies experts again into slots where the placement in force has them.

    Args:
        parts, work: parts and state of the balancer; the setting ``audit_interval`` is not 0.
    """

    def __init__(self, parts: Parts, work: Work) -> None:
        self._parts, self._work = parts, work
        self._loader, self._config, self._title = parts.loader, parts.config, parts.title
        self._slots = SlotAudit(parts.loader.slots, parts.loader.streams, parts.config.audit_interval)
        self._table = parts.loader.checksums
        self._error: Exception | None = None
        self._last_damage: list[Damage] = []
        self._summand: Int64Array | None = None  # [L, P], from the end of a pass to the end of the audit
        self._sum: Bulk[Int64Array | None] | None = None  # during a repair
        self._damaged = 0

    def step(self) -> None:
        """Sums a few slots. An exception is kept and raised when the audit is agreed on, so that all ranks learn of
        it."""
        if self._table is not self._loader.checksums:  # weights were reloaded
            self._table = self._loader.checksums
            self._restart()
        if self._error is None:
            try:
                self._slots.step()
            except Exception as error:
                self._error = error

    def ready(self) -> bool:
        """Whether all slots of this rank are summed, and its sums are ready to be posted if a rank finds damage.

        Raises:
            Exception: the exception that summing raised.
        """
        if self._error is not None:
            raise self._error
        if not self._slots.complete or self._parts.control.bulk_busy:
            return False
        if self._summand is None:
            self._summand = self._sums()
        return True

    def damaged(self) -> int:
        """Number of slots of this rank that do not hold their expert, after a complete pass."""
        table = self._loader.checksums
        return 0 if table is None else self._slots.damaged(self._work.placement, table, self._loader.rank)

    def _sums(self) -> Int64Array:
        """[L, P], zero for slots of other ranks: summed over the ranks, it is the table of all slots."""
        placement = self._work.placement
        sums = np.zeros((placement.num_layers, placement.num_slots), dtype=np.int64)
        first = self._loader.rank * placement.slots_per_rank
        sums[:, first : first + placement.slots_per_rank] = self._slots.sums
        return sums

    def end(self) -> None:
        """Ends an audit in which no rank found damage, and begins the next pass."""
        self._parts.stats.audited(0)
        self._summand = None
        self._restart()

    def _restart(self) -> None:
        self._error = None
        self._slots.restart()

    def committed(self, moves: Int32Array) -> None:
        """Marks the slots of this rank that the moves [N, 5] of a round wrote, so that they are summed again."""
        owners, slots = np.divmod(moves[:, SLOT], self._loader.slots_per_rank)
        mine = owners == self._loader.rank
        self._slots.written(moves[mine, LAYER], slots[mine])

    # --- the repair ---------------------------------------------------------------------------------------------------

    @property
    def repairing(self) -> bool:
        return self._sum is not None

    def begin_repair(self) -> None:
        """Posts the sum of all slots' checksums; all ranks at the same step."""
        assert self._summand is not None
        self._sum, self._summand = self._parts.control.reduce_load(self._summand), None

    def summed(self) -> bool:
        return self._sum is not None and self._sum.done()

    def offer_repair(self) -> None:
        """On EP rank 0: logs the damaged slots, and offers the rounds that send good weights into them."""
        work = self._work
        sums = self._sum.result() if self._sum is not None else None
        if sums is None:
            return
        self._damaged, rounds = self._plan_repair(sums, work.placement, work.state.step)
        self._parts.stats.audited(self._damaged)
        target = work.placement.physical_to_logical
        work.offer = pack_plan(work.state.cycle, target, rounds_to_array(rounds)) if rounds else b""

    def repaired(self, slots: int) -> None:
        """Notes that the repair has ended, with ``slots`` repaired slots."""
        self._parts.stats.repaired(slots)
        if self._parts.rank == 0 and slots:
            logger.warning(
                "%s audit: %d of %d damaged slots were repaired by step %d",
                self._title,
                slots,
                self._damaged,
                self._work.state.step,
            )

    def forget(self) -> None:
        """Forgets the cycle. After a repair, and after a failed pass, the next pass begins."""
        if self.repairing or self._error is not None:
            self._restart()
        self._summand = self._sum = None

    def _plan_repair(self, sums: Int64Array, placement: Placement, step: int) -> tuple[int, list[Round]]:
        """On EP rank 0: logs the damage.

        Args:
            sums: [L, P], sums of all slots.
            placement: the placement in force.
            step: step of the audit, for the log.

        Returns:
            Number of damaged slots, and the rounds that repair those with a known good copy, if ``audit_action`` is
            "repair".
        """
        table, config = self._loader.checksums, self._config
        if table is None:
            return 0, []
        damage, count = find_damage(sums, placement, table, self._loader.topology)
        rounds: list[Round] = []
        if config.audit_action == "repair" and config.mode != "observe":
            rounds = repair_rounds(damage, placement.slots_per_rank, self._loader.buffer_experts)
        repairs = sum(len(round.moves) for round in rounds)
        if repairs or damage != self._last_damage:
            self._last_damage = damage
            logger.error(
                "%s audit at step %d: %d of %d slots do not hold the weights of their expert: %s; %s",
                self._title,
                step,
                count,
                sums.size,
                "; ".join(damaged.text(placement.slots_per_rank) for damaged in damage[:SHOWN])
                + ("; ..." if count > SHOWN else ""),
                self._what_is_done(repairs, count, len(damage)),
            )
        return count, rounds

    def _what_is_done(self, repairs: int, count: int, known: int) -> str:
        if repairs == count:
            return "good copies are being sent there"
        if self._config.audit_action == "repair":
            why = "the next ones follow" if count > known else "the others have none: reload the weights"
            return f"{repairs} get good copies, {why}"
        return 'answers may be wrong: reload the weights, or set "audit_action": "repair" in eplb_config'
