"""What systemd is told of a daemon (sd_notify(3)); nothing where it did not start it."""

from __future__ import annotations

import contextlib
import os
import socket

MAX_STATUS_CHARACTERS = 512


def tell_status(text: str) -> None:
    """The line that `systemctl status` shows. Needs `NotifyAccess=main` in the unit."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    address = f"\0{where[1:]}" if where.startswith("@") else where
    line = " ".join(text.split())[:MAX_STATUS_CHARACTERS]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.setblocking(False)
        notify.sendto(f"STATUS={line}".encode(errors="replace"), address)
