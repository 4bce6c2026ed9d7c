"""What is booked of a period: which batches, as ranges, and their sums by tenant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ledger.periods.calendar import Period
from ledger.periods.manifest import Account, Range
from ledger.periods.spans import subtract
from ledger.periods.streams import Span
from ledger.proof.chain import booked_twice
from ledger.proof.finding import Finding
from ledger.rollup.parts import parts, sums
from ledger.store.client import Store
from wire.identity import is_agent_id
from wire.measures import MEASURES


class PeriodBooks:
    def __init__(self, store: Store) -> None:
        self._store = store

    def ranges(
        self, period: Period, spans: Sequence[Span] | None = None, booked: Sequence[Span] = ()
    ) -> list[Range]:
        """As many batches in each as follow one another. Of these spans only, if given: as for `accounts`."""
        only = None if spans is None else _only(spans, booked)
        found = self._store.query(f"""
            SELECT toString(agent_id), epoch, min(seq), max(seq), count(), argMax(hex(digest), seq)
            FROM (
                SELECT agent_id, epoch, seq, digest,
                    seq - row_number() OVER (PARTITION BY agent_id, epoch ORDER BY seq) AS island
                FROM (
                    SELECT agent_id, epoch, seq, min(digest) AS digest FROM batches WHERE {_within(period, only)}
                    GROUP BY agent_id, epoch, seq
                )
            )
            GROUP BY agent_id, epoch, island ORDER BY agent_id, epoch, min(seq)""")
        return [
            Range(agent, epoch, first, last, batches, bytes.fromhex(digest))
            for agent, epoch, first, last, batches, digest in found
        ]

    def accounts(
        self, period: Period, spans: Sequence[Span] | None = None, booked: Sequence[Span] = ()
    ) -> list[Account]:
        """By tenant. Of these spans only, if given: of the period's spans in `booked`, which have to contain them."""
        start, end = period.start_unix_ns, period.end_unix_ns
        only = None if spans is None else _only(spans, booked)
        values = {
            tenant: dict(zip(MEASURES, found, strict=True))
            for tenant, *found in self._store.query(
                f"SELECT tenant, {sums()} FROM ({parts(start, end, None, only or '')}) GROUP BY tenant"
            )
        }
        return [
            Account(tenant, batches, rows, {m: int(v) for m, v in values.get(tenant, {}).items() if v})
            for tenant, batches, rows in self._store.query(
                "SELECT tenant, count(), sum(length(units.known)) FROM batches FINAL"
                f" WHERE {_within(period, only)} GROUP BY tenant ORDER BY tenant"
            )
        ]

    def booked_twice(self, period: Period) -> list[Finding]:
        """Identities with two digests."""
        return booked_twice(self._store, _within(period, None))


def _within(period: Period, only: str | None) -> str:
    overlaps = f"interval_end_ns > {period.start_unix_ns} AND interval_start_ns < {period.end_unix_ns}"
    return overlaps if only is None else f"{overlaps} AND ({only})"


def _only(spans: Sequence[Span], booked: Sequence[Span]) -> str:
    """A condition that of `booked` holds for `spans`, which are among them. ClickHouse keeps each batch that it names in
    memory: so it names the fewer, those or the others. Most often a manifest bills everything, and there are none."""
    others = subtract(booked, spans)
    if _batches(others) < _batches(spans):
        return f"NOT ({_among(others)})"
    return _among(spans)


def _batches(spans: Iterable[Span]) -> int:
    return sum(span.last_seq - span.first_seq + 1 for span in spans)


def _among(spans: Sequence[Span]) -> str:
    if not spans:
        return "false"
    assert all(is_agent_id(span.agent_id) for span in spans)
    listed = ", ".join(f"('{s.agent_id}', {s.epoch}, {s.first_seq}, {s.last_seq})" for s in spans)
    return (
        "(agent_id, epoch, seq) IN (SELECT toUUID(s.1), toUInt64(s.2), arrayJoin(range(toUInt64(s.3), toUInt64(s.4) + 1))"
        f" FROM (SELECT arrayJoin([{listed}]) AS s))"
    )
