# SPDX-License-Identifier: Apache-2.0
"""LoadRecorder: turns tokens per slot, counted on the device, into the load [T, L, E] that a policy reads.

::

    ops.map_and_record ──> LoadRecorder.counts [L, P] ──flush──> window [T, L, E] ──snapshot──> host ──> take()
       (every forward)       (this rank, on the device)           (this rank)       (side stream)        │
                                                                                                         v
                                   policy <── window [T, L, E] of all ranks <── sum over ranks ──────────┘

**Who counts.** Every (token, expert) pair must enter the sum over ranks once. If each rank routes its own tokens, all
ranks contribute. If several ranks route the same tokens, one of them contributes; the others are made with
``contributes=False`` and record nothing. Counts are never divided by a number of ranks. Steps without requests (dummy,
warm-up, profile) are begun with ``record=False``; the op leaves padding out.

**Flush before a commit.** Counts are per slot, and a commit changes the experts in slots. :meth:`LoadRecorder.flush`
turns them into counts per logical expert while the placement under which they were counted is still known.

**No waiting.** begin_step, flush and snapshot only enqueue work on the current stream (and a side stream). They never
block the host, and allocate nothing on the device after the first use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..values.placement import EMPTY, Int64Array, Placement
from ..values.traffic import BUCKETS, THOUSANDTHS, bucket_of

PHASES = ("all", "prefill", "decode")
"""Kinds of steps that a window may count: all, steps that prefill, or steps that only decode."""


class LoadError(ValueError):
    """A call with the wrong shape or in the wrong order."""


class LoadRecorder:
    """Counts this rank's tokens per slot and keeps them, per logical expert, until they are taken.

    Call order, all on the thread and stream of the forwards::

        recorder.begin_step(placement, record=True, phase="decode")   # before each forward
        recorder.flush(placement)                                     # before a commit changes the placement
        recorder.snapshot(placement)                                  # at the agreed end of a window
        if recorder.snapshot_ready(): load = recorder.take()          # some steps later

    Args:
        num_layers: MoE layers, L.
        num_experts: logical experts per layer, E.
        num_slots: slots per layer over all ranks, P.
        device: where the model counts.
        contributes: whether this rank's counts enter the sum over ranks. If not, recording is never switched on and
            :meth:`take` returns zeros.
        phases: kinds of steps that are counted: ``("all",)``, or any of ``"prefill"`` and ``"decode"``. The phase only
            decides whether a step is counted, so ranks need not agree on it.
        num_entries: T, entries of the series in a window; more than one if the policy weighs how load varies.
        steps_per_entry: calls of :meth:`begin_step` after which the next entry begins. When all T are in use the oldest
            is dropped. Irrelevant for T = 1.
        dtype: of ``counts``: int64 cannot overflow; int32 (the dtype of vLLM's own kernels) holds 2**31 - 1 tokens per
            slot between two flushes.
        own_stream: whether a snapshot is copied to the host on a stream of its own.

    Attributes:
        counts: ``dtype`` [L, P], zero at first. Layer l of the model records into ``counts[l]``; its address is fixed.
        recording: bool [1], the switch that the ops read; its address is fixed.

    Raises:
        LoadError: a number is below 1, or ``phases`` or ``dtype`` is not allowed.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        device: torch.device | str,
        *,
        contributes: bool = True,
        phases: tuple[str, ...] = ("all",),
        num_entries: int = 1,
        steps_per_entry: int = 1,
        dtype: torch.dtype = torch.int64,
        own_stream: bool = True,
    ) -> None:
        for name, value in (
            ("num_layers", num_layers),
            ("num_experts", num_experts),
            ("num_slots", num_slots),
            ("num_entries", num_entries),
            ("steps_per_entry", steps_per_entry),
        ):
            if value < 1:
                raise LoadError(f"{name} is {value}; it must be at least 1")
        if phases != ("all",) and (not phases or len(set(phases)) < len(phases) or not set(phases) <= set(PHASES[1:])):
            raise LoadError(
                f"phases is {phases}; allowed are ('all',), ('prefill',), ('decode',), ('prefill', 'decode')"
            )
        if dtype not in (torch.int32, torch.int64):
            raise LoadError(f"dtype is {dtype}; counts are torch.int64, or torch.int32 where the engine wants it")
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.contributes = contributes
        self.phases = phases
        self.num_entries = num_entries
        self.steps_per_entry = steps_per_entry
        self.counts = torch.zeros((num_layers, num_slots), dtype=dtype, device=self.device)
        self.recording = torch.zeros(1, dtype=torch.bool, device=self.device)
        self._is_recording = False
        shape = (num_entries, num_layers, num_experts + 1)  # the last column takes the empty slots
        self._window = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._entry = 0
        self._steps = 0
        self._maps = _SlotMaps(num_layers, num_experts, num_slots, self.device)
        self._placement: Placement | None = None
        self._dirty = False
        self._snapshot = Snapshot(self._window, own_stream)
        self._oldest = 0
        self._histogram, self._ended_histogram = _no_steps(), _no_steps()

    def begin_step(
        self, placement: Placement, *, record: bool, phase: str = "all", tokens_per_rank: float = 1.0
    ) -> None:
        """Prepares the next forward: advances the series, sets the switch.

        All ranks call it equally often between two snapshots, because only these calls advance the series.

        Args:
            placement: the placement in force during this forward. If it differs from the last one, counts are flushed
                first.
            record: whether the forward serves requests whose tokens are counted. False for dummy, warm-up and profile
                steps.
            phase: ``"prefill"`` or ``"decode"``; needed only if some steps are not counted. Steps of other phases
                (``"all"``) count only in windows of all steps.
            tokens_per_rank: tokens that each rank brings into the step, as far as this rank knows.

        Raises:
            LoadError: the placement has another shape than the recorder.
        """
        if self._placement is not None and placement is not self._placement and placement != self._placement:
            self.flush(self._placement)
        self._use(placement)
        entry = self._steps // self.steps_per_entry % self.num_entries
        self._steps += 1
        if entry != self._entry:
            self.flush(placement)
            self._entry = entry
            self._window[entry].zero_()
        self.set_recording(record and (self.phases == ("all",) or phase in self.phases))
        if self._is_recording:
            bucket, (steps, tokens) = bucket_of(tokens_per_rank), self._histogram
            steps[bucket] += 1
            tokens[bucket] += round(THOUSANDTHS * tokens_per_rank)

    def set_recording(self, on: bool) -> None:
        """Sets the switch for the next forwards; enqueues work only if it changes."""
        on = on and self.contributes
        if on != self._is_recording:
            self.recording.fill_(on)
            self._is_recording = on
        self._dirty |= on

    def flush(self, placement: Placement) -> None:
        """Adds ``counts`` to the window as counts of logical experts and zeroes them.

        Args:
            placement: the placement in force since the last flush. Tokens counted in empty slots are dropped.

        Raises:
            LoadError: the placement has another shape than the recorder.
        """
        self._use(placement)
        if not self._dirty:
            return
        target = self._window[self._entry].view(-1)
        self._maps.add_logical(self.counts, placement, target)
        self.counts.zero_()
        self._dirty = self._is_recording

    def snapshot(self, placement: Placement | None = None) -> None:
        """Ends the window: flushes, starts the copy to the host, begins a new, empty window.

        Args:
            placement: the placement in force since the last flush; default the last one given.

        Raises:
            LoadError: no placement was ever given, or the last snapshot has not been taken.
        """
        placement = placement or self._placement
        if placement is None:
            raise LoadError("snapshot() before any begin_step() or flush(): the recorder knows no placement; pass one")
        self.flush(placement)
        self._snapshot.start(self._window)
        self._ended_histogram, self._histogram = self._histogram, _no_steps()
        self._oldest = (self._entry + 1) % self.num_entries
        self._window.zero_()
        self._steps = self._entry = 0

    def begin_window(self, placement: Placement, steps_per_entry: int) -> None:
        """Drops the load counted so far and begins an empty window. A snapshot that was not taken is kept.

        Args:
            placement: the placement in force since the last flush.
            steps_per_entry: steps of an entry of the series, from now on.
        """
        self.flush(placement)
        self._window.zero_()
        self._histogram = _no_steps()
        self.steps_per_entry = max(1, steps_per_entry)
        self._steps = self._entry = 0

    def snapshot_ready(self) -> bool:
        """Whether :meth:`take` would return at once. Never blocks; False without a snapshot."""
        return self._snapshot.ready()

    def take(self) -> Int64Array:
        """This rank's part of the window that the last :meth:`snapshot` ended; waits for the copy if it is not ready.

        Returns:
            int64 [T, L, E], tokens (times experts per token) per logical expert; oldest entry first. Entries that no
            step reached are zero.

        Raises:
            LoadError: there is no snapshot.
        """
        window = self._snapshot.contents()[..., : self.num_experts]
        taken: Int64Array = np.roll(window, -self._oldest, axis=0)
        return taken

    def histogram(self) -> Int64Array:
        """int64 [2, BUCKETS]: steps by tokens per rank, in the window that the last :meth:`snapshot` ended, and the sum
        of their tokens per rank in thousandths. ``Traffic.of_histogram`` takes the sum over ranks."""
        return np.array(self._ended_histogram, dtype=np.int64)

    def discard_snapshot(self) -> None:
        """Drops a snapshot that will not be taken, because its cycle was dropped. Its load is lost."""
        self._snapshot.discard()

    def window(self) -> Int64Array:
        """int64 [T, L, E]: this rank's load, counted and flushed since the window began, in storage order. Waits for
        the device."""
        window: Int64Array = self._window[..., : self.num_experts].cpu().numpy()
        return window

    def device_tensors(self) -> list[torch.Tensor]:
        """The recorder's tensors on the device that live from step to step."""
        return [self.counts, self.recording, self._window, *self._maps.device_tensors()]

    def _use(self, placement: Placement) -> None:
        if placement is not self._placement:
            self._check(placement)
            self._placement = placement

    def _check(self, placement: Placement) -> None:
        have = (placement.num_layers, placement.num_experts, placement.num_slots)
        want = (self.num_layers, self.num_experts, self.num_slots)
        if have != want:
            raise LoadError(f"the placement has (layers, experts, slots) {have}; the recorder was made for {want}")


