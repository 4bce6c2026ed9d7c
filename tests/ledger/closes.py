"""Closes as the ledger makes them, of batches kept in a list; for tests of manifests."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ledger.periods.calendar import Period
from ledger.periods.chain import billed, late
from ledger.periods.manifest import Account, Adjustment, Manifest, Range, parse
from ledger.periods.streams import Span


class Batch(NamedTuple):
    agent_id: str
    epoch: int
    seq: int
    tenant: str
    start_unix_ns: int
    end_unix_ns: int
    cpu_usage_ns: int = 1

    @property
    def span(self) -> Span:
        return Span(self.agent_id, self.epoch, self.seq, self.seq)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(repr(self).encode()).digest()


def close(
    period: Period, closed: Sequence[Period], documents: Sequence[bytes], booked: Sequence[Batch]
) -> Manifest:
    """The manifest of `period`, with what came late for those that are closed."""
    manifests = [parse(document) for document in documents]
    adjustments = []
    for before in closed:
        part = _part(before, manifests, booked)
        if part[0]:
            adjustments.append(Adjustment(before.name, *part))
    return Manifest(
        period.name,
        hashlib.sha256(documents[-1]).digest() if documents else b"",
        period.end_unix_ns + 3_600_000_000_000,
        "ops",
        *_part(period, manifests, booked),
        adjustments=tuple(adjustments),
    )


def _part(
    period: Period, manifests: Sequence[Manifest], booked: Sequence[Batch]
) -> tuple[tuple[Range, ...], tuple[Account, ...]]:
    inside = {b.span: b for b in booked if period.overlaps(b.start_unix_ns, b.end_unix_ns)}
    spans = late(inside, billed(manifests, period.name))
    taken = [
        inside[Span(s.agent_id, s.epoch, seq, seq)]
        for s in spans
        for seq in range(s.first_seq, s.last_seq + 1)
    ]
    ranges = tuple(
        Range(*s, s.last_seq - s.first_seq + 1, inside[s._replace(first_seq=s.last_seq)].digest)
        for s in spans
    )
    batches = Counter(b.tenant for b in taken)
    accounts = tuple(
        Account(
            tenant,
            batches[tenant],
            batches[tenant],
            {"cpu_usage_ns": sum(b.cpu_usage_ns for b in taken if b.tenant == tenant)},
        )
        for tenant in sorted(batches)
    )
    return ranges, accounts
