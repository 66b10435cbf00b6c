# SPDX-License-Identifier: Apache-2.0
"""Processes that tests started, and the semaphores that they left, from /proc and /dev/shm."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def title(pid: int) -> str:
    """The command line of a process; empty once it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_fields(pid)[1])
    return 0


def session_members(leader: int) -> list[int]:
    """Processes of the session that ``leader`` began, without ``leader`` and without zombies."""
    assert leader > 1, "not a session of ours"
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            with contextlib.suppress(OSError):
                state, _, _, session = _fields(int(entry.name))[:4]
                if int(session) == leader and state != "Z":
                    members.append(int(entry.name))
    return members


def _fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, group, session and more."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def semaphores(pids: Iterable[int]) -> set[int]:
    """Inodes of the semaphores that the processes have mapped. Their names do not help: they were made under temporary
    names."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            found |= {int(line.split()[4]) for line in lines if "/dev/shm/sem." in line}
    return found


def left_semaphores(held: set[int]) -> list[str]:
    there = {entry.inode(): entry.path for entry in os.scandir("/dev/shm") if entry.name.startswith("sem.")}
    return [f"semaphore {there[inode]}" for inode in held & there.keys()]
