"""Checkpoint of what the log says: streams, queues of parked batches, and the offset up to which they tell the story.

Only an optimisation: the log is the truth, and at start what lies behind the offset is replayed from it.
A checkpoint holds only what is durable in the log, so it can be behind, never ahead. Only the balances of the
token buckets are nowhere else; without them a bucket starts full, or empty where something waits.

A log that is pruned tells the story from its new beginning on, so it is pruned only up to `needed_from`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from collector.decide.admission import Changes, Parked, SavedBucket
from collector.decide.dedup import StreamState, pack_ahead, unpack_ahead
from collector.errors import CollectorError
from wire.identity import AgentId

CHECKPOINT_FILE = "streams.db"

StreamKey = tuple[AgentId, int]
"""(agent_id, epoch)"""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS stream (
    agent_id TEXT NOT NULL, epoch INTEGER NOT NULL, watermark INTEGER NOT NULL,
    last_digest BLOB NOT NULL, ring BLOB NOT NULL, ahead BLOB NOT NULL, PRIMARY KEY (agent_id, epoch)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parked (
    at INTEGER PRIMARY KEY, tenant TEXT NOT NULL, size INTEGER NOT NULL, weight INTEGER NOT NULL,
    since_unix_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS bucket (
    tenant TEXT PRIMARY KEY, balance INTEGER NOT NULL, remainder INTEGER NOT NULL, at_unix_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), log_end INTEGER NOT NULL);
"""
_BUCKET_LIFE_NS = 30 * 86_400 * 1_000_000_000
"""Of a tenant that was not heard of: by then its bucket is full."""


class Checkpoint:
    """One owner. Its threads may save and prune at the same time; they wait for each other."""

    def __init__(self, path: Path) -> None:
        self._writing = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.OperationalError) as error:
            raise CollectorError(f"{path}: {error}; make its directory writable for this user") from error
        except sqlite3.DatabaseError as error:
            raise CollectorError(
                f"{path}: {error}; it only speeds up the start: move it away and the log is read instead"
            ) from error

    def load(self) -> tuple[int, Iterator[tuple[StreamKey, StreamState]]]:
        """(log offset covered, streams)."""
        return self.log_end(), self._streams()

    def log_end(self) -> int:
        """Log offset covered: everything before it was durable when it was written down here."""
        row = self._db.execute("SELECT log_end FROM position").fetchone()
        return int(row[0]) if row else 0

    def _streams(self) -> Iterator[tuple[StreamKey, StreamState]]:
        for agent_id, epoch, watermark, last, ring, ahead in self._db.execute("SELECT * FROM stream"):
            yield (AgentId(agent_id), epoch), StreamState(watermark, last, ring, unpack_ahead(ahead))

    def buckets(self) -> Iterator[SavedBucket]:
        yield from map(SavedBucket._make, self._db.execute("SELECT * FROM bucket"))

    def parked(self) -> Iterator[tuple[str, Parked]]:
        """(tenant, batch), oldest first."""
        for at, tenant, size, weight, since_unix_ns in self._db.execute("SELECT * FROM parked ORDER BY at"):
            yield tenant, Parked(at, size, weight, since_unix_ns)

    def needed_from(self) -> int:
        """Log offset from which on the log is needed beside this checkpoint, which is durable when this returns: where the
        oldest parked batch lies, or behind all that is covered. 0 while another process holds the file.
        """
        with self._writing:
            (oldest_parked,) = self._db.execute("SELECT min(at) FROM parked").fetchone()
            covered = self.log_end()
            # Commits alone do not wait for the disk.
            (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            return 0
        return covered if oldest_parked is None else min(covered, oldest_parked)

    def begins(self, log_begin: int) -> None:
        """The log begins here. What was parked before has been released, or it would not have been deleted."""
        self._db.execute("DELETE FROM parked WHERE at < ?", (log_begin,))

    def clear(self) -> None:
        """It tells of another log."""
        self._db.executescript(
            "BEGIN; DELETE FROM stream; DELETE FROM parked; DELETE FROM bucket; DELETE FROM position; COMMIT"
        )

    def save(
        self,
        log_end: int,
        streams: Iterable[tuple[StreamKey, StreamState]],
        admission: Changes,
        now_unix_ns: int,
    ) -> None:
        """Store what changed and the log offset it covers, all or nothing."""
        with self._writing, self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO stream VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (key[0], key[1], s.watermark, s.last_digest, s.ring, pack_ahead(s.ahead))
                    for key, s in streams
                ),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO parked VALUES (?, ?, ?, ?, ?)",
                (
                    (batch.offset, tenant, batch.size, batch.weight, batch.since_unix_ns)
                    for tenant, batch in admission.added.values()
                ),
            )
            self._db.executemany("DELETE FROM parked WHERE at = ?", ((at,) for at in admission.removed))
            self._db.executemany("INSERT OR REPLACE INTO bucket VALUES (?, ?, ?, ?)", admission.buckets)
            self._db.execute("DELETE FROM bucket WHERE at_unix_ns < ?", (now_unix_ns - _BUCKET_LIFE_NS,))
            self._db.execute("INSERT OR REPLACE INTO position VALUES (1, ?)", (log_end,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._db.close()