def _no_steps() -> list[list[int]]:
    """A histogram without steps: steps, and thousandths of tokens, by bucket. In lists, which a step changes in less
    time than an array."""
    return [[0] * BUCKETS, [0] * BUCKETS]


class _SlotMaps:
    """The element of the flattened [L, E + 1] window that each slot counts into, for the two placements last used.

    Two, because the next placement is prepared while the one in force still counts.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> None:
        shape = (num_layers, num_slots)
        self._device = device
        self._empty = num_experts
        self._first_of_layer = np.arange(num_layers, dtype=np.int64)[:, None] * (num_experts + 1)
        self._on_device = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2)]
        self._on_host = [_host_empty(shape, device) for _ in range(2)]
        self._copied: list[Any] = [None, None]
        self._placements: list[Placement | None] = [None, None]
        self._amounts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._next = 0

    def index_of(self, placement: Placement) -> int:
        """Index of the map of ``placement``; uploads it over the least recently used map if it is not there."""
        for i, known in enumerate(self._placements):
            if known is placement or known == placement:
                self._next = 1 - i
                return i
        i = self._next
        self._next = 1 - i
        if self._copied[i] is not None and not self._copied[i].query():
            self._on_host[i] = _host_empty(tuple(self._on_host[i].shape), self._device)  # the old one is still read
        slots = placement.physical_to_logical
        columns = np.where(slots == EMPTY, self._empty, slots)
        np.add(columns, self._first_of_layer, out=self._on_host[i].numpy())
        self._on_device[i].copy_(self._on_host[i], non_blocking=True)
        self._placements[i] = placement
        self._copied[i] = _record_event(self._device)
        return i

    def device_tensors(self) -> list[torch.Tensor]:
        """The maps."""
        return self._on_device

    def add_logical(self, counts: torch.Tensor, placement: Placement, target: torch.Tensor) -> None:
        """Adds ``counts`` [L, P] to ``target`` [L * (E + 1)]."""
        i = self.index_of(placement)
        target.scatter_add_(0, self._on_device[i].view(-1), self._amounts.copy_(counts).view(-1))


class Snapshot:
    """A copy of the window to the host, on a stream of its own or on the device's default stream."""

    def __init__(self, window: torch.Tensor, own_stream: bool) -> None:
        self._device = window.device
        self._host = _host_empty(tuple(window.shape), window.device)
        self._staged = torch.empty_like(window) if window.device.type != "cpu" else None
        self._stream: Any = None
        if self._staged is not None:
            module = torch.get_device_module(self._device)
            self._stream = module.Stream(self._device) if own_stream else module.default_stream(self._device)
        self._done: Any = None
        self._pending = False
        self._started = False

    def start(self, window: torch.Tensor) -> None:
        if self._pending:
            raise LoadError("the last snapshot has not been taken; call take() first")
        self._started = self._pending = True
        if self._staged is None:
            self._host.copy_(window)
            return
        module = torch.get_device_module(self._device)
        self._staged.copy_(window)
        self._stream.wait_stream(module.current_stream(self._device))
        with module.stream(self._stream):
            self._host.copy_(self._staged, non_blocking=True)
            self._done = _record_event(self._device)

    def ready(self) -> bool:
        return self._started and (self._done is None or bool(self._done.query()))

    def discard(self) -> None:
        self._pending = self._started = False  # a copy still under way ends before the next on the same stream begins

    def contents(self) -> Int64Array:
        if not self._started:
            raise LoadError("there is no snapshot to take; call snapshot() first")
        if self._done is not None:
            self._done.synchronize()
        self._pending = False
        contents: Int64Array = self._host.numpy()
        return contents


def _host_empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, pin_memory=device.type != "cpu")


def _record_event(device: torch.device) -> Any:
    """An event on the device's current stream, None on the CPU."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    event = module.Event()
    event.record(module.current_stream(device))
    return event
