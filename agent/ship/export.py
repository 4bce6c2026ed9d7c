"""The spool for people: list, export, verify, while the daemon runs. Reads only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import msgspec
from google.protobuf.message import DecodeError

from agent.ship.spool import StoredBatch
from agent.ship.spool_file import FILE_NAME, SpoolError, is_damage
from wire.delimited import delimit, delimited
from wire.identity import digest
from wire.v1 import usage_pb2 as pb

MAX_GROUPS = 1_000
"""Of a summary: epochs times tenants."""


class Verdict(msgspec.Struct):
    """What `spool verify` found. `sound` sums it up."""

    batches: int = 0
    rows: int = 0
    damaged: list[str] = []
    missing: list[str] = []
    chain_breaks: list[str] = []
    quarantined: int = 0

    @property
    def sound(self) -> bool:
        return not (self.damaged or self.missing or self.chain_breaks)


def batches(directory: Path) -> Iterator[StoredBatch]:
    """Every batch in (epoch, seq) order. SpoolError when there is no readable spool."""
    with closing(_read_only(directory)) as db:
        try:
            for row in db.execute(
                "SELECT epoch, seq, tenant, rows, interval_end_unix_ns, digest, body FROM batch ORDER BY epoch, seq"
            ):
                yield StoredBatch(*row)
        except sqlite3.DatabaseError as error:
            raise SpoolError(
                f"{directory / FILE_NAME}: {error}; the agent sets a damaged spool aside at start"
            ) from error


def verify(directory: Path) -> Verdict:
    """Digests, contiguity and chain of all that waits."""
    verdict = Verdict()
    last: StoredBatch | None = None
    for batch in batches(directory):
        name = f"{batch.epoch}/{batch.seq}"
        verdict.batches += 1
        verdict.rows += batch.rows
        if digest(batch.body) != batch.digest:
            verdict.damaged.append(name)
        try:
            previous = pb.UsageBatch.FromString(batch.body).previous_digest
        except DecodeError:
            verdict.damaged.append(name)
            continue
        if last is not None and last.epoch == batch.epoch:
            if batch.seq != last.seq + 1:
                verdict.missing.append(f"{batch.epoch}/{last.seq + 1}..{batch.seq - 1}")
            elif previous != last.digest:
                verdict.chain_breaks.append(name)
        last = batch
    with closing(_read_only(directory)) as db:
        verdict.quarantined = int(db.execute("SELECT count(*) FROM quarantine").fetchone()[0])
    return verdict


def summary(directory: Path) -> dict[str, list[dict[str, object]]]:
    """What waits, by epoch and tenant, and what is in quarantine, by reason: numbers and bounds, no usage."""
    groups = {
        "batches": "SELECT epoch, tenant, count(*) AS batches, min(seq) AS first_seq, max(seq) AS last_seq,"
        " sum(length(body)) AS bytes, min(interval_end_unix_ns) AS first_end_unix_ns,"
        " max(interval_end_unix_ns) AS last_end_unix_ns FROM batch GROUP BY epoch, tenant",
        "quarantine": "SELECT epoch, reason, count(*) AS batches, min(seq) AS first_seq, max(seq) AS last_seq"
        " FROM quarantine GROUP BY epoch, reason",
    }
    with closing(_read_only(directory)) as db:
        db.row_factory = sqlite3.Row
        return {
            name: [dict(row) for row in db.execute(f"{query} LIMIT {MAX_GROUPS}")]
            for name, query in groups.items()
        }


def export(directory: Path, out: BinaryIO) -> int:
    """Write all batches, each behind its length as a varint (protobuf's delimited form). Returns how many."""
    count = 0
    for batch in batches(directory):
        out.write(delimit(batch.body))
        count += 1
    return count


def read_export(source: BinaryIO) -> Iterator[bytes]:
    """The batches of an export. SpoolError at the first byte that is not one."""
    for index, found in enumerate(delimited(source)):
        if found.trouble:
            raise SpoolError(f"batch {index}: {found.trouble}; is this a whole file of `spool export`?")
        yield found.body


def _read_only(directory: Path) -> sqlite3.Connection:
    path = directory / FILE_NAME
    if not path.exists():
        raise SpoolError(
            f"no spool at {path}: name the agent's directory with --state-dir, or start the agent"
        )
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        db.execute("SELECT 1 FROM meta").fetchone()
    except sqlite3.Error as error:
        fix = (
            "start the agent, which sets a damaged spool aside"
            if is_damage(error)
            else "run as a user who may read it"
        )
        raise SpoolError(f"{path}: {error}; {fix}") from error
    return db
