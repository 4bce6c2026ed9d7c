"""Integral of memory over time: byte-nanoseconds from samples, with the error of the sampling.

Between two samples memory is taken to move in a straight line (trapezoid). If it moved in one direction
only, the true integral lies between min*dt and max*dt, so the trapezoid errs by at most |change|*dt/2;
that bound is summed beside the integral. An excursion between samples shows in the peak.
"""

from __future__ import annotations

import msgspec

NS_PER_SECOND = 1_000_000_000


class MemoryTrack(msgspec.Struct, array_like=True):
    """The last sample of one unit and the integrals since its last row. Mutable; persisted per interval."""

    boottime_ns: int
    current_bytes: int | None
    inactive_file_bytes: int | None
    byte_ns: int | None = 0
    """None once a stretch of the interval had no sample at either end: the integral is unknown."""
    working_set_byte_ns: int | None = 0
    error_byte_ns: int = 0
    peak_bytes: int | None = None
    pids_peak: int | None = None
    estimated: bool = False
    """Two samples lay further apart than the sampling promises."""
    # Whole byte-seconds of the three integrals, whose *_byte_ns above are the rest of less than one: a GiB
    # for ten seconds is more byte-nanoseconds than fit into 64 bits, and the spool's encoding has no more.
    byte_seconds: int = 0
    working_set_byte_seconds: int = 0
    error_byte_seconds: int = 0

    def add(
        self,
        boottime_ns: int,
        current_bytes: int | None,
        inactive_file_bytes: int | None,
        pids_current: int | None,
        longest_gap_ns: int,
    ) -> None:
        """Extend the integrals to `boottime_ns`; a time not after the last sample extends nothing."""
        dt_ns = max(0, boottime_ns - self.boottime_ns)
        before, self.current_bytes = self.current_bytes, current_bytes
        inactive_before, self.inactive_file_bytes = self.inactive_file_bytes, inactive_file_bytes
        self.boottime_ns = max(boottime_ns, self.boottime_ns)
        if pids_current is not None and (self.pids_peak is None or pids_current > self.pids_peak):
            self.pids_peak = pids_current
        if current_bytes is None or before is None:
            if dt_ns:
                self.byte_ns = self.working_set_byte_ns = None
        else:
            if self.peak_bytes is None or current_bytes > self.peak_bytes:
                self.peak_bytes = current_bytes
            if self.byte_ns is not None:
                whole, self.byte_ns = divmod(
                    self.byte_ns + (before + current_bytes) * dt_ns // 2, NS_PER_SECOND
                )
                self.byte_seconds += whole
            error_ns = self.error_byte_ns + abs(current_bytes - before) * dt_ns // 2
            whole, self.error_byte_ns = divmod(error_ns, NS_PER_SECOND)
            self.error_byte_seconds += whole
            if inactive_file_bytes is None or inactive_before is None:
                if dt_ns:
                    self.working_set_byte_ns = None
            elif self.working_set_byte_ns is not None:
                # The two files are read one after the other: inactive may momentarily exceed current.
                working_set = max(0, current_bytes - inactive_file_bytes)
                working_set_before = max(0, before - inactive_before)
                total_ns = self.working_set_byte_ns + (working_set_before + working_set) * dt_ns // 2
                whole, self.working_set_byte_ns = divmod(total_ns, NS_PER_SECOND)
                self.working_set_byte_seconds += whole
        if dt_ns > longest_gap_ns:
            self.estimated = True

    def stop(self) -> None:
        """No further sample will come: what the last one did not tell is unknown, and no 0."""
        if self.current_bytes is None:
            self.byte_ns = self.working_set_byte_ns = None
        elif self.inactive_file_bytes is None:
            self.working_set_byte_ns = None

    def integrals_byte_ns(self) -> list[int | None]:
        """Memory, working set and error since the last row; None where the integral is unknown."""
        memory, working_set = self.byte_ns, self.working_set_byte_ns
        return [
            None if memory is None else self.byte_seconds * NS_PER_SECOND + memory,
            None if working_set is None else self.working_set_byte_seconds * NS_PER_SECOND + working_set,
            self.error_byte_seconds * NS_PER_SECOND + self.error_byte_ns,
        ]

    def restarted(self) -> MemoryTrack:
        """The track for the next row: from the last sample on, nothing integrated yet."""
        return MemoryTrack(self.boottime_ns, self.current_bytes, self.inactive_file_bytes)
