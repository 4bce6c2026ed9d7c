"""What is complete: which sequence numbers are booked, what arrived and is not, which hosts are gone.

The first two are read from the tables once, at start; from then on the intake keeps them up. So a look costs what streams
there are, and not what was ever booked.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from ledger.book.booking import VERDICT_COLUMNS, Verdict
from ledger.book.held import HELD_KINDS, HeldBack
from ledger.book.streams import BookedRun, StreamId, Streams
from ledger.periods.streams import Held, HeldKind, Run, Stream
from ledger.store.client import Store, now_ns

# Runs of consecutive numbers have seq - its rank in common (gaps and islands). An identity that is there twice is one.
_RUNS = """
    SELECT toString(agent_id), epoch, min(seq), max(seq), min(start), min(first_end), max(last_start), max(end)
    FROM (
        SELECT *, seq - row_number() OVER (PARTITION BY agent_id, epoch ORDER BY seq) AS island
        FROM (
            SELECT agent_id, epoch, seq, min(interval_start_ns) AS start, min(interval_end_ns) AS first_end,
                max(interval_start_ns) AS last_start, max(interval_end_ns) AS end
            FROM batches GROUP BY agent_id, epoch, seq
        )
    )
    GROUP BY agent_id, epoch, island
    ORDER BY agent_id, epoch, min(seq)"""
# Of verdicts, so that this is bounded by what there is of those.
_BOOKED_VERDICTS = """
    SELECT agent_id, epoch, seq FROM batches
    WHERE (agent_id, epoch, seq) IN (SELECT agent_id, epoch, seq FROM verdicts)"""
_HELD = f"""
    SELECT toString(agent_id), epoch, seq, hex(digest), kind, tenant, interval_start_ns, interval_end_ns, received_at_ns, reason
    FROM verdicts FINAL
    WHERE kind IN {HELD_KINDS} AND (kind = 'conflict' OR (agent_id, epoch, seq) NOT IN ({_BOOKED_VERDICTS}))"""


def booked_streams(store: Store) -> Streams:
    """What is booked, by the table. StoreTrouble."""
    return Streams(
        (StreamId(agent, epoch), [BookedRun(*row[2:]) for row in rows])
        for (agent, epoch), rows in groupby(store.query(_RUNS), key=lambda row: (row[0], row[1]))
    )


def held_back(store: Store) -> HeldBack:
    """What arrived and is not booked, by the tables. StoreTrouble."""
    assert Verdict._fields == VERDICT_COLUMNS
    return HeldBack(
        Verdict(agent, epoch, seq, bytes.fromhex(digest), *rest)
        for agent, epoch, seq, digest, *rest in store.query(_HELD)
    )


class Retirement(NamedTuple):
    """Somebody's word that a host is gone."""

    at_unix_ns: int
    reason: str
    by: str


class Completeness:
    """Asks; `retire` alone writes. StoreTrouble from whatever asks the store."""

    def __init__(self, store: Store, streams: Streams, held: HeldBack) -> None:
        """`streams`, `held`: what the intake keeps up."""
        self._store = store
        self._streams = streams
        self._held = held

    def streams(self) -> list[Stream]:
        """All of them, ascending."""
        return [
            Stream(agent, epoch, tuple(Run(*run) for run in runs))
            for (agent, epoch), runs in sorted(self._streams, key=lambda found: found[0])
        ]

    def held(self) -> list[Held]:
        """What arrived and is not booked."""
        return [
            Held(
                HeldKind(v.kind),
                *(v.agent_id, v.epoch, v.seq, v.tenant),
                v.interval_start_ns if v.interval_end_ns else None,
                v.interval_end_ns or None,
                v.reason,
            )
            for v in self._held
        ]

    def retirements(self) -> dict[str, Retirement]:
        """By agent."""
        return {
            agent: Retirement(at, reason, by)
            for agent, at, reason, by in self._store.query(
                "SELECT toString(agent_id), retired_at_ns, reason, retired_by FROM retirements FINAL"
            )
        }

    def retired(self) -> dict[str, int]:
        """Agent -> Unix ns from which on nothing more is waited for."""
        return {agent: retirement.at_unix_ns for agent, retirement in self.retirements().items()}

    def retire(self, agent_id: str, at_ns: int, reason: str, by: str) -> None:
        self._store.insert(
            "retirements",
            ("agent_id", "retired_at_ns", "reason", "retired_by", "written_at_ns"),
            [(agent_id, at_ns, reason, by, now_ns())],
        )


class Hop(NamedTuple):
    """One tenant at one hop. Batches, and their rows where they are known."""

    tenant: str
    booked: int
    rows: int
    parked: int
    rejected: int
    refused: int
    conflicts: int


def hops(store: Store) -> list[Hop]:
    """By tenant: what is booked, and what arrived and is not."""
    booked = {
        tenant: (count, rows)
        for tenant, count, rows in store.query(
            "SELECT tenant, count(), sum(length(units.known)) FROM batches FINAL GROUP BY tenant"
        )
    }
    others = {
        tenant: counts
        for tenant, *counts in store.query(f"""
            SELECT tenant, countIf(kind = 'parked' AND NOT is_booked), countIf(kind = 'rejected' AND NOT is_booked),
                countIf(kind = 'refused' AND NOT is_booked), countIf(kind = 'conflict')
            FROM (
                SELECT *, (agent_id, epoch, seq) IN ({_BOOKED_VERDICTS}) AS is_booked
                FROM verdicts FINAL
            )
            GROUP BY tenant""")
    }
    return [
        Hop(tenant, *booked.get(tenant, (0, 0)), *others.get(tenant, (0, 0, 0, 0)))
        for tenant in sorted(set(booked) | set(others))
    ]
