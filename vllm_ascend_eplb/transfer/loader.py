# SPDX-License-Identifier: Apache-2.0
"""D2DExpertWeightLoader: moves the weights of a round from the slots of one rank into slots of another.

Weights arrive in staging buffers, never in live slots. All ranks take a round through the loader together::

    prepare(round)   everything that can throw: checks, views, lists of operations
    ready(number)    whether this rank may issue the round
    issue(number)    starts the transfer; only the call, at the same step and point on all ranks
    tick()           once per step, before rounds are issued: sends the next part of a transfer under a budget per step
    rounds_done      rounds that arrived and were sent; never blocks
    rounds_intact    rounds of which every expert has its checksum from start-up
    commit(number)   staging to slots on the compute stream; enqueues prepared copies, allocates nothing
    forget()         ends a plan that is finished or dropped

A transfer that fails, or does not end within ``deadline`` seconds, poisons the loader: it is never used again.

Rounds are issued and committed in order, numbered 0, 1, ... within a plan. With two staging buffers, round k+1 may be
in flight while round k is being agreed on. If ``Round.after`` forbids this, ``ready`` returns False until it may go.

``issue`` enqueues everything that the device can do by itself: copies, checksums, an event. One mover thread per rank
does everything that blocks: it waits for events and sockets, compares the sums, and sets flags that ``rounds_done``
reads.

One file, because the step thread and the mover thread share the flags of a flight, and the order of
their accesses must be visible in one place.

Order on a device: a transfer waits, on its stream, for the event of the last commit that wrote its source slots or read
its staging buffer; the compute stream waits for the event of the transfer before it commits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from ..agreement.exchange import exchange_bytes
from ..values.placement import Int32Array, Int64Array, Placement
from ..values.plan import LAYER, SLOT
from ..values.rounds import Round
from ..values.topology import Topology
from .checksum import ChecksumTable, Summer, sum_slots
from .choice import Peers, choose
from .flight import CHUNK, Flight, FlightPlanner
from .gloo import StagedGlooTransport
from .slots import ExpertSlots, Weights
from .transport import Piece, Streams, TransferError

logger = logging.getLogger("vllm.eplb")


WARM_UP_BYTES = 64
MEASUREMENTS = 4
"""Measured transfers of one expert; the fastest gives the rate."""


CHANNELS = 4
"""Most loaders that may share a process group."""


class D2DExpertWeightLoader:
    """Moves expert weights between the ranks of a group, through staging buffers.

    Args:
        weights: for each MoE layer and local slot the tensors of its expert (weights, scales, biases, of any dtype), in
            the same order everywhere. Views into the engine's own tensors, whose addresses never change. Slots of a
            layer have equal shapes; layers may differ.
        group: process group of all ranks with a CPU (Gloo) backend, for start-up and for transport gloo. While serving
            nothing else may send on it, and nothing that must be fast may use it. None for a single rank.
        rank: this rank in the group.
        buffer_experts: experts per staging buffer; None for ``default_buffer_experts``.
        transport: "auto" (pull within a host where the devices can, else gloo; hccl on an NPU), "gloo", "pull",
            "nccl" or "hccl".
        buffers: staging buffers, 1 or 2: most rounds in flight.
        topology: the node of each rank; all on one node by default. Transport pull is tried within a node only.
        device_group: process group with a device backend for nccl and hccl; nothing else uses it.
        budget_bytes: most bytes that a rank may send, and receive, per step; 0 for no limit.
        cooperative_kernels: whether the engine launches kernels that need all cores of a GPU at once.
        channel: number of this loader among the loaders that share ``group``, 0..CHANNELS-1; message tags differ by
            channel.
        deadline: seconds after which a transfer counts as failed; the group's own timeout is far above.
        own_streams: whether transfers run on streams of their own, beside the engine's.

    Raises:
        TransferError: weights cannot be sliced per expert (not contiguous, unequal shapes, overlapping slots), an
            argument is out of range, or the transport cannot work here. The message says what to do.

    All ranks construct the loader together.
    """

    def __init__(
        self,
        weights: Weights,
        group: Any,
        rank: int,
        buffer_experts: int | None = None,
        transport: str = "auto",
        *,
        buffers: int = 2,
        topology: Topology | None = None,
        device_group: Any = None,
        budget_bytes: int = 0,
        cooperative_kernels: bool = False,
        channel: int = 0,
        deadline: float = 300.0,
        own_streams: bool = True,
    ) -> None:
        if buffer_experts is not None and buffer_experts < 1:
            raise TransferError(f"a staging buffer of {buffer_experts} experts holds nothing; give at least 1")
        if buffers not in (1, 2):
            raise TransferError(f"{buffers} staging buffers; allowed are 1 and 2")
        if 0 < budget_bytes < CHUNK or budget_bytes < 0:
            raise TransferError(
                f"a budget of {budget_bytes} bytes per step; allowed are 0 (no limit) or {CHUNK} and more"
            )
        if not 0 <= channel < CHANNELS:
            raise TransferError(f"channel {channel}; allowed are 0..{CHANNELS - 1}")
        self.rank, self.num_buffers, self.budget_bytes, self.deadline = rank, buffers, budget_bytes, deadline
        self.num_ranks = 1 if group is None else int(group.size())
        self._group = group
        self.topology = topology or Topology.even(self.num_ranks)
        if self.topology.num_ranks != self.num_ranks:
            raise TransferError(f"the topology has {self.topology.num_ranks} ranks, the group {self.num_ranks}")
        self._store = store = ExpertSlots(weights, buffers, buffer_experts)
        self.device, self.num_layers, self.slots_per_rank = store.device, store.num_layers, store.slots_per_rank
        self.buffer_experts = store.buffer_experts
        self._streams = Streams(self.device, own_streams)
        self._summers = [Summer(self._streams, self.buffer_experts, store.most_tensors) for _ in range(buffers)]
        self.checksums: ChecksumTable | None = None
        self.transports = choose(
            transport,
            store,
            Peers(group, device_group, rank, self.num_ranks, self.topology),
            self._streams,
            cooperative_kernels=cooperative_kernels,
        )
        """The first one that reaches a pair of ranks carries their experts. Entries may be replaced while no round is
        prepared."""
        self._one_sided = any(transport.one_sided for transport in self.transports)
        self._planner = FlightPlanner(store, self.transports, self._summers, rank, self.num_ranks, budget_bytes)

        self._serial = channel
        self._flights: dict[int, Flight] = {}
        self._in_buffer: list[Flight | None] = [None] * buffers
        self._queued: deque[tuple[Flight, int]] = deque()
        self._part_issued = False
        self._commits = 0  # over all plans
        self._plan_base = 0  # commits before the plan under way
        self._commit_events = [self._streams.event() for _ in range(4)]
        self._arrival_events = [self._streams.event() for _ in range(buffers)]
        self._error: Exception | None = None
        self.bytes_received = 0
        self.seconds_in_flight = 0.0
        """Time from issue until the mover thread noticed the arrival, over all rounds."""
        self.seconds_on_device = 0.0
        """Time between the first and the last copy of a part on its stream, over all parts; 0 on a CPU."""
        self._jobs: queue.SimpleQueue[tuple[Flight, int] | None] = queue.SimpleQueue()
        self._mover = threading.Thread(target=self._move, name="eplb-mover", daemon=True)
        self._mover.start()

    # ---- start-up

    @property
    def transport(self) -> str:
        """The transports in use, for example "pull" or "pull+gloo"."""
        return "+".join(transport.name for transport in self.transports) or "local"

    @property
    def buffer_bytes(self) -> int:
        """Bytes of device memory for staging."""
        return self._store.staging.numel()

    def describe(self) -> str:
        """A log line about transport and memory."""
        pinned = sum(
            transport.pinned_bytes for transport in self.transports if isinstance(transport, StagedGlooTransport)
        )
        return (
            f"expert transfers by {self.transport}: staging of {self.num_buffers} x {self.buffer_experts} experts of "
            f"{self._store.row_bytes / 2**20:.1f} MiB takes {self.buffer_bytes / 2**20:.1f} MiB on {self.device}"
            + (f" and {pinned / 2**20:.1f} MiB of pinned host memory" if pinned else "")
            + (f"; at most {self.budget_bytes / 2**20:.1f} MiB per rank and step" if self.budget_bytes else "")
        )

    @property
    def slots(self) -> Weights:
        """The expert tensors of this rank's live slots."""
        return self._store.live

    @property
    def streams(self) -> Streams:
        return self._streams

    def received_bytes(self, moves: Int32Array) -> Int64Array:
        """int64 [R]: bytes that each rank receives in ``moves``, whose rows begin with layer and slot."""
        of_layer = np.array(self._store.expert_bytes, dtype=np.int64)
        received: Int64Array = np.zeros(self.num_ranks, dtype=np.int64)
        np.add.at(received, moves[:, SLOT] // self.slots_per_rank, of_layer[moves[:, LAYER]])
        return received

    def _exchange(self, data: bytes) -> list[bytes]:
        return exchange_bytes(self._group, self.num_ranks, data)

    def learn_checksums(self, placement: Placement) -> int:
        """Sums all experts and exchanges the sums; blocks. Called at start-up, and after an engine reloaded its
        weights.

        Args:
            placement: the placement in force, which tells slots with the same expert.

        Returns:
            Number of experts that cannot be verified because their copies differ.
        """
        mine = sum_slots(self._store.live, self._summers[0], self._streams, self.buffer_experts)
        table = ChecksumTable(self.num_layers, placement.num_experts)
        differing = table.learn(mine, placement, self._exchange)
        self.checksums = table
        if differing:
            logger.warning("copies of %d experts differ between slots: their transfers are not verified", differing)
        return differing

    def warm_up(self) -> None:
        """Makes one small transfer with every peer over every transport, one checksum and one copy; blocks. All ranks
        call it together, in the engine's profile run, so that the run counts the memory that libraries allocate."""
        length = min(WARM_UP_BYTES, self._store.live[0][0][0].numel())
        scratch = torch.zeros((self.num_ranks, length), dtype=torch.uint8, device=self.device)
        if self._streams.module is not None:
            self._streams.current().synchronize()  # weights and buffers, which the other streams use from here on
        probe, source = self._store.live[0][0][0][:length], (0, 0, ((0, 0, length),))
        peers = [peer for peer in range(self.num_ranks) if peer != self.rank]
        for transport in self.transports:
            self._serial += CHANNELS
            sends = [Piece(peer, 0, (probe,), source) for peer in peers if transport.reaches(self.rank, peer)]
            receives = [
                Piece(peer, 0, (scratch[peer],), source) for peer in peers if transport.reaches(peer, self.rank)
            ]
            batch = transport.batch(sends, receives)
            with self._streams.on_entry():
                batch.issue(self._serial)
            if not batch.enters:
                with self._streams.on_side():
                    batch.run()
        for stream, on in ((self._streams.entry, self._streams.on_entry), (self._streams.side, self._streams.on_side)):
            with on():
                for summer in self._summers:
                    summer.enqueue(summer.place(0, self._store.staged(0, 0, 0)))
                    summer.fetch()
            if stream is not None:
                stream.synchronize()
        self._exchange(b"warm")

    def measure_rates(self) -> tuple[float | None, float | None]:
        """Measures (receive, commit) in bytes/s: the rates at which the slowest rank receives an expert from its
        neighbour, and copies an expert within its memory. None for a single rank. Blocks; all ranks call it together,
        before anything is in flight."""
        if self.num_ranks == 1:
            return None, None
        after, before = (self.rank + 1) % self.num_ranks, (self.rank - 1) % self.num_ranks
        views, staged = self._store.live[0][0], self._store.staged(0, 0, 0)
        nbytes = sum(tensor.numel() for tensor in views)
        source = (0, 0, tuple((at, 0, tensor.numel()) for at, tensor in enumerate(views)))
        shortest = [float("inf"), float("inf")]
        for _ in range(MEASUREMENTS):
            self._exchange(b"ready")
            began = time.perf_counter()
            for transport in self.transports:
                self._serial += CHANNELS
                batch = transport.batch(
                    [Piece(after, 0, tuple(views), source)] if transport.reaches(self.rank, after) else [],
                    [Piece(before, 0, tuple(staged), source)] if transport.reaches(before, self.rank) else [],
                )
                with self._streams.on_entry():
                    batch.issue(self._serial)
                if not batch.enters:
                    with self._streams.on_side():
                        batch.run()
            for stream in (self._streams.entry, self._streams.side):
                if stream is not None:
                    stream.synchronize()
            received = time.perf_counter() - began
            scratch = self._store.staging[-1, -1, :nbytes]
            began = time.perf_counter()
            scratch.copy_(self._store.staging[0, 0, :nbytes])
            if self._streams.module is not None:
                self._streams.current().synchronize()
            took = received, time.perf_counter() - began
            slowest = np.max([np.frombuffer(seconds) for seconds in self._exchange(np.array(took).tobytes())], axis=0)
            shortest = [min(pair) for pair in zip(shortest, slowest.tolist(), strict=True)]
        receive, commit = (nbytes / max(seconds, 1e-9) for seconds in shortest)
        return receive, commit

    # ---- while serving, in the step thread

    def prepare(self, round: Round) -> None:
        """Builds everything that the transfer of a round needs. If the round has arrived but is not committed, it is
        prepared to be sent again; rounds after it must then be prepared again, too.

        Raises:
            TransferError: the round does not fit this loader, or the loader is poisoned. Nothing was changed.
        """
        if self.poisoned:
            raise TransferError("a transfer failed before; its process group is not used again")
        flight = self._planner.plan(round, verify=self.checksums is not None)
        old = self._flights.get(round.number)
        if old is not None and old.issued:  # it is sent again, and so are the rounds after it
            if self.in_flight:
                raise TransferError(f"round {round.number} cannot be sent again while a round is in flight")
            for number in [number for number in self._flights if number >= round.number]:
                later = self._flights.pop(number)
                if self._in_buffer[later.buffer] is later:
                    self._in_buffer[later.buffer] = None
        self._flights[round.number] = flight

    def ready(self, number: int) -> bool:
        """Whether round ``number`` is prepared and the commits that it depends on have taken place. With a one-sided
        transport these commits must have been executed on the device, too. Never blocks."""
        flight = self._flights.get(number)
        if flight is None:
            return False
        needed = self._plan_base + flight.round.after + 1
        return self._commits >= needed and (not self._one_sided or self._executed(needed))

    def issue(self, number: int) -> None:
        """Starts a prepared round; on all ranks at the same step and point. Under a budget its first part is sent at
        this step unless another part was, and ``tick`` sends the rest. Never raises: a failure poisons the loader."""
        try:
            flight = self._flights[number]
            if self._in_buffer[flight.buffer] is not None:
                raise TransferError(f"round {number} needs the staging buffer of a round that is not committed yet")
            self._in_buffer[flight.buffer] = flight
            flight.issued_at = time.monotonic()
            self._queued += [(flight, part) for part in range(len(flight.parts))]
            if not self.budget_bytes or not self._part_issued:
                self._issue_part()
        except Exception as error:
            self._failed(error)

    def tick(self) -> None:
        """Sends the next part of a transfer under a budget. Called once per step, at the point where rounds are issued.
        Never raises."""
        self._part_issued = False
        try:
            if self._queued:
                self._issue_part()
        except Exception as error:
            self._failed(error)

    def _issue_part(self) -> None:
        if self.poisoned:
            return
        flight, part = self._queued.popleft()
        self._part_issued = True
        flight.issued = part + 1
        self._serial += CHANNELS
        streams, batches = self._streams, flight.parts[part]
        if any(batch.enters for batch in batches):
            with streams.on_entry():
                self._wait_for_commits(streams.entry, flight)
                flight.began[part] = streams.mark(streams.entry)
                for batch in batches:
                    batch.issue(self._serial)
                flight.ended[part] = streams.mark(streams.entry)
        else:
            for batch in batches:
                batch.issue(self._serial)
        if part == len(flight.parts) - 1 and flight.enters:
            with streams.on_entry():
                self._finish(flight, streams.entry)
        self._jobs.put((flight, part))

    def _finish(self, flight: Flight, stream: Any) -> None:
        """Enqueues, after the last copy, the checksums and the event of the arrival."""
        for sums in flight.sums:
            Summer.enqueue(sums)
        if flight.sums:
            self._summers[flight.buffer].fetch()
        if stream is not None:
            self._arrival_events[flight.buffer].record(stream)

    def _wait_for_commits(self, stream: Any, flight: Flight) -> None:
        """Makes ``stream`` wait for the last commit that wrote slots which the round reads, or that read the staging
        buffer which it fills. It must not wait for later commits, which may be a step away."""
        number = flight.round.number
        needed = self._plan_base + max(flight.round.after + 1, number - self.num_buffers + 1, 0)
        if needed and stream is not None:
            stream.wait_event(self._commit_events[needed % len(self._commit_events)])

    @property
    def rounds_done(self) -> int:
        """Rounds of the plan under way, without a gap, that arrived here and were sent from here. Never blocks."""
        return self._count(False)

    @property
    def rounds_intact(self) -> int:
        """Rounds of the plan under way, without a gap, that are done with the right checksums. Never blocks."""
        return self._count(True)

    def _count(self, intact: bool) -> int:
        number = self._commits - self._plan_base
        while (flight := self._flights.get(number)) is not None and flight.arrived and (flight.intact or not intact):
            number += 1
        return number

    @property
    def commits(self) -> int:
        """Rounds committed since the start."""
        return self._commits

    @property
    def in_flight(self) -> int:
        """Rounds that were issued and have not arrived."""
        return sum(flight is not None and not flight.arrived for flight in self._in_buffer)

    @property
    def error(self) -> Exception | None:
        """The error of a failed transfer; None if no transfer failed."""
        return self._error

    @property
    def poisoned(self) -> bool:
        """Whether a transfer failed, or did not end in time. Then no transfer is issued any more."""
        if self._error is None:
            for flight in self._in_buffer:
                if flight is not None and not flight.arrived and time.monotonic() - flight.issued_at > self.deadline:
                    self._failed(
                        TransferError(f"round {flight.round.number} did not arrive within {self.deadline:g} seconds")
                    )
        return self._error is not None

    def poison(self, reason: str) -> None:
        """Gives up the transfer group. Transfers in flight are left alone; staging stays allocated."""
        self._failed(TransferError(reason))

    def _failed(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            # A warning with the reason; the end of balancing is logged as the error.
            logger.warning("rank %d: expert transfers by %s failed: %s", self.rank, self.transport, error)

    def commit(self, number: int) -> None:
        """Copies staging to slots, on the compute stream (the current one): enqueues copies and returns. On a CPU it
        copies at once.

        Raises:
            TransferError: the round has not arrived, or it is not the oldest.
            Exception: a copy failed. This rank must not answer any more: its slots are half switched.
        """
        flight = self._flights[number]
        if not flight.arrived or number != self._commits - self._plan_base:
            raise TransferError(
                f"round {number} cannot be committed: {self.rounds_done} arrived, of {self._flights.keys()}"
            )
        compute = self._streams.current()
        if compute is not None:
            compute.wait_event(self._arrival_events[flight.buffer])
        for (layer, slot, _), staged in zip(flight.places, flight.staged, strict=True):
            for target, source in zip(self._store.live[layer][slot], staged, strict=True):
                target.copy_(source, non_blocking=True)
        self._commits += 1
        if compute is not None:
            self._commit_events[self._commits % len(self._commit_events)].record(compute)
        self._in_buffer[flight.buffer] = None
        del self._flights[number]

    def forget(self) -> None:
        """Drops everything that is not committed, because the plan is finished or dropped. A round in flight poisons
        the loader, because its bytes may arrive at any time; drain it first."""
        if self.in_flight:
            self.poison("a round was dropped while it was in flight")
            return
        self._flights.clear()
        self._queued.clear()
        self._in_buffer = [None] * self.num_buffers
        self._plan_base = self._commits

    def close(self) -> None:
        """Ends the mover thread after its last job; does not wait for it."""
        self._jobs.put(None)

    def _executed(self, commits: int) -> bool:
        """Whether the first ``commits`` commits have been executed on the device."""
        if not commits or self._streams.module is None:
            return True
        kept = len(self._commit_events)
        oldest = max(commits, self._commits - kept + 1)  # if its event was reused, a later commit stands for it
        return bool(self._commit_events[oldest % kept].query())

    # ---- in the mover thread

    def _move(self) -> None:
        self._streams.enter_thread()
        while (job := self._jobs.get()) is not None:
            flight, part = job
            if self._error is not None:
                continue
            try:
                with torch.no_grad(), self._streams.on_side():
                    if not flight.enters:
                        self._run(flight, part)
                    if part == len(flight.parts) - 1:
                        self._arrive(flight)
            except Exception as error:  # after any error the group cannot be used any more
                self._failed(error)

    def _run(self, flight: Flight, part: int) -> None:
        """Does the part of a transfer that ``issue`` left to the mover thread."""
        side = self._streams.side
        self._wait_for_commits(side, flight)
        if flight.began[part] is None:
            flight.began[part] = self._streams.mark(side)
        if flight.ended[part] is not None:
            side.wait_event(flight.ended[part])  # copies on the entry stream
        for batch in flight.parts[part]:
            if not batch.enters:
                batch.run()
        flight.ended[part] = self._streams.mark(side)
        if part == len(flight.parts) - 1:
            self._finish(flight, side)

    def _arrive(self, flight: Flight) -> None:
        event = self._arrival_events[flight.buffer]
        if event is not None:
            event.synchronize()
            for began, ended in zip(flight.began, flight.ended, strict=True):
                if began is not None:  # a part may concern other ranks only
                    self.seconds_on_device += began.elapsed_time(ended) / 1e3
        table, summer = self.checksums, self._summers[flight.buffer]
        flight.intact = table is None or all(
            table.matches(layer, expert, summer.value(place, sums))
            for place, ((layer, _, expert), sums) in enumerate(zip(flight.places, flight.sums, strict=False))
        )
        self.bytes_received += flight.nbytes
        self.seconds_in_flight += time.monotonic() - flight.issued_at
        flight.arrived = True  # last: the step thread reads it
