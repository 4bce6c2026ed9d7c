"""How much memory this process uses, and when that is too much.

Above the bound agents are told RETRY and new ones are turned away, so that what is on its way to the disk can end; below
nine tenths of it all is as before. Memory that was freed and not given back would keep the door shut for nothing, so it
is asked for while the door is.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import math
import os
import time
from pathlib import Path

from wire.daemon.journal import Journal
from wire.statuses import Meter

LOOK_SECONDS = 0.5
ENDED_AT_ONCE = 128
"""BoringSSL wipes what it frees, which makes 35 KiB of each connection resident that it never used."""
KEPT_BYTES, GIVE_BACK_SECONDS = 8 << 20, 15.0
"""Memory is given back if it has risen by so much, and not oftener."""
YOUNG = 1
"""The generations that hold what has come lately."""
COLLECT_REST = 100
"""At least so many times as long as collecting all took."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MIB = 1 << 20
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

log = Journal("collector.pressure")


class Pressure:
    """`bound_bytes` may be changed at any time."""

    def __init__(self, bound_bytes: int) -> None:
        self.bound_bytes = bound_bytes
        self.used_bytes = 0
        self.high = False

    def observe(self, used_bytes: int) -> bool:
        """Whether memory is short now; short stays short until a tenth of the bound is free."""
        self.used_bytes = used_bytes
        self.high = used_bytes > (self.bound_bytes * 9 // 10 if self.high else self.bound_bytes)
        return self.high

    @property
    def trouble(self) -> str:
        """For /readyz; empty if there is enough."""
        if not self.high:
            return ""
        return (
            f"{Meter.BUFFER_OVERFLOW}: {self.used_bytes / _MIB:.0f} MiB are in use, `limits.memory` is"
            f" {self.bound_bytes / _MIB:.0f} MiB: agents are told RETRY, new ones are turned away"
        )

    async def watch(self) -> None:
        """Look for ever, until cancelled."""
        while True:
            before = self.high
            if self.observe(resident_bytes()):
                await asyncio.to_thread(give_back)
                self.observe(resident_bytes())
            if self.high and not before:
                log.error(
                    "memory_short",
                    code=Meter.BUFFER_OVERFLOW,
                    used_bytes=self.used_bytes,
                    bound_bytes=self.bound_bytes,
                )
            elif before and not self.high:
                log.info("memory_recovered", used_bytes=self.used_bytes)
            await asyncio.sleep(LOOK_SECONDS)


class FreeMemory:
    """What nobody uses, given back to the system, when it pays: what is given back too soon is asked for again."""

    def __init__(self) -> None:
        self._collect_all_from = -math.inf
        self._ended = 0
        self._least_bytes = resident_bytes()
        """In use after it was given back, or less since."""
        self._given_back = -math.inf

    def collect(self) -> None:
        """While memory rises: what a cycle keeps. All of it, but for no more than a part of the time; else what is young."""
        if (begun := time.monotonic()) < self._collect_all_from:
            gc.collect(YOUNG)
            return
        gc.collect()
        ended = time.monotonic()
        self._collect_all_from = ended + (ended - begun) * COLLECT_REST

    async def look(self, ended: int) -> None:
        """So many connections have ended since the last look."""
        self._ended += ended
        used_bytes = resident_bytes()
        self._least_bytes = min(self._least_bytes, used_bytes)
        kept = used_bytes >= self._least_bytes + KEPT_BYTES
        if kept and time.monotonic() >= self._given_back + GIVE_BACK_SECONDS:
            await asyncio.to_thread(give_back)
        elif self._ended >= ENDED_AT_ONCE:
            await asyncio.to_thread(trim)
        else:
            return
        self._ended = 0
        self._least_bytes, self._given_back = resident_bytes(), time.monotonic()


def give_back() -> None:
    """First what a cycle keeps, since grpc.aio leaves each call's metadata in one, and the interpreter counts objects, not
    bytes; then what glibc has kept for itself. Takes some milliseconds.
    """
    gc.collect()
    trim()


def trim() -> None:
    """To the system what was freed and glibc has kept for itself. Takes up to 15 ms, without the interpreter's lock."""
    if _trim is not None:
        _trim(0)


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What this process may use at most: the smallest memory bound of its cgroups (v1 or v2), or the host's memory."""
    least = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        place = root / path.lstrip("/")
        for directory in (place, *place.parents):
            if not directory.is_relative_to(root):
                break
            try:
                text = (directory / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                least = min(least, int(text))
    return least
