# SPDX-License-Identifier: Apache-2.0
"""The statistics file: EP rank 0 writes it, the API server and the tools read it."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import threading
from pathlib import Path

from ..files.disk import expand_user, write_private
from ..files.run_folder import STATS_VARIABLE, has_ended, make_private_folder, owner_of_folder
from .stats import MAX_STATS_BYTES, EplbStats, StatsError, logger

OWNER_ENDS = 5.0
"""Seconds that a front-end process may take from the removal of its private folder to its end."""


RANK_VARIABLE = "EPLB_FIRST_DP_RANK"
"""Environment variable with the first DP rank that a server hosts, where that is not 0."""


def note_first_rank(data_parallel_rank: int) -> None:
    """Notes, in the front-end process, the first DP rank of this server. Only rank 0 reports statistics, so a server on
    another host has none."""
    os.environ.pop(RANK_VARIABLE, None)
    if data_parallel_rank > 0:
        os.environ[RANK_VARIABLE] = str(data_parallel_rank)


def reported_elsewhere() -> int | None:
    """The first DP rank of this server if another server hosts rank 0 and has the statistics; otherwise None."""
    rank = os.environ.get(RANK_VARIABLE, "")
    return int(rank) if rank.isascii() and rank.isdigit() and len(rank) < 10 and int(rank) > 0 else None


ELSEWHERE = (
    "this server hosts the data-parallel ranks from {rank} on; rank 0 reports for the balancer: ask the API server "
    "that hosts it"
)


class StatsFile:
    """Writes statistics to a file that readers always see whole.

    Args:
        path: of the file; its folder must exist. The file is readable by its owner only.
        min_interval: least seconds between two writes of the background thread; of the statistics published meanwhile
            only the newest are written.
    """

    def __init__(self, path: str | os.PathLike[str], min_interval: float = 0.2) -> None:
        self.path = Path(path)
        self._min_interval = min_interval
        self._newest: EplbStats | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, stats: EplbStats) -> None:
        """Replaces the file. May wait for the disk.

        Raises:
            OSError: the file cannot be written.
        """
        write_private(self.path, stats.to_json())

    def publish(self, stats: EplbStats) -> None:
        """Hands statistics to the background thread. Never waits, never raises."""
        self._newest = stats
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eplb-stats", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self, timeout: float = 2.0) -> None:
        """Writes pending statistics and ends the thread; waits at most ``timeout`` seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        complained = False
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            stats, self._newest = self._newest, None
            if stats is not None:
                try:
                    self.write(stats)
                except Exception as error:
                    if not complained and not self._removed_by_owner():
                        logger.warning("EPLB statistics cannot be written to %s: %s", self.path, error)
                        complained = True
            if closing:
                return
            self._closing.wait(self._min_interval)

    def _removed_by_owner(self) -> bool:
        """Whether the private folder is gone because the front-end process that made it is ending. At the end of an
        offline program, that process removes the folder before it ends the engine's processes."""
        owner = owner_of_folder(self.path.parent)
        if owner is None or self.path.parent.exists():
            return False
        # Then this process is ended soon, or the owner has exited.
        return self._closing.wait(OWNER_ENDS) or has_ended(owner)


def read_stats(path: str | os.PathLike[str]) -> EplbStats | None:
    """Reads a statistics file; None if there is none yet.

    Raises:
        StatsError: the file does not hold statistics.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))  # a FIFO must not block
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StatsError(f"{os.fspath(path)} is not a regular file")
        return EplbStats.from_json(file.read(MAX_STATS_BYTES + 1))


def stats_path(part: str = "") -> Path | None:
    """Path of the statistics file, or None if the environment variable is not set.

    Args:
        part: name of the balancer, if a server has several (pipeline stages, a draft model); each has a file.
    """
    name = os.environ.get(STATS_VARIABLE, "")
    if not name:
        return None
    path = Path(expand_user(name))
    return path.with_stem(f"{path.stem}-{part}") if part else path


def provide_stats_path() -> Path:
    """The path that all processes of this server share; called in the front-end process.

    Makes a private folder unless the environment variable is set. The process that made the folder removes it at its
    exit. If that process is killed, the planner's process removes the folder (process.py), or the next server's start.
    """
    existing = stats_path()
    if existing is not None:
        return existing
    owner, folder = os.getpid(), make_private_folder()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)
            os.environ.pop(STATS_VARIABLE, None)

    atexit.register(remove)
    path = folder / "stats.json"
    os.environ[STATS_VARIABLE] = str(path)
    return path
