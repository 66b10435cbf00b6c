# SPDX-License-Identifier: Apache-2.0
"""ControlChannel: facts that all ranks agree on, without waiting for any rank.

At every step of a cycle each rank posts its ``Facts`` and reads the result of the facts posted ``lag`` steps before::

    channel.post(facts)          # asynchronous all_reduce of one small vector on a CPU group
    agreed = channel.read()      # of lag steps ago: minimum and maximum of every field; None while the pipeline fills

All ranks read the same vector at the same step, so they decide the same. One all_reduce (MAX over the fields and their
negatives) carries both bounds. The agreed value of a counter is its minimum, that of an alarm its maximum; a field that
must be equal on all ranks has minimum == maximum.

The two bulk operations (the summed load to EP rank 0, the plan from EP rank 0) go over the same group, one at a time,
posted at agreed steps only; their handles never block.

Nothing here has a deadline. A post is as certain as the peer's next forward, and a rank that gave up alone would hold
another placement than the others. If a peer died, the group's own timeout ends the wait, and the engine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

MAX_LAG = 8


class ControlError(RuntimeError):
    """The control channel failed: a peer exited, or calls were made out of order. This rank cannot go on balancing."""


@dataclass(frozen=True)
class Facts:
    """What one rank tells the others at a step. All fields are integers |x| < 2**62.

    Attributes:
        step: steps so far; equal on all ranks.
        epoch: phase changes so far; facts of an older epoch are stale.
        placement: digest of the placement in force; equal on all ranks.
        ready: 1 once this rank has done what the phase waits for.
        failure: number of the failure, 0 for none.
        poisoned: 1 if the transfer group must not be used any more.
        plan_number: cycle whose plan EP rank 0 holds; 0 on all other ranks.
        plan_length: bytes of that plan; 0 on all other ranks.
        plan_digest: hash of that plan; 0 on all other ranks.
        rounds: rounds of the plan under way.
        rounds_ready: rounds prepared so far.
        rounds_done: rounds that arrived so far.
        rounds_intact: rounds that arrived undamaged so far.
        order: number of the newest operator's order that EP rank 0 has; 0 for none, and on all other ranks.
        order_command, order_collect_steps, order_execution_steps: contents of the order; 0 without one.
        damaged: slots of this rank that an audit found damaged.
    """

    step: int = 0
    epoch: int = 0
    placement: int = 0
    ready: int = 0
    failure: int = 0
    poisoned: int = 0
    plan_number: int = 0
    plan_length: int = 0
    plan_digest: int = 0
    rounds: int = 0
    rounds_ready: int = 0
    rounds_done: int = 0
    rounds_intact: int = 0
    order: int = 0
    order_command: int = 0
    order_collect_steps: int = 0
    order_execution_steps: int = 0
    damaged: int = 0


FIELDS = tuple(field.name for field in fields(Facts))


_as_tuple = attrgetter(*FIELDS)


@dataclass(frozen=True)
class Agreed:
    """Minimum and maximum of every field over all ranks; equal on all ranks."""

    min: Facts
    max: Facts


def agree(facts: list[Facts]) -> Agreed:
    """The result that all ranks read after they posted ``facts``; for tests, replays and a single rank."""
    table = np.array([_as_tuple(posted) for posted in facts], dtype=np.int64)
    return Agreed(Facts(*table.min(axis=0).tolist()), Facts(*table.max(axis=0).tolist()))


Result = TypeVar("Result")


class Bulk(Generic[Result]):
    """A bulk operation under way."""

    def __init__(self, work: Any, tensor: torch.Tensor, finish: Callable[[torch.Tensor], Result]) -> None:
        self._work, self._tensor, self._finish = work, tensor, finish

    def done(self) -> bool:
        """Whether the operation ended, with or without an error. Never blocks."""
        return self._work is None or bool(self._work.is_completed())

    def result(self) -> Result:
        """The data; call it after ``done``.

        Raises:
            ControlError: the operation failed.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise ControlError(f"a transfer on the control group failed: {error}") from error
            self._work = None
        return self._finish(self._tensor)


@dataclass
class Waiting:
    """Time that the channel cost the step thread, in seconds.

    Attributes:
        reads: results read.
        total: time spent waiting for results.
        longest: the longest single wait.
        post_total: time spent posting.
        recent: the last 256 waits.
    """

    reads: int = 0
    total: float = 0.0
    longest: float = 0.0
    post_total: float = 0.0

    def __post_init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=256)

    def add(self, seconds: float) -> None:
        self.reads += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self.recent.append(seconds)


