# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: two network namespaces behind a switch. Each host has its own host name, shared memory and
IPC, so that only the network joins them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

PREFIX = "eplb"
ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Addresses of the hosts, from a range for examples that is never routed."""


def why_not() -> str:
    """Why there cannot be such hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no ip and unshare (iproute2, util-linux) for network namespaces"
    try:
        for command in ("ip netns add eplbtry", "ip -n eplbtry link add name b type bridge"):
            subprocess.run(command.split(), check=True, capture_output=True)
        subprocess.run(
            ["unshare", "--uts", "--ipc", "--mount", "sh", "-c", "hostname x && mount -t tmpfs tmpfs /dev/shm"],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces with a bridge and host names of their own: {getattr(error, 'stderr', error)!r}"
    finally:
        subprocess.run(["ip", "netns", "del", "eplbtry"], capture_output=True)
    return ""


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True)


class Hosts:
    """The two hosts while they exist."""

    def __init__(self) -> None:
        self._names = [f"{PREFIX}{os.getpid()}h{host}" for host in (0, 1)]
        self._switch = f"{PREFIX}{os.getpid()}s"

    def make(self) -> None:
        _ip(f"netns add {self._switch}")
        _ip(f"-n {self._switch} link add name switch type bridge")
        _ip(f"-n {self._switch} link set switch up")
        for host, name in enumerate(self._names):
            _ip(f"netns add {name}")
            _ip(f"-n {name} link add lan type veth peer name port{host} netns {self._switch}")
            _ip(f"-n {name} address add {ADDRESSES[host]}/24 dev lan")
            for device in ("lo", "lan"):
                _ip(f"-n {name} link set {device} up")
            _ip(f"-n {self._switch} link set port{host} master switch")
            _ip(f"-n {self._switch} link set port{host} up")

    def remove(self) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def command(self, host: int, command: list[str]) -> list[str]:
        """Return the command line that runs ``command`` on a host."""
        start = f'hostname eplb-host-{host} && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        inside = ["unshare", "--uts", "--ipc", "--mount", "sh", "-c", start, "sh", *command]
        return ["ip", "netns", "exec", self._names[host], *inside]

    def link(self, host: int, up: bool) -> None:
        """Plug or pull a host's cable at the switch; the host keeps its address."""
        _ip(f"-n {self._switch} link set port{host} {'up' if up else 'down'}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
