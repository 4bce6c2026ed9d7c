"""What systemd is told of a daemon (sd_notify(3)); nothing where it did not start it.

A daemon reports from its own event loop, and only while nothing says that it stands still: what ends the reports is what
`WatchdogSec=` of its unit is to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

from wire.daemon.journal import Journal
from wire.daemon.local_port import Reasons

MAX_STATUS_CHARACTERS = 512
REPORT_SECONDS = 5.0
STARTING_SECONDS = 60
"""How much longer than now a start may take, said with each report until it is done."""

log = Journal("systemd")


def tell(*assignments: str) -> None:
    """One message. Needs `NotifyAccess=main` in the unit."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    address = f"\0{where[1:]}" if where.startswith("@") else where
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.setblocking(False)
        notify.sendto("\n".join(assignments).encode(errors="replace"), address)


class Supervision:
    """Reports that a daemon is up, how it is, and that it goes on.

    `stuck`: as for /livez, a reason here means restart me. `status`: the line that `systemctl status` shows.
    """

    def __init__(self, stuck: Reasons, status: Callable[[], str]) -> None:
        self._stuck = stuck
        self._status = status
        self._ready = False
        self._told = ""
        self._was_stuck = False

    def ready(self) -> None:
        """The start is done, once: `systemctl start` returns."""
        if not self._ready:
            self._ready = True
            tell("READY=1")
            self.report()

    def stopping(self) -> None:
        tell("STOPPING=1", "STATUS=stopping")

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            self.report()
            await asyncio.sleep(_pause_seconds())

    def report(self) -> None:
        """How it is now."""
        try:
            stuck = dict(self._stuck())
            status = _line("; ".join(f"{name}: {text}" for name, text in stuck.items()) or self._status())
        except Exception as error:  # noqa: BLE001 - a check that fails is itself the finding
            stuck = {"check_failed": f"{type(error).__name__}: {error}"}
            status = _line(stuck["check_failed"])
        if stuck and not self._was_stuck:
            log.error("no_progress", reasons=stuck)
        self._was_stuck = bool(stuck)
        said = [] if self._ready else [f"EXTEND_TIMEOUT_USEC={STARTING_SECONDS * 1_000_000}"]
        if not stuck:
            said.append("WATCHDOG=1")
        if status != self._told:
            said.append(f"STATUS={status}")
            self._told = status
        if said:
            tell(*said)


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_STATUS_CHARACTERS]


def _pause_seconds() -> float:
    """Three reports in the time that the watchdog gives (sd_watchdog_enabled(3))."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return REPORT_SECONDS
    try:
        watchdog_seconds = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return REPORT_SECONDS
    return min(REPORT_SECONDS, watchdog_seconds / 3)
