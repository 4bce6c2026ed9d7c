"""What the collector counts. Plain integers on the hot path; `exporter` reads them when it is scraped."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

MAX_TENANTS = 1_000
"""Tenants with totals of their own in /metrics; further ones are added up as `_other`."""
OTHER = "_other"

LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class TenantTotal:
    batches: int = 0
    rows: int = 0
    cpu_usage_ns: int = 0

    def add(self, batches: int, rows: int, cpu_usage_ns: int) -> None:
        self.batches += batches
        self.rows += rows
        self.cpu_usage_ns += cpu_usage_ns


@dataclass(slots=True)
class Tally:
    """Counters since the start of the process."""

    answers: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(METER code, reason) -> answers and connections refused."""
    gaps: Counter[str] = field(default_factory=Counter)
    tenants: dict[str, TenantTotal] = field(default_factory=dict)
    bytes_received: int = 0
    connections: int = 0
    open_streams: int = 0
    adopted_streams: int = 0
    broken_streams: int = 0
    slowed_messages: int = 0
    released_batches: int = 0
    unreadable_parked: int = 0
    commits: int = 0
    failed_commits: int = 0
    held_elsewhere: int = 0
    delivered_elsewhere: int = 0
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS_SECONDS) + 1))
    latency_sum_seconds: float = 0.0

    def accepted(self, tenant: str, more: TenantTotal) -> None:
        self.answers["accepted"] += more.batches
        self._handed_on(tenant, more)

    def released(self, tenant: str, rows: int, cpu_usage_ns: int) -> None:
        """A parked batch has been handed on."""
        self.released_batches += 1
        self._handed_on(tenant, TenantTotal(1, rows, cpu_usage_ns))

    def _handed_on(self, tenant: str, more: TenantTotal) -> None:
        total = self.tenants.get(tenant)
        if total is None:
            if len(self.tenants) >= MAX_TENANTS:
                tenant = OTHER
            total = self.tenants.setdefault(tenant, TenantTotal())
        total.add(more.batches, more.rows, more.cpu_usage_ns)

    def answered_after(self, seconds: float, items: int) -> None:
        self.latency_counts[bisect_left(LATENCY_BUCKETS_SECONDS, seconds)] += items
        self.latency_sum_seconds += seconds * items
