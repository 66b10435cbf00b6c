# SPDX-License-Identifier: Apache-2.0
"""What processes hold, from /proc."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def measure(pids: Iterable[int]) -> dict[str, float]:
    """Memory, threads, files, sockets and the number of the processes that there are, all together."""
    total: Counter[str] = Counter()
    for pid in pids:
        links = []
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    links.append(os.readlink(entry))
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        total["memory_mib"] += int(fields.get("RssAnon", "0 kB").split()[0]) / 1024
        total["threads"] += int(fields.get("Threads", "0"))
        total["files"] += len(links)
        total["sockets"] += sum(link.startswith("socket:") for link in links)
        total["processes"] += 1
    return dict(total)
