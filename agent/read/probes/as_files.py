"""Kernel values as the files of a cgroup print them. Pure.

A unit's counters come from a row at one reading and may come from a file at the next. So both must say the same
number at the same instant: the files print microseconds, and scale user and system time to fit the usage.
"""

from __future__ import annotations

from agent.meter.model import Reading
from agent.read import parse
from agent.read.probes.records import Knows, Row, Tombstone

Cpu = tuple[int, int, int]

_CPU, _THROTTLING, _MEMORY, _MEMORY_PEAK, _OOM_KILLS, _PIDS_PEAK = (
    int(bit)
    for bit in (
        Knows.CPU,
        Knows.THROTTLING,
        Knows.MEMORY,
        Knows.MEMORY_PEAK,
        Knows.OOM_KILLS,
        Knows.PIDS_PEAK,
    )
)


def cpu(row: Row) -> tuple[int | None, ...]:
    """Usage, user, system; periods, throttled periods, throttled time."""
    usage, user, system = cpu_time(row.cpu_usage_ns, row.cpu_user_ns, row.cpu_system_ns)
    if not row.flags & _THROTTLING:
        return usage, user, system, None, None, None
    throttled_ns = row.cpu_throttled_ns - row.cpu_throttled_ns % 1_000
    return usage, user, system, row.cpu_periods, row.cpu_throttled_periods, throttled_ns


def cpu_time(usage_ns: int, user_ns: int, system_ns: int) -> Cpu:
    """usage, user and system as cpu.stat says them: cputime_adjust() of kernel/sched/cputime.c, without its memory
    of what it said before.
    """
    system = usage_ns * system_ns // (user_ns + system_ns) if system_ns else 0
    user = usage_ns - system
    return usage_ns - usage_ns % 1_000, user - user % 1_000, system - system % 1_000


def pressure(row: Row) -> tuple[int | None, ...]:
    """(some, full) of cpu, memory and io."""
    a, b, c, d = row.psi_cpu_some_ns, row.psi_cpu_full_ns, row.psi_memory_some_ns, row.psi_memory_full_ns
    e, f = row.psi_io_some_ns, row.psi_io_full_ns
    return a - a % 1_000, b - b % 1_000, c - c % 1_000, d - d % 1_000, e - e % 1_000, f - f % 1_000


def memory(row: Row) -> tuple[int | None, ...]:
    """Current, peak, limit; OOM kills."""
    return (
        row.memory_current_bytes,
        row.memory_peak_bytes if row.flags & _MEMORY_PEAK else None,
        parse.limit_of(row.memory_limit_bytes),
        row.oom_kills if row.flags & _OOM_KILLS else None,
    )


def pids(row: Row) -> tuple[int | None, int | None]:
    """Current, peak."""
    return row.pids_current, row.pids_peak if row.flags & _PIDS_PEAK else None


def last_reading(tombstone: Tombstone, enclosing_id: int) -> Reading:
    """What a tombstone tells of a unit."""
    flags = tombstone.flags
    usage = cpu_time(tombstone.cpu_usage_ns, tombstone.cpu_user_ns, tombstone.cpu_system_ns)
    kills = tombstone.oom_kills if flags & _OOM_KILLS else None
    return Reading(
        tombstone.cgroup_id,
        tombstone.path,
        enclosing_id,
        (*(usage if flags & _CPU else (None, None, None)), None, None, None, kills),
        memory_current_bytes=tombstone.memory_current_bytes if flags & _MEMORY else None,
        memory_peak_bytes=tombstone.memory_peak_bytes if flags & _MEMORY_PEAK else None,
    )
