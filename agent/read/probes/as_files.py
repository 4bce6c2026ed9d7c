"""Kernel values as the files of a cgroup print them. Pure.

A unit's counters come from a row at one reading and may come from a file at the next. So both must say the same
number at the same instant: the files print microseconds, and scale user and system time to fit the usage.
"""

from __future__ import annotations

from agent.meter.model import Reading
from agent.read import parse
from agent.read.probes.records import Knows, RawRow, Row, Tombstone

Cpu = tuple[int, int, int]

_CPU, _THROTTLING, _MEMORY, _MEMORY_PEAK, _OOM_KILLS, _PIDS_PEAK, _PRESSURE = (
    int(bit)
    for bit in (
        Knows.CPU,
        Knows.THROTTLING,
        Knows.MEMORY,
        Knows.MEMORY_PEAK,
        Knows.OOM_KILLS,
        Knows.PIDS_PEAK,
        Knows.PRESSURE,
    )
)

_THREE_NONE = (None,) * 3
_SIX_NONE = (None,) * 6


def counters(row: RawRow) -> tuple[int | None, ...]:
    """The counters of a reading. For every unit at every reading: hence in one piece."""
    # fmt: off
    (
        _, _, usage, user, system, periods, throttled_periods, throttled, _, _, _, kills, _, _,
        io, io_full, memory, memory_full, cpu, cpu_full, flags, _,
    ) = row
    # fmt: on
    if system:
        system = usage * system // (user + system)
    user = usage - system
    return (
        *(
            (usage - usage % 1_000, user - user % 1_000, system - system % 1_000)
            if flags & _CPU
            else _THREE_NONE
        ),
        *(
            (periods, throttled_periods, throttled - throttled % 1_000)
            if flags & _THROTTLING
            else _THREE_NONE
        ),
        kills if flags & _OOM_KILLS else None,
        *(
            (
                cpu - cpu % 1_000,
                cpu_full - cpu_full % 1_000,
                memory - memory % 1_000,
                memory_full - memory_full % 1_000,
                io - io % 1_000,
                io_full - io_full % 1_000,
            )
            if flags & _PRESSURE
            else _SIX_NONE
        ),
    )


def cpu_time(usage_ns: int, user_ns: int, system_ns: int) -> Cpu:
    """usage, user and system as cpu.stat says them: cputime_adjust() of kernel/sched/cputime.c, without its memory
    of what it said before.
    """
    system = usage_ns * system_ns // (user_ns + system_ns) if system_ns else 0
    user = usage_ns - system
    return usage_ns - usage_ns % 1_000, user - user % 1_000, system - system % 1_000


def memory(raw: RawRow) -> tuple[int | None, int | None, int | None]:
    """Current, peak, limit; of a row that knows memory."""
    row = Row._make(raw)
    peak = row.memory_peak_bytes if row.flags & _MEMORY_PEAK else None
    return row.memory_current_bytes, peak, parse.limit_of(row.memory_limit_bytes)


def pids(raw: RawRow) -> tuple[int | None, int | None]:
    """Current, peak; of a row that knows pids."""
    row = Row._make(raw)
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