class ControlChannel:
    """Pipelined agreement of all ranks of a CPU (Gloo) group.

    Args:
        group: the torch.distributed process group, with a CPU backend; nothing else may use it while a cycle is active.
            None for a single rank.
        rank: this rank within the group.
        num_ranks: ranks in the group.
        lag: posts between a post and the read of its result, 0..8. A larger lag tolerates slower networks, and delays
            every change of phase by that many steps; 0 waits for every result at once.

    Raises:
        ValueError: ``lag`` is out of range, or there is no group for several ranks.
    """

    def __init__(self, group: Any, rank: int, num_ranks: int, lag: int = 1) -> None:
        if not 0 <= lag <= MAX_LAG:
            raise ValueError(f"lag is {lag}; allowed are 0..{MAX_LAG} steps")
        if num_ranks > 1 and group is None:
            raise ValueError(f"{num_ranks} ranks need a process group with a CPU backend to agree on")
        self.rank, self.num_ranks, self.lag = rank, num_ranks, lag
        self.waiting = Waiting()
        self._group = group if num_ranks > 1 else None
        self._tensors = [torch.zeros(2 * len(FIELDS), dtype=torch.int64) for _ in range(lag + 1)]
        self._arrays = [tensor.numpy() for tensor in self._tensors]
        self._posted: deque[tuple[Any, int, int]] = deque()  # work, index of its tensor, step of its facts
        self._next, self._newest = 0, 0
        self._bulk: Bulk[Any] | None = None
        self._inbox = torch.zeros(0, dtype=torch.uint8)
        self._max = _options(dist.AllreduceOptions(), dist.ReduceOp.MAX)

    def post(self, facts: Facts) -> None:
        """Posts this rank's facts. All ranks post at the same steps.

        Raises:
            ControlError: more than ``lag`` results were left unread, or a peer exited.
        """
        if len(self._posted) > self.lag:
            raise ControlError(f"{len(self._posted)} facts posted and none read; read after every post")
        start = time.perf_counter()
        index, count = self._next, len(FIELDS)
        self._next = (index + 1) % len(self._tensors)
        array = self._arrays[index]
        array[:count] = _as_tuple(facts)
        np.negative(array[:count], out=array[count:])
        work = None
        if self._group is not None:
            try:
                work = self._group.allreduce([self._tensors[index]], self._max)
            except RuntimeError as error:
                raise ControlError(f"facts cannot be posted, a peer exited: {error}") from error
        self._posted.append((work, index, facts.step))
        self._newest = facts.step
        self.waiting.post_total += time.perf_counter() - start

    def read(self) -> Agreed | None:
        """The facts agreed ``lag`` posts ago. None while the pipeline fills, also after a pause in posting.

        Raises:
            ControlError: a peer exited. Other ranks may have read the result, so this rank must not serve on.
        """
        if len(self._posted) <= self.lag:
            return None
        work, index, step = self._posted.popleft()
        start = time.perf_counter()
        if work is not None:
            try:
                work.wait()
            except RuntimeError as error:
                raise ControlError(f"the ranks cannot agree any more, a peer exited: {error}") from error
        self.waiting.add(time.perf_counter() - start)
        if step != self._newest - self.lag:
            return None  # posted before a pause
        values, count = self._arrays[index].tolist(), len(FIELDS)
        return Agreed(Facts(*(-value for value in values[count:])), Facts(*values[:count]))

    def reduce_load(self, load: npt.NDArray[np.int64]) -> Bulk[npt.NDArray[np.int64] | None]:
        """Sums ``load`` (int64, any shape, the same on all ranks) over the ranks on rank 0. A contiguous array is
        overwritten: no memory is allocated, because one rank alone might have none.

        Returns:
            A handle whose result is the sum on rank 0 and None elsewhere.

        Raises:
            ControlError: another bulk operation is under way.
        """
        self._require_idle()
        return self._begin(self.reduce_beside(load))

    def reduce_beside(self, load: npt.NDArray[np.int64]) -> Bulk[npt.NDArray[np.int64] | None]:
        """Sums a small array like :meth:`reduce_load`, also while a bulk operation is under way. All ranks call it at
        the same step."""
        tensor = torch.from_numpy(np.ascontiguousarray(load, dtype=np.int64))
        flat = tensor.view(-1)
        work = None
        if self._group is not None and flat.numel():
            options = _options(dist.ReduceOptions(), dist.ReduceOp.SUM)
            options.rootRank = 0
            work = self._group.reduce([flat], options)
        return Bulk(work, tensor, lambda t: t.numpy() if self.rank == 0 else None)

    def reserve(self, nbytes: int) -> None:
        """Allocates memory for broadcasts of up to ``nbytes``, so that a rank without memory fails at start-up and not
        when the others wait for it."""
        self._inbox = torch.zeros(nbytes, dtype=torch.uint8)

    def broadcast(self, data: bytes | None, length: int) -> Bulk[bytes]:
        """Sends ``data`` from rank 0 to all ranks.

        Args:
            data: the bytes on rank 0; ignored elsewhere.
            length: number of bytes, agreed before.

        Returns:
            A handle whose result is the bytes, on every rank.

        Raises:
            ControlError: another bulk operation is under way, or rank 0's data has another length.
        """
        self._require_idle()
        if self.rank == 0 and (data is None or len(data) != length):
            raise ControlError(f"agreed on {length} bytes to broadcast, have {None if data is None else len(data)}")
        tensor = self._inbox[:length] if length <= len(self._inbox) else torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            tensor.numpy()[:] = np.frombuffer(data or b"", dtype=np.uint8)
        work = None
        if self._group is not None and length:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            work = self._group.broadcast([tensor], options)
        return self._begin(Bulk(work, tensor, lambda t: t.numpy().tobytes()))

    def _require_idle(self) -> None:
        if self._bulk is not None and not self._bulk.done():
            raise ControlError("a bulk operation on the control group is still under way")

    def _begin(self, bulk: Bulk[Result]) -> Bulk[Result]:
        self._bulk = bulk
        return bulk

    @property
    def bulk_busy(self) -> bool:
        """Whether a bulk operation is under way on this rank."""
        return self._bulk is not None and not self._bulk.done()


