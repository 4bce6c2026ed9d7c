"""The two sides of a comparison: what collectors took in to be booked, and what is in the books of a ledger that is down."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ledger.store.client import Store
from wire.log import HANDED_ON, Record, scan
from wire.measures import MAXIMA, MEASURES
from wire.v1 import usage_pb2 as pb

Identity = tuple[str, int, int]
"""agent_id, epoch, seq."""
Sums = dict[str, int]
"""Measure -> amount; of a maximum the greatest."""


@dataclass(slots=True)
class Books:
    """Batches and what they add up to."""

    digests: dict[Identity, bytes] = field(default_factory=dict)
    rows: int = 0
    sums: dict[str, Sums] = field(default_factory=lambda: defaultdict(lambda: dict.fromkeys(MEASURES, 0)))
    """By tenant."""


def accepted(bodies: Iterable[tuple[bytes, bytes]]) -> Books:
    """Of (digest, bytes of a batch), each identity once."""
    books = Books()
    for digest, body in bodies:
        batch = pb.UsageBatch.FromString(body)
        identity = (batch.agent_id, batch.epoch, batch.seq)
        assert books.digests.setdefault(identity, digest) is digest, f"{identity} is there twice"
        books.rows += len(batch.known)
        sums = books.sums[batch.tenant]
        for name in MEASURES:
            column = getattr(batch, name)
            if name in MAXIMA:
                sums[name] = max(sums[name], *column, 0)
            else:
                sums[name] += sum(column)
    return books


def accepted_in_log(directory: Path) -> Books:
    """Of a collector's log: what it accepted or released."""
    records = list(scan(directory))
    assert all(isinstance(record, Record) for record in records)
    return accepted((r.digest, r.body) for r in records if isinstance(r, Record) and r.kind in HANDED_ON)


def booked(state_dir: Path) -> Books:
    """Of the ledger's own tables, rows as they are stored."""
    books = Books()
    for agent, epoch, seq, digest in asked(
        state_dir, "SELECT toString(agent_id), epoch, seq, hex(digest) FROM batches FINAL"
    ):
        identity = (agent, epoch, seq)
        assert identity not in books.digests, f"{identity} is booked twice"
        books.digests[identity] = bytes.fromhex(digest)
    totals = ", ".join(f"max({m})" if m in MAXIMA else f"sum(toUInt128({m}))" for m in MEASURES)
    for tenant, rows, *values in asked(
        state_dir, f"SELECT tenant, count(), {totals} FROM usage_rows GROUP BY tenant"
    ):
        books.rows += rows
        books.sums[tenant] = {name: int(value) for name, value in zip(MEASURES, values, strict=True)}
    return books


def asked(state_dir: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a ledger that does not run."""
    with contextlib.closing(opened(state_dir)) as store:
        return store.query(sql)


def opened(state_dir: Path) -> Store:
    """The tables of a ledger that does not run; to be closed."""
    return Store(state_dir / "db", "", "", "weighbridge", 512 << 20)


def total(lines: Iterable[dict[str, Any]]) -> dict[str, Sums]:
    """Tenant -> measures of lines that `usage` answered, added up. What nobody measured is 0."""
    sums: dict[str, Sums] = defaultdict(lambda: dict.fromkeys(MEASURES, 0))
    for line in lines:
        of_tenant = sums[line["tenant"]]
        for name in MEASURES:
            value = int(line[name] or 0)
            of_tenant[name] = max(of_tenant[name], value) if name in MAXIMA else of_tenant[name] + value
    return sums
