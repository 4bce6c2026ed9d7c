"""Ports of servers that are stopped or killed, and come back."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Distinct ones of 127.0.0.1, below those that connections out of this machine are given (from 32768).

    An ephemeral port is lost for as long as its server is down: any connection may be given it, even the one
    that tries to reach that server (TCP then connects to itself).
    """
    free: set[int] = set()
    while len(free) < count:
        port = random.randrange(18_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.add(port)
    return list(free)


def free_port() -> int:
    return free_ports(1)[0]
