"""Readings and snapshots made by hand, for the pure parts."""

from __future__ import annotations

from agent.meter.interval import Cadence
from agent.meter.model import COUNTERS, Reading, Snapshot

SECOND = 1_000_000_000
WALL = 1_700_000_000 * SECOND
BOOT_A, BOOT_B = "aaaaaaaa-0000-4000-8000-000000000000", "bbbbbbbb-0000-4000-8000-000000000000"
CADENCE = Cadence(10 * SECOND, 4 * SECOND)


def counters(**known: int) -> tuple[int | None, ...]:
    return tuple(known.get(name) for name in COUNTERS)


def reading(cgroup_id: int, cpu: int | None, *, path: str = "", around: int = 1, **more: object) -> Reading:
    """A unit with that much CPU time; the fields of Reading by name."""
    values = {} if cpu is None else {"cpu_usage_ns": cpu}
    values |= more.pop("counters", {})  # type: ignore[arg-type]
    return Reading(cgroup_id, path or f"/unit-{cgroup_id}", around, counters(**values), **more)  # type: ignore[arg-type]


def root(cpu: int | None, **more: object) -> Reading:
    return reading(1, cpu, path="/", **more)


def snapshot(
    at_seconds: float,
    host: Reading,
    *units: Reading,
    boot: str = BOOT_A,
    wall: int | None = None,
    complete: bool = True,
) -> Snapshot:
    """Taken `at_seconds` after the boot, which was at WALL unless `wall` says otherwise."""
    boottime = round(at_seconds * SECOND)
    return Snapshot(
        boot, boottime, wall if wall is not None else WALL + boottime, host, list(units), complete
    )


def everybody(reading_: Reading) -> str:
    return "acme" if reading_.cgroup_id != 1 else "host"
