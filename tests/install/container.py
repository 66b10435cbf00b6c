# SPDX-License-Identifier: Apache-2.0
"""A container made with unshare and mounts, restricted like those in examples/deploy. It stands in for images, which
need a registry. Needs root and util-linux.

The root file system is read-only. It has this machine's /usr, /etc and /sys and the given folders, but no checkout. The
user is 2000, without a name and without capabilities. Processes and IPC are separate, /dev/shm is as small as vLLM
allows, and /scratch and /tmp are writable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

USER = 2000
SHARED_MEMORY = "320m"
"""vLLM 0.32 refuses to start its workers' queues with less than 240 MiB free."""

_START = f"""
set -eu
root=$1 scratch=$2 folders=$3
shift 3
show() {{
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
}}
mount -t tmpfs -o mode=755 root "$root"
for folder in /usr /etc /sys; do show "$folder"; done
for folder in /bin /sbin /lib /lib64; do
    if [ -L "$folder" ]; then cp -P "$folder" "$root$folder"; elif [ -e "$folder" ]; then show "$folder"; fi
done
mkdir -p "$root/proc" "$root/dev/shm" "$root/tmp" "$root/scratch"
mount -t proc proc "$root/proc"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t tmpfs -o mode=1777,size={SHARED_MEMORY} shm "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount --bind "$scratch" "$root/scratch"
echo "$folders" | while read -r folder; do show "$folder"; done
mount -o remount,ro "$root"
cd /
exec chroot "$root" setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --bounding-set -all \\
    --inh-caps -all "$@"
"""


def command(root: Path, scratch: Path, folders: Sequence[Path], arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs ``arguments`` in a container.

    Args:
        root: an empty folder. scratch: becomes /scratch.
        folders: further folders, read-only under their own paths. A link out of them is broken in the container.
    """
    new = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    shown = "\n".join(str(folder) for folder in folders)
    return [*new, "sh", "-c", _START, "sh", str(root), str(scratch), shown, *arguments]


def why_not(folder: Path) -> str:
    """Why there cannot be a container here; empty if there can. ``folder`` is a temporary one."""
    if os.geteuid() != 0:
        return "mounts need root"
    missing = [name for name in ("unshare", "setpriv", "chroot", "mount") if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]} (util-linux, coreutils)"
    (folder / "root").mkdir(parents=True, exist_ok=True)
    tried = subprocess.run(command(folder / "root", folder, [folder], ["true"]), capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"
