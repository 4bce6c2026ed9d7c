"""The spool against a model, with a disk that refuses at any statement."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.ship.spool import Aside, BatchKey, Spool
from agent.ship.spool_file import Opened, SpoolFull, SpoolUnavailable
from tests.agent.test_spool import draft, everything, kill, opened
from wire.v1 import usage_pb2 as pb


class _PowerCut(sqlite3.OperationalError):
    pass


class _Failing:
    """A connection whose n-th statement fails, like a disk that goes away in the middle of a transaction."""

    def __init__(self, real: sqlite3.Connection, at: int) -> None:
        self._real, self._left = real, at

    def execute(self, sql: str, *more: object) -> object:
        if not sql.startswith("ROLLBACK"):
            self._left -= 1
            if self._left < 0:
                raise _PowerCut("disk I/O error")
        return self._real.execute(sql, *more)  # type: ignore[arg-type]

    def executemany(self, sql: str, rows: object) -> object:
        self.execute("SELECT 1")
        return self._real.executemany(sql, rows)  # type: ignore[arg-type]

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def close(self) -> None:
        self._real.close()


@contextlib.contextmanager
def failing(spool: Spool, at: int | None) -> Iterator[None]:
    """The spool's statement number `at` and all behind it fail; none if it is None."""
    real = spool._db
    if at is not None:
        spool._db = _Failing(real, at)  # type: ignore[assignment]
    try:
        yield
    finally:
        spool._db = real
        if real.in_transaction:
            real.execute("ROLLBACK")


class SpoolMachine(RuleBasedStateMachine):
    """The spool against a model; every transaction may fail at every statement, and every step may be the last."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name)
        self.now = 1_000_000
        self.spool = opened(self.directory, max_bytes=20_000, now=self.now)
        self.kept: dict[BatchKey, bytes] = {}
        self.answered: set[BatchKey] = set()
        self.baseline: bytes | None = None
        self.counter = 0
        self.owed: list[tuple[int, int]] = []
        """(reason, count) of the gaps that no batch tells of."""

    @rule(count=st.integers(0, 4), size=st.integers(0, 4_000), fails_at=st.none() | st.integers(0, 8))
    def commit(self, count: int, size: int, fails_at: int | None) -> None:
        self.counter += 1
        blob = str(self.counter).encode()
        telling = self.spool.owed_gaps(count)
        try:
            with failing(self.spool, fails_at):
                stored = self.spool.commit([draft(size=size) for _ in range(count)], blob, telling)
        except SpoolUnavailable:
            assert fails_at is not None
        except SpoolFull:
            assert count
        else:
            self.kept |= {b.key: b.body for b in stored}
            self.owed = self.owed[len(telling) :]
            self.baseline = blob
            self._forget_answered()

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        waiting = sorted(set(self.kept) - self.answered)
        if waiting:
            keys = data.draw(st.lists(st.sampled_from(waiting), max_size=5))
            self.spool.acknowledge(keys)
            self.answered.update(keys)

    @rule(fails_at=st.none() | st.integers(0, 6))
    def flush(self, fails_at: int | None) -> None:
        try:
            with failing(self.spool, fails_at):
                self.spool.flush()
        except SpoolUnavailable:
            assert fails_at is not None
        else:
            self._forget_answered()

    @rule(aside=st.booleans(), fails_at=st.none() | st.integers(0, 8))
    def open_epoch(self, aside: bool, fails_at: int | None) -> None:
        old = self.spool.epoch
        from_seq = max(1, self.spool.next_seq - 2)
        try:
            with failing(self.spool, fails_at):
                self.spool.open_epoch(old, self.now, BatchKey(old, from_seq) if aside else None, b"reopened")
        except SpoolUnavailable:
            assert self.spool.epoch == old
        else:
            assert self.spool.epoch > old
            assert self.spool.next_seq == 1
            self.baseline = b"reopened"
            if aside:
                self._forget_answered()
                gone = {k for k in self.kept if k.epoch == old and k.seq >= from_seq}
                if gone:
                    self.owed.append((pb.GAP_REASON_CONFLICT, len(gone)))
                self.kept = {k: v for k, v in self.kept.items() if k not in gone}

    @rule(data=st.data(), fails_at=st.none() | st.integers(0, 8))
    def quarantine(self, data: st.DataObject, fails_at: int | None) -> None:
        if not self.kept:
            return
        key = data.draw(st.sampled_from(sorted(self.kept)))
        try:
            with failing(self.spool, fails_at):
                self.spool.quarantine(key, Aside.CONFLICT)
        except SpoolUnavailable:
            assert fails_at is not None
        else:
            self._forget_answered()
            if self.kept.pop(key, None) is not None:
                self.owed.append((pb.GAP_REASON_CONFLICT, 1))

    @rule(data=st.data(), fails_at=st.none() | st.integers(0, 10))
    def a_batch_rots_on_disk(self, data: st.DataObject, fails_at: int | None) -> None:
        waiting = sorted(set(self.kept) - self.answered)
        if not waiting:
            return
        key = data.draw(st.sampled_from(waiting))
        self.spool._db.execute(
            "UPDATE batch SET body = zeroblob(length(body)) WHERE (epoch, seq) = (?, ?)", key
        )
        try:
            with failing(self.spool, fails_at):
                found = everything(self.spool)
        except SpoolUnavailable:
            assert fails_at is not None
        else:
            assert key not in found
        # Where the disk refused, the next look finds it again.
        everything(self.spool)
        self._forget_answered()
        del self.kept[key]
        self.owed.append((pb.GAP_REASON_SPOOL_LOST, 1))

    @rule(running=st.booleans())
    def the_file_is_damaged(self, running: bool) -> None:
        for earlier in self.directory.glob("spool.corrupt-*"):
            earlier.unlink()
        self.now += 1_000_000
        before = self.spool.epoch
        # What is still in the log would heal the file when the connection is closed.
        self.spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if not running:
            self.spool.close()
        (self.directory / "spool.db").write_bytes(b"no database" * 900)
        if running:
            self.spool.recover(self.now)
        else:
            self.spool = opened(self.directory, max_bytes=20_000, now=self.now)
        assert self.spool.opened is Opened.SET_ASIDE
        assert self.spool.epoch != before
        self.kept, self.answered, self.baseline = {}, set(), None
        self.owed = [(pb.GAP_REASON_SPOOL_LOST, 0)]

    @rule(graceful=st.booleans())
    def restart(self, graceful: bool) -> None:
        if graceful:
            self.spool.close()
            self._forget_answered()
        else:
            kill(self.spool)
            self.answered.clear()
        before = self.spool.epoch, self.spool.next_seq, self.spool.last_digest
        self.spool = opened(self.directory, max_bytes=20_000, now=self.now)
        assert (self.spool.epoch, self.spool.next_seq, self.spool.last_digest) == before

    def _forget_answered(self) -> None:
        self.kept = {k: v for k, v in self.kept.items() if k not in self.answered}
        self.answered.clear()

    @invariant()
    def nothing_is_lost_and_nothing_is_there_twice(self) -> None:
        if not hasattr(self, "spool"):
            return
        found = {b.key: b.body for b in self.spool.pending(None, 1_000_000, 1 << 40)}
        assert found == {k: v for k, v in self.kept.items() if k not in self.answered}
        assert self.spool.load_baseline() == self.baseline
        assert [(g.reason, g.count) for g in self.spool.owed_gaps(1_000).values()] == self.owed
        assert self.spool.fill().batches == len(found)
        assert self.spool.fill().bytes_used == sum(map(len, self.kept.values()))

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.spool.close()
            self.folder.cleanup()


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
