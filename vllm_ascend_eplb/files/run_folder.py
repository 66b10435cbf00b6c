# SPDX-License-Identifier: Apache-2.0
"""The private folder of a server: made at start-up, and removed by the server's process that ends last.

If all processes are killed at once, the next server of the same user removes the folder. A lock shows whether a folder
is abandoned, because the kernel releases it however a process ends. Process ids do not: they are reused, and differ
between containers that share the folder for temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

OWNED_FOLDER = "vllm-eplb-"
"""First part of a private folder's name; the id of the process that made it and a hyphen follow."""


_NAME = re.compile(re.escape(OWNED_FOLDER) + r"(\d{1,10})-\w+")


def make_private_folder() -> Path:
    """Makes a folder (mode 0700) that is locked while this process, or one that it forked, lives. Removes abandoned
    folders."""
    remove_abandoned_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{OWNED_FOLDER}{os.getpid()}-"))
        with contextlib.suppress(FileNotFoundError):  # another server that is just starting may find it unlocked
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # stays open, and the lock with it
            with contextlib.suppress(OSError):  # without locks in the file system nobody can lock and remove it
                fcntl.flock(handle, fcntl.LOCK_SH)
            if folder.is_dir():
                return folder
            os.close(handle)


def remove_abandoned_folders() -> None:
    """Removes private folders of this user's servers that were killed."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path)


def _remove_if_abandoned(folder: str) -> None:
    """Raises:
    OSError: it is locked, no folder, or may not be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def owner_of_folder(folder: str | os.PathLike[str]) -> int | None:
    """The id of the process that made a private folder; None where it is not one."""
    match = _NAME.fullmatch(os.path.basename(folder))
    return int(match.group(1)) if match is not None else None


def remove_orphaned_folder(stats_file: str | os.PathLike[str]) -> None:
    """Removes the private folder of a statistics file if the front-end process was killed before it could do so.

    The balancer calls this when it ends in order; otherwise the planner's process does, which outlives the others. A
    folder that a user chose is never touched.
    """
    folder = os.path.dirname(stats_file)
    owner = owner_of_folder(folder)
    if owner is None or os.path.islink(folder):
        return
    if has_ended(owner):
        shutil.rmtree(folder, ignore_errors=True)


def has_ended(process: int) -> bool:
    """Whether no process has this id, or the process is a zombie: in a container nobody may ever reap it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        return False
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:  # it ended as it was looked at
        return True
    except OSError:
        return False
    return status.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


STATS_VARIABLE = "EPLB_STATS_FILE"
"""Environment variable that holds the path of the statistics file; vLLM warns of unknown names that begin with VLLM."""
