"""What the ledger counts and measures. Its core fills it; `exporter` and the headline of `systemctl status` read it.

A tally is filled by the one thread that owns the ledger; other threads get copies (`copy`), so that none sees half a change.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

INSERT_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
VERDICTS = ("parked", "rejected", "refused", "adopted")
"""Kinds that `Tally.verdicts` may have: what collectors said of batches besides that they are to be booked."""
SOURCE_UNAVAILABLE = "source_unavailable"
STORE_UNAVAILABLE = "store_unavailable"
TROUBLES = (SOURCE_UNAVAILABLE, STORE_UNAVAILABLE)
"""Reasons of `Ledger.trouble` that alerts know; the ledger may have others."""


@dataclass(slots=True)
class Tally:
    """Counts are since the start of the process; what is "now" is as of the last look."""

    booked_batches: int = 0
    booked_rows: int = 0
    duplicates: int = 0
    """Arrivals that were booked before, byte for byte. Replays and crashes make them; they change nothing."""
    conflicts: int = 0
    """Arrivals of an identity that is booked with another digest: not booked, METER-006."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """Kind (one of VERDICTS) -> how many were read."""
    lost_positions: int = 0
    """Bytes of the log or records of topics that were deleted before they were read."""
    insert_counts: list[int] = field(default_factory=lambda: [0] * (len(INSERT_BUCKETS_SECONDS) + 1))
    insert_sum_seconds: float = 0.0
    failed_inserts: int = 0
    rollup_built: int = 0
    """Hours and days added up."""

    source_lag: dict[tuple[str, str], int] = field(default_factory=dict)
    """(source, unit) -> what is there and not read yet: ("log", "bytes"), ("usage-metering", "records")."""
    watermark_unix_ns: int | None = None
    """Up to then the usage of every agent that is not retired is booked; None: no agent is known."""
    agents: int = 0
    """Known and not retired."""
    silent_agents: int = 0
    """Of those: nothing has come for longer than their batches are apart."""
    missing_batches: int = 0
    """Numbers that a stream has passed over."""
    parked_batches: int = 0
    """Accepted, and not released by their tenant's plan yet: not booked."""
    rejected_batches: int = 0
    """Rejected and not readmitted: not booked."""
    period: str = ""
    """The oldest period that has ended and is not closed; empty: none."""
    period_end_unix_ns: int | None = None
    """Its end."""
    blockers: int = 0
    """Of it: what keeps it from being closed, and nobody has waived."""
    periods_closed: int = 0
    rollup_dirty_hours: int = 0
    """Hours whose sums lack something that is booked."""
    reconcile_differences: int = 0
    """Batches that one hop has and the next has not, by the last reconciliation that was done."""
    reconcile_success_unix_ns: int | None = None
    """When one was last done to its end without a difference, also before this process."""
    conservation_difference_ns: int = 0
    """CPU time by which raw usage and what was added up from it differ, by the last `verify`."""

    def inserted(self, seconds: float) -> None:
        """One insert into the store took so long."""
        self.insert_counts[bisect_left(INSERT_BUCKETS_SECONDS, seconds)] += 1
        self.insert_sum_seconds += seconds

    def copy(self) -> Tally:
        """For another thread."""
        return replace(
            self,
            verdicts=dict(self.verdicts),
            insert_counts=list(self.insert_counts),
            source_lag=dict(self.source_lag),
        )
