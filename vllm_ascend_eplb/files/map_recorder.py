# SPDX-License-Identifier: Apache-2.0
"""MapRecorder: writes the placement in force, and the load behind it, to files (``expert_map_record_path``).

The recorded placement is the one that the updator committed, never a plan. A thread of its own writes, because writing
waits for a disk; the step thread only leaves a reference.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
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


class MapRecorder:
    """Writes each placement in force to a map file. If placements come faster than the disk takes them, only the
    newest is written.

    The load of the last ``KEPT_WINDOWS`` windows is written beside the map: int64 [T, L, E], newest last, as ``plan``
    and ``simulate`` read it.

    Args:
        path: of the map file; its ending selects the form, as in ``write_expert_map``. The load goes to ``load_path``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._newest: tuple[Placement, list[npt.NDArray[np.integer]]] | None = None
        self._windows: deque[npt.NDArray[np.integer]] = deque(maxlen=KEPT_WINDOWS)
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
        with self._lock:
            if load is not None:
                self._windows.append(load)
            self._newest = (placement, list(self._windows))
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
                newest, self._newest = self._newest, None
            if newest is not None:
                self.write(*newest)
            if closing:
                return

    def write(self, placement: Placement, windows: list[npt.NDArray[np.integer]]) -> None:
        try:
            if windows:  # first, so that a new map never stands beside an older load for long
                stream = io.BytesIO()
                np.savez_compressed(stream, load=np.stack(windows), digest=np.int64(placement.digest))
                write_atomic(load_path(self.path), stream.getvalue())
            write_expert_map(self.path, placement)
            self._complained = False
        except (ExpertMapError, FileError) as error:
            self._complain(str(error))
        except Exception as error:  # whatever it is, serving goes on
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, reason: str) -> None:
        if not self._complained:
            logger.warning("EPLB: the expert map is not recorded to %s: %s", self.path, reason)
            self._complained = True
