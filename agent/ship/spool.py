"""The agent's durable queue of batches and its baseline, in one SQLite file.

Strategy. WAL with synchronous=FULL; batches and the baseline they were metered from are written in one
transaction, so a kill or a power cut at any instruction leaves either both or neither. Acknowledgements
are remembered and written with the next commit: losing them costs a DUPLICATE answer, nothing else.

Invariants. Sequence numbers of an epoch have no holes; the last digest is that of the highest one; a batch
once committed is never changed, and only an answer from a collector removes it.

Failure model. Full disk or I/O error: SpoolUnavailable, nothing changed, try again. Over the size bound:
SpoolFull before anything is written. A corrupt file is set aside under another name, never deleted, and a
new epoch begins. A batch whose bytes no longer match their digest goes to quarantine, never to a collector.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from agent.errors import AgentError
from agent.meter.batch import Draft
from wire.identity import AgentId, BatchId, digest

SCHEMA_VERSION = 1
FILE_NAME = "spool.db"
MAX_SET_ASIDE = 3
QUICK_CHECK_BELOW_BYTES = 64 << 20
"""A larger spool is not checked as a whole at start, since metering must begin; its batches carry digests."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE batch (
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, tenant TEXT NOT NULL, rows INTEGER NOT NULL,
    interval_end_unix_ns INTEGER NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (epoch, seq)
);
CREATE TABLE quarantine (
    epoch INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL
);
"""
_COLUMNS = "epoch, seq, tenant, rows, interval_end_unix_ns, digest, body"


class SpoolError(AgentError):
    """The spool cannot be used; the message names the fix."""


class SpoolUnavailable(SpoolError):
    """The disk refused for now. Nothing was changed; try again."""


class SpoolFull(SpoolError):
    """The batches would pass the size bound. Nothing was changed."""


class SpoolCorrupt(SpoolError):
    """The file is damaged: `Spool.open` anew sets it aside and begins a new epoch."""


class BatchKey(NamedTuple):
    epoch: int
    seq: int


class StoredBatch(NamedTuple):
    epoch: int
    seq: int
    tenant: str
    rows: int
    interval_end_unix_ns: int
    digest: bytes
    body: bytes

    @property
    def key(self) -> BatchKey:
        return BatchKey(self.epoch, self.seq)


class Opened(Enum):
    """How the spool was found."""

    FRESH = "fresh"
    ADOPTED = "adopted"
    SET_ASIDE = "set_aside"


class Fill(NamedTuple):
    bytes_used: int
    max_bytes: int
    batches: int
    oldest_interval_end_unix_ns: int | None


class Spool:
    """Thread-safe: one connection, one lock."""

    def __init__(self, directory: Path, agent_id: AgentId, max_bytes: int, lock_fd: int) -> None:
        self.directory = directory
        self.agent_id = agent_id
        self.opened = Opened.FRESH
        self.set_aside_as: Path | None = None
        self._damaged: list[StoredBatch] = []
        self._max_bytes = max_bytes
        self._lock_fd = lock_fd
        self._lock = threading.RLock()
        self._acknowledged: set[BatchKey] = set()
        self._db: sqlite3.Connection
        self._epoch = 0
        self._next_seq = 1
        self._last_digest = b""
        self._bytes = 0
        self._batches = 0

    @classmethod
    def open(cls, directory: Path, agent_id: AgentId, max_bytes: int, now_unix_ns: int) -> Spool:
        """Open or create `<directory>/spool.db` for this agent. SpoolError names what to do."""
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            lock_fd = os.open(directory / "spool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise SpoolError(
                f"spool directory {directory}: {error.strerror}; make it a directory this user may write,"
                " or set `state_dir` to one"
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock_fd)
            raise SpoolError(f"{directory} is in use by another weighbridge-agent; stop it first") from None
        spool = cls(directory, agent_id, max_bytes, lock_fd)
        try:
            spool._open_file(now_unix_ns)
        except BaseException:
            os.close(lock_fd)
            raise
        return spool

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def next_seq(self) -> int:
        return self._next_seq

    @property
    def last_digest(self) -> bytes:
        return self._last_digest

    def load_baseline(self) -> bytes | None:
        with self._guarded() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'baseline'").fetchone()
        return None if row is None else bytes(row[0])

    def commit(self, drafts: Sequence[Draft], baseline: bytes) -> list[StoredBatch]:
        """Number, seal and store the drafts and move the baseline, all or nothing."""
        with self._lock:
            seq, previous = self._next_seq, self._last_digest
            stored = []
            for draft in drafts:
                body = draft.seal(BatchId(self.agent_id, self._epoch, seq), previous)
                previous = digest(body)
                stored.append(
                    StoredBatch(
                        self._epoch, seq, draft.tenant, draft.rows, draft.interval_end_unix_ns, previous, body
                    )
                )
                seq += 1
            size = sum(len(batch.body) for batch in stored)
            if stored and self._bytes + size > self._max_bytes:
                raise SpoolFull(
                    f"spool holds {self._bytes} of {self._max_bytes} bytes: raise `spool.max_bytes` or see why"
                    " the collector does not take batches"
                )
            acknowledged = frozenset(self._acknowledged)
            with self._transaction() as db:
                db.executemany(f"INSERT INTO batch ({_COLUMNS}) VALUES (?,?,?,?,?,?,?)", stored)  # noqa: S608
                self._put(db, "baseline", baseline)
                if stored:
                    self._put(db, "next_seq", seq)
                    self._put(db, "last_digest", previous)
                gone, freed = self._delete(db, acknowledged)
            self._next_seq, self._last_digest = seq, previous
            self._settle(acknowledged, size - freed, len(stored) - gone)
        return stored

    def pending(self, after: BatchKey | None, max_batches: int, max_bytes: int) -> list[StoredBatch]:
        """The oldest batches behind `after` that nobody has acknowledged, each verified against its digest."""
        out: list[StoredBatch] = []
        size = 0
        epoch, seq = after or (-1, 0)
        damaged = []
        with self._guarded() as db:
            cursor = db.execute(
                f"SELECT {_COLUMNS} FROM batch WHERE (epoch, seq) > (?, ?) ORDER BY epoch, seq",  # noqa: S608
                (epoch, seq),
            )
            for row in cursor:
                batch = StoredBatch(*row)
                if batch.key in self._acknowledged:
                    continue
                if digest(batch.body) != batch.digest:
                    damaged.append(batch)  # never sent: a collector would refuse it for ever
                    continue
                if out and (len(out) >= max_batches or size + len(batch.body) > max_bytes):
                    break
                out.append(batch)
                size += len(batch.body)
            cursor.close()
        for batch in damaged:
            self.quarantine(batch.key, "bytes on disk no longer match their digest")
            self._damaged.append(batch)
        return out

    def take_damaged(self) -> list[StoredBatch]:
        """Batches found damaged on disk and quarantined since the last call; whoever meters writes gaps."""
        with self._lock:
            damaged, self._damaged = self._damaged, []
        return damaged

    def held(self) -> dict[int, int]:
        """Epoch -> oldest sequence number still held; the current epoch's is `next_seq` if none is."""
        out: dict[int, int] = {}
        with self._guarded() as db:
            for epoch, seq in db.execute("SELECT epoch, seq FROM batch ORDER BY epoch, seq"):
                if epoch not in out and BatchKey(epoch, seq) not in self._acknowledged:
                    out[epoch] = seq
            out.setdefault(self._epoch, self._next_seq)
        return out

    def acknowledge(self, keys: Iterable[BatchKey]) -> None:
        """Remember answers; `flush` or the next commit makes them durable."""
        with self._lock:
            self._acknowledged.update(keys)

    def flush(self) -> None:
        """Make remembered acknowledgements durable."""
        with self._lock:
            acknowledged = frozenset(self._acknowledged)
            if not acknowledged:
                return
            with self._transaction() as db:
                gone, freed = self._delete(db, acknowledged)
            self._settle(acknowledged, -freed, -gone)

    def quarantine(self, key: BatchKey, reason: str) -> None:
        """Take one batch out of the queue without losing it."""
        with self._lock:
            with self._transaction() as db:
                acknowledged = self._move_aside(db, "epoch = ? AND seq = ?", key, reason)
                counted = self._count(db)
            self._batches, self._bytes = counted
            self._acknowledged -= acknowledged

    def open_epoch(
        self, at_least: int, now_unix_ns: int, aside_from: BatchKey | None, baseline: bytes
    ) -> None:
        """Begin a new epoch, later than `at_least`. Batches of the current epoch from `aside_from` on go to
        quarantine in the same transaction, and the re-opened baseline is stored.
        """
        with self._lock:
            epoch = max(self._epoch + 1, at_least + 1, now_unix_ns // 1_000)
            with self._transaction() as db:
                acknowledged: frozenset[BatchKey] = frozenset()
                if aside_from is not None:
                    acknowledged = self._move_aside(
                        db, "epoch = ? AND seq >= ?", aside_from, "identity conflict"
                    )
                self._begin_epoch(db, epoch)
                self._put(db, "baseline", baseline)
                counted = self._count(db)
            self._epoch, self._next_seq, self._last_digest = epoch, 1, b""
            self._batches, self._bytes = counted
            self._acknowledged -= acknowledged

    def recover(self, now_unix_ns: int) -> None:
        """Open the file anew after SpoolCorrupt; `opened` then says whether it had to be set aside."""
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._acknowledged.clear()
            self._epoch, self._next_seq, self._last_digest = 0, 1, b""
            self._bytes = self._batches = 0
            self.set_aside_as = None
            self._open_file(now_unix_ns)

    def fill(self) -> Fill:
        oldest = None
        with self._guarded() as db:
            for epoch, seq, end in db.execute(
                "SELECT epoch, seq, interval_end_unix_ns FROM batch ORDER BY epoch, seq"
            ):
                if BatchKey(epoch, seq) not in self._acknowledged:
                    oldest = end
                    break
        return Fill(self._bytes, self._max_bytes, self._batches - len(self._acknowledged), oldest)

    def quarantined(self) -> int:
        with self._guarded() as db:
            return int(db.execute("SELECT count(*) FROM quarantine").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            with contextlib.suppress(SpoolError):
                self.flush()
            self._db.close()
            os.close(self._lock_fd)

    # What follows is the file itself.

    def _open_file(self, now_unix_ns: int) -> None:
        path = self.directory / FILE_NAME
        existed = path.exists()
        try:
            self._db = _connect(path)
            if existed:
                self._adopt()
                self.opened = Opened.ADOPTED
                return
        except (SpoolCorrupt, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.DatabaseError) and not is_damage(error):
                raise SpoolError(f"{path}: {error}; free the disk or make the directory writable") from error
            with contextlib.suppress(AttributeError, sqlite3.Error):
                self._db.close()
            self.set_aside_as = _set_aside(path, now_unix_ns)
            self.opened = Opened.SET_ASIDE
            self._db = _connect(path)
        try:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
            self._put(self._db, "schema_version", SCHEMA_VERSION)
            self._put(self._db, "agent_id", self.agent_id)
            self._epoch = now_unix_ns // 1_000
            self._begin_epoch(self._db, self._epoch)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise SpoolError(f"{path}: {error}; free the disk or make the directory writable") from error

    def _adopt(self) -> None:
        db = self._db
        path = self.directory / FILE_NAME
        if path.stat().st_size <= QUICK_CHECK_BELOW_BYTES:
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict is None or verdict[0] != "ok":
                raise SpoolCorrupt(f"{path}: {verdict}")
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key != 'baseline'"))
        try:
            version, owner = int(meta["schema_version"]), str(meta["agent_id"])
            self._epoch, self._next_seq = int(meta["epoch"]), int(meta["next_seq"])
            self._last_digest = bytes(meta["last_digest"])
        except (KeyError, ValueError, TypeError) as error:
            raise SpoolCorrupt(f"{path}: no usable header ({error!r})") from error
        if version != SCHEMA_VERSION:
            raise SpoolError(
                f"{path} is of schema {version}, this agent knows {SCHEMA_VERSION}: install its version"
            )
        self._batches, self._bytes = self._count(db)
        if owner != self.agent_id:
            if self._batches:
                raise SpoolError(
                    f"{path} holds {self._batches} undelivered batches of agent {owner}, this one is {self.agent_id}."
                    f" Enrol again as that agent (weighbridge-collector token create --agent-id {owner}),"
                    f" or move the file away after `weighbridge-agent spool export`"
                )
            raise SpoolCorrupt(f"{path} belongs to agent {owner}")

    def _begin_epoch(self, db: sqlite3.Connection, epoch: int) -> None:
        for key, value in (("epoch", epoch), ("next_seq", 1), ("last_digest", b"")):
            self._put(db, key, value)

    @staticmethod
    def _put(db: sqlite3.Connection, key: str, value: int | str | bytes) -> None:
        db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def _delete(self, db: sqlite3.Connection, keys: Iterable[BatchKey]) -> tuple[int, int]:
        """(batches, bytes) that were there and are gone."""
        gone = freed = 0
        for key in keys:
            for (size,) in db.execute(
                "DELETE FROM batch WHERE epoch = ? AND seq = ? RETURNING length(body)", key
            ).fetchall():
                gone, freed = gone + 1, freed + size
        return gone, freed

    def _move_aside(
        self, db: sqlite3.Connection, where: str, key: BatchKey, reason: str
    ) -> frozenset[BatchKey]:
        """Quarantine what a collector has not answered for; returns the answered ones, which are deleted."""
        acknowledged = frozenset(self._acknowledged)
        self._delete(db, acknowledged)
        db.execute(
            f"INSERT INTO quarantine SELECT epoch, seq, ?, digest, body FROM batch WHERE {where}",  # noqa: S608
            (reason, *key),
        )
        db.execute(f"DELETE FROM batch WHERE {where}", key)  # noqa: S608
        return acknowledged

    def _settle(self, acknowledged: frozenset[BatchKey], size: int, stored: int) -> None:
        self._acknowledged -= acknowledged
        self._bytes += size
        self._batches += stored

    @staticmethod
    def _count(db: sqlite3.Connection) -> tuple[int, int]:
        """(batches, bytes) in the table."""
        row = db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM batch").fetchone()
        return int(row[0]), int(row[1])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._named(error) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guarded() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                raise

    def _named(self, error: sqlite3.Error) -> SpoolError:
        path = self.directory / FILE_NAME
        if is_damage(error):
            return SpoolCorrupt(f"{path}: {error}")
        return SpoolUnavailable(f"{path}: {error}; free space on its disk or mount it writable")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is wrong, rather than the disk unwilling. SQLITE_ERROR is SQL that the file's
    schema does not know, since ours is fixed.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA journal_size_limit = 16777216")
    db.execute("PRAGMA cache_size = -4096")
    return db


def _set_aside(path: Path, now_unix_ns: int) -> Path:
    """Rename a damaged spool and its WAL. At most MAX_SET_ASIDE are kept before a person must look."""
    earlier = sorted(path.parent.glob("spool.corrupt-*.db"))
    if len(earlier) >= MAX_SET_ASIDE:
        raise SpoolError(
            f"{len(earlier)} damaged spools lie in {path.parent} already: check the disk, move them away, start again"
        )
    aside = path.parent / f"spool.corrupt-{now_unix_ns}.db"
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    os.rename(path, aside)
    return aside
