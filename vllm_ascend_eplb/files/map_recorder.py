# SPDX-License-Identifier: Apache-2.0
"""MapRecorder: writes the placement in force, and the load behind it, to files (``expert_map_record_path``).

The recorded placement is the one that the updator committed, never a plan. A thread of its own writes, because writing
waits for a disk; the step thread only leaves a reference.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..values.placement import FloatArray, Placement
from .disk import FileError, write_atomic
from .expert_map import ExpertMapError, read_expert_map, write_expert_map
from .traces import read_trace

KEPT_WINDOWS = 32
"""Windows of load that are kept beside the map; 32 windows of 58 layers x 256 experts take 4 MB of memory."""


logger = logging.getLogger("vllm.eplb")  # only loggers under vllm have handlers in a server


def load_path(path: str | os.PathLike[str]) -> Path:
    """Path of the load file beside a recorded map: ``map.load.npz`` beside ``map.json``."""
    return Path(path).with_suffix(".load.npz")


@dataclass(frozen=True)
class RecordedMap:
    """The record of a server: the placement last in force, and the load behind it.

    Attributes:
        placement: the placement last in force.
        load: float64 [T, L, E], tokens per logical expert in the last windows, newest last; None if not recorded.
    """

    placement: Placement
    load: FloatArray | None


def read_recorded(path: str | os.PathLike[str]) -> RecordedMap:
    """Reads a map file, and the load beside it if that belongs to the same layers and experts.

    Raises:
        ExpertMapError, TraceError: one of them cannot be read.
    """
    placement = read_expert_map(path, allow_duplicates=True)
    beside = load_path(path)
    if not beside.exists():
        return RecordedMap(placement, None)
    load = read_trace(beside).of_all_layers()  # a layer may have had no tokens for long
    fits = load.shape[1:] == (placement.num_layers, placement.num_experts)
    return RecordedMap(placement, load if fits else None)


@dataclass
class _Layers:
    """The layers of one model in the file: the placement in force, and the loads [L, E] of its last windows."""

    placement: Placement | None = None
    windows: deque[npt.NDArray[np.integer]] = field(default_factory=lambda: deque(maxlen=KEPT_WINDOWS))


class MapRecorder:
    """Writes each placement in force to a map file. If placements come faster than the disk takes them, only the
    newest is written.

    The load of the last ``KEPT_WINDOWS`` windows is written beside the map: int64 [T, L, E], newest last, as ``plan``
    and ``simulate`` read it. If there is a draft model, its layers come after those of the model in both files; T is
    then the number of windows that both models have.

    Args:
        path: of the map file; its ending selects the form, as in ``write_expert_map``. The load goes to ``load_path``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._models = [_Layers()]
        self._changed = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._complained = False
        self._thread: threading.Thread | None = None

    def record(self, placement: Placement, load: npt.NDArray[np.integer] | None = None) -> None:
        """Hands the placement in force to the thread. Never waits for the disk, never raises.

        Args:
            placement: committed on all ranks.
            load: [L, E], tokens per logical expert in the window that has just ended; the caller must not change it
                afterwards. None if no window has ended since the last call.
        """
        self._record(self._models[0], placement, load)

    def of_model(self, start: Placement) -> MapRecorder:
        """This recorder, for the balancer of the model, whose placement in force is ``start``."""
        with self._lock:
            self._models[0].placement = start
        return self

    def of_draft_model(self, start: Placement) -> DraftMapRecorder:
        """The recorder for the balancer of a draft model, whose layers are recorded from now on. Nothing is written
        before the placement of the model is known.

        Args:
            start: its placement in force.
        """
        layers = _Layers(start)
        with self._lock:
            self._models.append(layers)
        return DraftMapRecorder(functools.partial(self._record, layers), self.close)

    def _record(self, layers: _Layers, placement: Placement, load: npt.NDArray[np.integer] | None = None) -> None:
        with self._lock:
            layers.placement = placement
            if load is not None:
                layers.windows.append(load)
            self._changed = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eplb-map-recorder", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self, timeout: float = 5.0) -> None:
        """Writes what is pending; waits at most ``timeout`` seconds."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            with self._lock:
                placements = [layers.placement for layers in self._models if layers.placement is not None]
                windows = [list(layers.windows) for layers in self._models]
                due = self._changed and len(placements) == len(self._models)
                self._changed = self._changed and not due
            if due:
                self.write(placements, windows)
            if closing:
                return

    def write(self, placements: list[Placement], windows: list[list[npt.NDArray[np.integer]]]) -> None:
        """Writes both files; says once if that fails.

        Args:
            placements: of the model, and of the draft model if there is one.
            windows: their loads by window, newest last.
        """
        try:
            first = placements[0]
            rows = np.concatenate([placement.physical_to_logical for placement in placements])
            joint = Placement(rows, first.num_experts, first.num_ranks)
            common = min(map(len, windows))
            if common:  # first, so that a new map never stands beside an older load for long
                load = np.concatenate([np.stack(loads[-common:]) for loads in windows], axis=1)
                stream = io.BytesIO()
                np.savez_compressed(stream, load=load, digest=np.int64(joint.digest))
                write_atomic(load_path(self.path), stream.getvalue())
            write_expert_map(self.path, joint)
            self._complained = False
        except (ExpertMapError, FileError) as error:
            self._complain(str(error))
        except Exception as error:  # whatever it is, serving goes on
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, reason: str) -> None:
        if not self._complained:
            logger.warning("EPLB: the expert map is not recorded to %s: %s", self.path, reason)
            self._complained = True


@dataclass(frozen=True)
class DraftMapRecorder:
    """Records the layers of a draft model in the file of its model.

    Attributes:
        record, close: as those of :class:`MapRecorder`.
    """

    record: Callable[..., None]
    close: Callable[[], None]
