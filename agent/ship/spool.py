"""The agent's durable queue of batches and its baseline, in one SQLite file.

Strategy. WAL with synchronous=FULL; batches and the baseline they were metered from are written in one
transaction, so a kill or a power cut at any instruction leaves either both or neither. Acknowledgements
are remembered and written with the next commit: losing them costs a DUPLICATE answer, nothing else.

Invariants. Sequence numbers of an epoch have no holes; the last digest is that of the highest one; a batch
once committed is never changed, and only an answer from a collector removes it. A batch that leaves in any other
way leaves a gap that is owed, in the same transaction; the debt ends in the one that commits the batch with the
gap in it.

Failure model. Full disk or I/O error: SpoolUnavailable, nothing changed, try again. Over the size bound:
SpoolFull before anything is written. A corrupt file is set aside under another name, never deleted, and a
new epoch begins (`spool_file`). A batch whose bytes no longer match their digest goes to quarantine, never to a
collector.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from agent.meter.batch import Draft
from agent.meter.usage import Gap
from agent.ship.spool_file import (
    FILE_NAME,
    Opened,
    SpoolCorrupt,
    SpoolError,
    SpoolFull,
    SpoolUnavailable,
    begin_epoch,
    is_damage,
    open_file,
    owe,
    put,
    refusal,
)
from wire.daemon.files import is_read_only
from wire.identity import AgentId, BatchId, digest
from wire.v1 import usage_pb2 as pb

_COLUMNS = "epoch, seq, tenant, rows, interval_end_unix_ns, digest, body"


class Aside(Enum):
    """Why a batch goes to quarantine."""

    DAMAGED = "bytes on disk no longer match their digest"
    CONFLICT = "identity conflict"


_GAP_REASON = {
    Aside.DAMAGED: int(pb.GAP_REASON_SPOOL_LOST),
    Aside.CONFLICT: int(pb.GAP_REASON_CONFLICT),
}


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


class Fill(NamedTuple):
    bytes_used: int
    max_bytes: int
    batches: int
    oldest_interval_end_unix_ns: int | None


class Spool:
    """Thread-safe: one connection, one lock."""

    def __init__(self, directory: Path, agent_id: AgentId, max_bytes: int) -> None:
        self.directory = directory
        self.agent_id = agent_id
        self.opened = Opened.FRESH
        self.set_aside_as: Path | None = None
        self.damage = ""
        """Why a file was set aside, or empty."""
        self._path = directory / FILE_NAME
        self._max_bytes = max_bytes
        self._lock_fd = -1
        self._lock = threading.RLock()
        self._acknowledged: set[BatchKey] = set()
        self._db: sqlite3.Connection
        self._is_open = False
        self._epoch = 0
        self._next_seq = 1
        self._last_digest = b""
        self._bytes = 0
        self._batches = 0

    @classmethod
    def open(cls, directory: Path, agent_id: AgentId, max_bytes: int, now_unix_ns: int) -> Spool:
        """A spool that is taken up already."""
        spool = cls(directory, agent_id, max_bytes)
        try:
            spool.take_up(now_unix_ns)
        except BaseException:
            spool.close()
            raise
        return spool

    def take_up(self, now_unix_ns: int) -> None:
        """Open or create `<directory>/spool.db`, unless it is open. SpoolError names what to do; after
        SpoolUnavailable, try again.
        """
        with self._lock:
            if self._is_open:
                return
            if self._lock_fd < 0:
                self._lock_fd = _locked(self._path)
            self._open_file(now_unix_ns)

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

    def commit(
        self, drafts: Sequence[Draft], baseline: bytes, gaps_told: Collection[int] = ()
    ) -> list[StoredBatch]:
        """Number, seal and store the drafts and move the baseline, all or nothing. `gaps_told` are those of
        `owed_gaps` that the drafts hold: from here on nobody owes them.
        """
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
                db.executemany(
                    f"INSERT INTO batch ({_COLUMNS}, interval_start_unix_ns) VALUES (?,?,?,?,?,?,?,?)",  # noqa: S608
                    [
                        (*batch, draft.interval_start_unix_ns)
                        for batch, draft in zip(stored, drafts, strict=True)
                    ],
                )
                db.executemany("DELETE FROM owed_gap WHERE id = ?", [(told,) for told in gaps_told])
                put(db, "baseline", baseline)
                if stored:
                    put(db, "next_seq", seq)
                    put(db, "last_digest", previous)
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
            self.quarantine(batch.key, Aside.DAMAGED)
        return out

    def owed_gaps(self, at_most: int) -> dict[int, Gap]:
        """The oldest gaps of batches that will not be delivered and that no committed batch tells of, by id."""
        with self._guarded() as db:
            rows = db.execute(
                "SELECT id, start_unix_ns, end_unix_ns, reason, count, detail FROM owed_gap ORDER BY id LIMIT ?",
                (at_most,),
            ).fetchall()
        return {row[0]: Gap(*row[1:]) for row in rows}

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

    def quarantine(self, key: BatchKey, why: Aside) -> None:
        """Take one batch out of the queue without losing it; its gap is owed from here on."""
        detail = f"batch {key.epoch}/{key.seq} is in quarantine on this host: {why.value}"
        with self._lock:
            with self._transaction() as db:
                acknowledged = self._move_aside(db, "epoch = ? AND seq = ?", key, why, detail)
                counted = self._count(db)
            self._batches, self._bytes = counted
            self._acknowledged -= acknowledged

    def open_epoch(
        self, at_least: int, now_unix_ns: int, aside_from: BatchKey | None, baseline: bytes
    ) -> None:
        """Begin a new epoch, later than `at_least`. Batches of the current epoch from `aside_from` on go to
        quarantine in the same transaction, one gap for them is owed, and the re-opened baseline is stored.
        """
        with self._lock:
            epoch = max(self._epoch + 1, at_least + 1, now_unix_ns // 1_000)
            with self._transaction() as db:
                acknowledged: frozenset[BatchKey] = frozenset()
                if aside_from is not None:
                    detail = (
                        f"batches of epoch {aside_from.epoch} from {aside_from.seq} on are in quarantine on this host:"
                        f" {Aside.CONFLICT.value}"
                    )
                    acknowledged = self._move_aside(
                        db, "epoch = ? AND seq >= ?", aside_from, Aside.CONFLICT, detail
                    )
                begin_epoch(db, epoch)
                put(db, "baseline", baseline)
                counted = self._count(db)
            self._epoch, self._next_seq, self._last_digest = epoch, 1, b""
            self._batches, self._bytes = counted
            self._acknowledged -= acknowledged

    def recover(self, now_unix_ns: int, unusable: str = "") -> None:
        """Open the file anew after SpoolCorrupt; `opened` then says whether it had to be set aside, which
        it is in any case if it is `unusable` (the reason). Until this succeeds everything else goes on raising
        SpoolCorrupt.
        """
        with self._lock:
            if self._is_open:
                self._is_open = False
                with contextlib.suppress(sqlite3.Error):
                    self._db.close()
            self._open_file(now_unix_ns, suspect=True, unusable=unusable)

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
            if self._is_open:
                with contextlib.suppress(SpoolError):
                    self.flush()
                self._db.close()
                self._is_open = False
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def _open_file(self, now_unix_ns: int, suspect: bool = False, unusable: str = "") -> None:
        found = open_file(self._path, self.agent_id, now_unix_ns, suspect, unusable)
        try:
            meta = dict(found.db.execute("SELECT key, value FROM meta WHERE key != 'baseline'"))
            counted = self._count(found.db)
        except sqlite3.Error as error:
            found.db.close()
            raise self._named(error) from error
        self._db, self._is_open = found.db, True
        self.opened, self.set_aside_as, self.damage = found.opened, found.set_aside_as, found.damage
        self._epoch, self._next_seq = int(meta["epoch"]), int(meta["next_seq"])
        self._last_digest = bytes(meta["last_digest"])
        self._batches, self._bytes = counted
        self._acknowledged.clear()

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
        self, db: sqlite3.Connection, where: str, key: BatchKey, why: Aside, detail: str
    ) -> frozenset[BatchKey]:
        """Quarantine what a collector has not answered for and owe its gap; returns the answered ones, which
        are deleted.
        """
        acknowledged = frozenset(self._acknowledged)
        self._delete(db, acknowledged)
        db.execute(
            f"INSERT INTO quarantine SELECT epoch, seq, ?, digest, body FROM batch WHERE {where}",  # noqa: S608
            (why.value, *key),
        )
        for start, end, count in db.execute(
            "SELECT min(coalesce(interval_start_unix_ns, interval_end_unix_ns)), max(interval_end_unix_ns),"  # noqa: S608
            f" count(*) FROM batch WHERE {where} GROUP BY epoch",
            key,
        ).fetchall():
            owe(db, Gap(start, end, _GAP_REASON[why], count, detail))
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
            if not self._is_open:
                raise SpoolCorrupt(f"{self._path} is not open")
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
                self._check_writable()
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                raise

    def _check_writable(self) -> None:
        """Before a commit, for after it there is no way back: what is committed is no longer the caller's."""
        try:
            read_only = is_read_only(self._path.parent)
        except OSError as error:
            raise SpoolUnavailable(
                f"{self._path.parent}: {error.strerror}; mount it, or restart the agent"
            ) from error
        if read_only:
            raise SpoolUnavailable(f"{self._path}: its disk is mounted read-only: mount it writable")

    def _named(self, error: sqlite3.Error) -> SpoolError:
        if is_damage(error):
            return SpoolCorrupt(f"{self._path}: {error}")
        return SpoolUnavailable(f"{self._path}: {error}; free space on its disk or mount it writable")


def _locked(path: Path) -> int:
    """The descriptor that keeps other agents away from this spool."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(path.with_name("spool.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise refusal(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise SpoolError(f"{path.parent} is in use by another weighbridge-agent; stop it first") from None
    return fd
