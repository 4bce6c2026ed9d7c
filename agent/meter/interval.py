"""Where an interval lies in wall clock, and how long it took. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from wire.v1 import usage_pb2 as pb

_CLOCK_TOLERANCE_NS = 50_000_000
_CLOCK_SLEW_PPM = 600
"""The kernel slews at most 500 ppm (adjtimex MAXFREQ) around the crystal's own error."""
STAND_STILL_NS = 60_000_000_000
"""How far the wall clock may be behind what was written already for a stream to wait for it."""


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """[start, end) in wall clock; `duration_ns` in CLOCK_BOOTTIME."""

    start_unix_ns: int
    end_unix_ns: int
    duration_ns: int
    flags: int


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often the agent means to read. All in nanoseconds of CLOCK_BOOTTIME."""

    interval_ns: int
    longest_sample_gap_ns: int


def interval_between(
    boottime_before_ns: int,
    wall_before_unix_ns: int,
    end_before_unix_ns: int,
    boottime_ns: int,
    wall_unix_ns: int,
    cadence: Cadence,
) -> Interval:
    """Bounds of the interval between two snapshots; `end_before_unix_ns` is the end that was written for the first.

    The end is the wall clock, written as the multiple of the interval it was meant to be when it is less
    than a tenth of an interval past it. The start is the previous end, whatever the clock did.
    """
    duration = boottime_ns - boottime_before_ns
    wall = wall_unix_ns
    aligned = wall - wall % cadence.interval_ns
    meant = wall - aligned < cadence.interval_ns // 10 and aligned > end_before_unix_ns
    end = aligned if meant else wall
    flags = 0
    drift = (wall - wall_before_unix_ns) - duration
    tolerance = _CLOCK_TOLERANCE_NS + duration * _CLOCK_SLEW_PPM // 1_000_000
    if drift > tolerance:
        flags |= pb.BATCH_FLAG_CLOCK_STEPPED_FORWARD
    if drift < -tolerance:
        flags |= pb.BATCH_FLAG_CLOCK_STEPPED_BACK
    start = end_before_unix_ns
    if end <= start:
        # The wall clock is behind what was written already (or two readings share one boundary): time in
        # the record stands almost still until the clock has caught up. The duration remains true.
        end = start + 1
    if duration > cadence.interval_ns * 3 // 2:
        flags |= pb.BATCH_FLAG_LONG_INTERVAL
    if boottime_before_ns == 0:
        flags |= pb.BATCH_FLAG_AFTER_REBOOT
    return Interval(start, end, max(1, duration), flags)
