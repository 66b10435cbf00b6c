# SPDX-License-Identifier: Apache-2.0
"""A port for a server that is about to start."""

import random
import socket

PORTS = range(20000, 32768)
"""Below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range). Such a port could be taken in
the seconds that a server loads before it binds its own."""


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    chance = random.SystemRandom()  # a test may seed the shared generator, and two of them would choose alike
    while True:
        port = chance.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
