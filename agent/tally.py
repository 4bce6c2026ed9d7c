"""What the agent counts. `exporter` reads it when it is scraped; written only by the metering thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.meter.rows import Usage
from agent.meter.usage import Outcome
from wire.measures import BIT
from wire.v1 import usage_pb2 as pb

MAX_TENANTS = 1_000
"""Tenants with totals of their own in /metrics; further ones are added up as `_other`."""
OTHER = "_other"

TOTALS: tuple[tuple[str, str, str, float], ...] = (
    ("cpu_usage_ns", "cpu_usage_seconds", "CPU time metered.", 1e-9),
    ("cpu_throttled_ns", "cpu_throttled_seconds", "Time throttled by a CPU quota.", 1e-9),
    ("memory_byte_seconds", "memory_byte_seconds", "Integral of memory over time.", 1.0),
    ("io_read_bytes", "io_read_bytes", "Bytes read from block devices.", 1.0),
    ("io_write_bytes", "io_written_bytes", "Bytes written to block devices.", 1.0),
    ("oom_kills", "oom_kills", "Processes killed for want of memory.", 1.0),
)
"""(measure, metric, help, factor) of the totals per tenant."""
_LAST = int(pb.ROW_FLAG_FINAL | pb.ROW_FLAG_TAIL_UNSEEN)
_SLOTS = tuple(enumerate(BIT[measure] for measure, *_ in TOTALS))


@dataclass(slots=True)
class Tally:
    """Counters since the start of the process, of what was committed to the spool."""

    intervals: int = 0
    held_intervals: int = 0
    batches: int = 0
    rows: int = 0
    batch_bytes: int = 0
    gaps: int = 0
    ends: int = 0
    """Last rows made of what the probes recorded of an end."""
    ends_forgotten: int = 0
    unknown: int = 0
    """Rows whose CPU usage no source could tell."""
    tenants: dict[str, list[int]] = field(default_factory=dict)

    def committed(self, outcome: Outcome, batches: int, size: int) -> None:
        self.intervals += 1
        self.batches += batches
        self.batch_bytes += size
        self.gaps += len(outcome.gaps)
        for stretch in outcome.stretches:
            self.rows += len(stretch.usages)
            for usage in stretch.usages:
                self._add(usage)

    def _add(self, usage: Usage) -> None:
        self.ends += usage.flags & _LAST == pb.ROW_FLAG_FINAL
        self.unknown += not usage.known & 1
        tenant = usage.tenant
        totals = self.tenants.get(tenant)
        if totals is None:
            if len(self.tenants) >= MAX_TENANTS:
                tenant = OTHER
            totals = self.tenants.setdefault(tenant, [0] * len(_SLOTS))
        values = usage.values
        for slot, bit in _SLOTS:
            if values[bit]:
                totals[slot] += values[bit]