def _options(options: Any, operation: Any) -> Any:
    options.reduceOp = operation
    return options


@dataclass(frozen=True)
class FlightEntry:
    """One step of a rank: the phase after the step, the facts it posted, and the agreed facts it read."""

    phase: int
    facts: Facts | None
    agreed: Agreed | None


class FlightRecorder:
    """The last steps of a rank, for the analysis of a failure.

    A replay feeds ``entry.agreed`` to the transition function, entry by entry, and must go through the same phases.

    Args:
        capacity: number of steps to keep.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._entries: deque[FlightEntry] = deque(maxlen=capacity)

    def record(self, phase: int, facts: Facts | None, agreed: Agreed | None) -> None:
        self._entries.append(FlightEntry(int(phase), facts, agreed))

    @property
    def entries(self) -> tuple[FlightEntry, ...]:
        return tuple(self._entries)

    def dump(self, path: str | Path, **about: object) -> None:
        """Writes all entries as JSON, together with ``about`` (rank, reason, settings)."""
        data = {"about": about, "fields": FIELDS, "entries": [asdict(entry) for entry in self._entries]}
        Path(path).write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")

    def leave(self, rank: int, **about: object) -> Path | None:
        """Dumps into a new folder for temporary files. Returns None if that fails, so that a full disk does not hide
        the reason for the dump."""
        try:
            path = Path(tempfile.mkdtemp(prefix="vllm-eplb-flight-"), f"rank{rank}.json")
            self.dump(path, rank=rank, **about)
        except OSError:
            return None
        return path

    @staticmethod
    def load(path: str | Path) -> list[FlightEntry]:
        """Reads what ``dump`` wrote.

        Raises:
            ValueError: the file has other fields than this version.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if tuple(data["fields"]) != FIELDS:
            raise ValueError(f"{path} records the fields {data['fields']}; this version has {list(FIELDS)}")

        def facts(values: dict[str, int] | None) -> Facts | None:
            return None if values is None else Facts(**values)

        return [
            FlightEntry(
                entry["phase"],
                facts(entry["facts"]),
                entry["agreed"] and Agreed(Facts(**entry["agreed"]["min"]), Facts(**entry["agreed"]["max"])),
            )
            for entry in data["entries"]
        ]
