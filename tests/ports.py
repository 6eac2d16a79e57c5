"""Ports for processes that tests start in parallel."""

from __future__ import annotations

import random
import socket

#: Below the range that the kernel assigns from, so that nothing takes the port before the process binds it.
_PORTS = range(10_000, 32_000)


def free_port() -> int:
    """Return a TCP port on localhost that is currently free."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
