"""The spool: batches and baseline move together, whatever interrupts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.meter.batch import Draft
from agent.ship import export, spool_file
from agent.ship.spool import Aside, BatchKey, Spool
from agent.ship.spool_file import Opened, SpoolCorrupt, SpoolError, SpoolFull, SpoolUnavailable
from wire.identity import AgentId, BatchId, digest
from wire.v1 import usage_pb2 as pb

AGENT = AgentId("11111111-2222-4333-8444-555555555555")
MIB = 1 << 20


def draft(tenant: str = "acme", size: int = 10, end: int = 1_000) -> Draft:
    def seal(identity: BatchId, previous: bytes) -> bytes:
        return pb.UsageBatch(
            agent_id=identity.agent_id,
            epoch=identity.epoch,
            seq=identity.seq,
            previous_digest=previous,
            tenant=tenant,
            host="x" * size,
        ).SerializeToString()

    return Draft(tenant, 1, end - 10, end, seal)


def opened(directory: Path, max_bytes: int = 64 * MIB, now: int | None = None) -> Spool:
    return Spool.open(directory, AGENT, max_bytes, time.time_ns() if now is None else now)


def everything(spool: Spool) -> list[tuple[int, int]]:
    return [(b.epoch, b.seq) for b in spool.pending(None, 1_000_000, 1 << 40)]


def test_batches_are_numbered_chained_and_verbatim(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    first, second = spool.commit([draft("a"), draft("b")], b"one")
    (third,) = spool.commit([draft("c")], b"two")
    assert [b.seq for b in (first, second, third)] == [1, 2, 3]
    assert pb.UsageBatch.FromString(third.body).previous_digest == second.digest == digest(second.body)
    assert pb.UsageBatch.FromString(first.body).previous_digest == b""
    spool.close()
    again = opened(tmp_path)
    assert again.opened is Opened.ADOPTED
    assert again.load_baseline() == b"two"
    assert again.next_seq == 4
    assert [b.body for b in again.pending(None, 9, MIB)] == [first.body, second.body, third.body]
    again.close()


def test_only_an_answer_removes_a_batch(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    batches = spool.commit([draft(), draft(), draft()], b"")
    spool.acknowledge([batches[1].key])
    assert [seq for _, seq in everything(spool)] == [1, 3]
    assert spool.held() == {spool.epoch: 1}
    spool.flush()
    spool.acknowledge([batches[0].key, BatchKey(spool.epoch, 99)])
    spool.close()
    again = opened(tmp_path)
    assert [seq for _, seq in everything(again)] == [3]
    assert again.held() == {again.epoch: 3}
    assert again.fill().batches == 1
    again.close()


def test_a_full_spool_refuses_whole_and_changes_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_bytes=3_000)
    spool.commit([draft(size=2_000)], b"before")
    with pytest.raises(SpoolFull, match="spool.max_bytes"):
        spool.commit([draft(size=10), draft(size=2_000)], b"after")
    assert spool.next_seq == 2
    assert spool.load_baseline() == b"before"
    spool.commit([], b"held")
    assert spool.load_baseline() == b"held"
    spool.acknowledge([BatchKey(spool.epoch, 1)])
    spool.flush()
    assert spool.commit([draft(size=2_000)], b"after")[0].seq == 2
    spool.close()


def test_a_corrupt_file_is_set_aside_and_a_new_epoch_begins(tmp_path: Path) -> None:
    spool = opened(tmp_path, now=1_000_000)
    old = spool.epoch
    spool.commit([draft(size=5_000) for _ in range(20)], b"base")
    spool.close()
    path = tmp_path / "spool.db"
    data = bytearray(path.read_bytes())
    data[4_096:12_000] = os.urandom(12_000 - 4_096)
    path.write_bytes(data)
    again = opened(tmp_path)
    assert again.opened is Opened.SET_ASIDE
    assert again.epoch > old
    assert again.next_seq == 1
    assert again.load_baseline() is None
    assert again.set_aside_as is not None
    assert again.set_aside_as.stat().st_size == len(data)
    again.close()


@pytest.mark.parametrize("size", [0, 1, 100, 4_096, 5_000])
def test_a_file_cut_short_never_stops_the_agent(tmp_path: Path, size: int) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(size=500) for _ in range(30)], b"base")
    spool.close()
    os.truncate(tmp_path / "spool.db", size)
    again = opened(tmp_path)
    assert again.opened is Opened.SET_ASIDE
    assert again.commit([draft()], b"new")[0].seq == 1
    again.close()


def test_after_three_damaged_spools_a_person_must_look(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"spool.corrupt-{n}.db").write_bytes(b"")
    (tmp_path / "spool.db").write_bytes(b"not a database at all" * 400)
    with pytest.raises(SpoolError, match="check the disk"):
        opened(tmp_path)


def test_damage_found_while_running_is_named_and_recovered_from(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(size=3_000) for _ in range(40)], b"base")
    spool.flush()
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spool._db.execute("PRAGMA cache_size = 0")
    size = (tmp_path / "spool.db").stat().st_size
    with (tmp_path / "spool.db").open("r+b") as file:
        file.seek(4_096)
        file.write(os.urandom(size - 4_096))
    with pytest.raises(SpoolCorrupt):
        for _ in range(50):
            spool.pending(None, 1_000, 1 << 30)
            spool.commit([draft(size=3_000)], b"more")
    spool.recover(time.time_ns())
    assert spool.opened is Opened.SET_ASIDE
    assert spool.commit([draft()], b"again")[0].seq == 1
    spool.close()


def test_a_batch_whose_bytes_changed_on_disk_goes_to_quarantine_and_is_never_sent(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft(), draft(), draft()], b"")
    spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = 2")
    assert [seq for _, seq in everything(spool)] == [1, 3]
    assert spool.quarantined() == 1
    spool.close()


def test_the_gap_of_a_batch_set_aside_is_owed_until_the_batch_that_tells_it_is_committed(
    tmp_path: Path,
) -> None:
    spool = opened(tmp_path, max_bytes=3_000)
    spool.commit([draft(end=end) for end in (1_000, 1_010, 1_020)], b"")
    spool._db.execute("UPDATE batch SET body = x'00' WHERE seq = 2")
    everything(spool)
    spool.quarantine(BatchKey(spool.epoch, 3), Aside.CONFLICT)
    _kill(spool)
    spool = opened(tmp_path, max_bytes=3_000)
    owed = spool.owed_gaps(9)
    assert [(g.start_unix_ns, g.end_unix_ns, g.reason, g.count) for g in owed.values()] == [
        (1_000, 1_010, pb.GAP_REASON_SPOOL_LOST, 1),
        (1_010, 1_020, pb.GAP_REASON_CONFLICT, 1),
    ]
    assert [f"{spool.epoch}/{n}" in g.detail for n, g in zip((2, 3), owed.values(), strict=True)] == [
        True
    ] * 2
    with pytest.raises(SpoolFull):
        spool.commit([draft(size=5_000)], b"", owed)
    assert spool.owed_gaps(9) == owed
    first = min(owed)
    assert spool.owed_gaps(1) == {first: owed[first]}
    spool.commit([draft()], b"", [first])
    _kill(spool)
    spool = opened(tmp_path)
    assert list(spool.owed_gaps(9)) == [max(owed)]
    spool.close()


def test_a_batch_that_is_not_there_leaves_no_gap_when_it_is_set_aside(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    (stored,) = spool.commit([draft()], b"")
    spool.acknowledge([stored.key])
    spool.quarantine(stored.key, Aside.CONFLICT)
    assert spool.owed_gaps(9) == {}
    assert spool.quarantined() == 0
    spool.close()


def test_a_spool_of_the_first_schema_is_brought_forward_with_all_that_is_in_it(tmp_path: Path) -> None:
    body = b"not looked into"
    with sqlite3.connect(tmp_path / "spool.db") as db:
        db.executescript(_SCHEMA_1)
        meta = {
            "schema_version": 1,
            "agent_id": AGENT,
            "epoch": 7,
            "next_seq": 3,
            "last_digest": digest(body),
        }
        db.executemany("INSERT INTO meta VALUES (?, ?)", [*meta.items(), ("baseline", b"base")])
        for seq in (1, 2):
            db.execute("INSERT INTO batch VALUES (7, ?, 'acme', 1, 500, ?, ?)", (seq, digest(body), body))
    db.close()
    for _ in range(2):
        spool = opened(tmp_path)
        assert spool.opened is Opened.ADOPTED
        assert (spool.epoch, spool.next_seq, spool.load_baseline()) == (7, 3, b"base")
        assert [b.body for b in spool.pending(None, 9, MIB)] == [body] * 2
        _kill(spool)
    spool = opened(tmp_path)
    spool.quarantine(BatchKey(7, 1), Aside.CONFLICT)
    (gap,) = spool.owed_gaps(9).values()
    assert (gap.start_unix_ns, gap.end_unix_ns) == (500, 500)
    assert spool.commit([draft(), draft()], b"")[1].seq == 4
    spool.close()


def test_a_spool_of_a_later_schema_is_left_alone(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool._db.execute("UPDATE meta SET value = 99 WHERE key = 'schema_version'")
    spool.close()
    with pytest.raises(SpoolError, match="install its version"):
        opened(tmp_path)


class _Killed(BaseException):
    """The process ends here."""


def _dies(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the `at`-th change to the directory or statement of SQLite is the last: half of them just
    before it happens, half of them just after.
    """
    left = at

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise _Killed
            result = real(*words, **named)
            left -= 1
            if left == 0:
                raise _Killed
            return result

        return call

    for name in ("link", "rename", "replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    monkeypatch.setattr(spool_file, "put", deadly(spool_file.put))
    monkeypatch.setattr(spool_file, "owe", deadly(spool_file.owe))
    monkeypatch.setattr(sqlite3, "connect", deadly(sqlite3.connect))


@pytest.mark.parametrize("running", [False, True])
def test_a_kill_at_any_step_of_setting_a_spool_aside_loses_neither_the_file_nor_its_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    steps = 0
    killed = True
    while killed:
        steps += 1
        directory = tmp_path / str(steps)
        directory.mkdir()
        spool = opened(directory if running else tmp_path / "source", now=5_000_000 + steps)
        old = spool.epoch
        spool.commit([draft(size=5_000, end=700 + n) for n in range(20)], b"base")
        if not running:
            # As SIGKILL leaves it: the batches are in the write-ahead log.
            for name in ("spool.db", "spool.db-wal"):
                shutil.copy(tmp_path / "source" / name, directory)
            spool.close()
            shutil.rmtree(tmp_path / "source")
        with monkeypatch.context() as patch:
            _dies(steps, patch)
            patch.setattr(spool_file, "_adopt", _damaged)
            with contextlib.suppress(_Killed):
                if running:
                    spool.recover(time.time_ns())
                else:
                    spool = opened(directory)
                killed = False
        with contextlib.suppress(sqlite3.Error, OSError):
            _kill(spool)
        with monkeypatch.context() as patch:
            if not list(directory.glob("spool.corrupt-*.db")):
                patch.setattr(spool_file, "_adopt", _damaged)
            spool = opened(directory)
        (kept_as,) = directory.glob("spool.corrupt-*.db")
        with contextlib.closing(sqlite3.connect(kept_as)) as db:
            assert db.execute("SELECT count(*) FROM batch").fetchone() == (20,)
        assert spool.epoch > old
        assert spool.load_baseline() is None
        (gap,) = spool.owed_gaps(9).values()
        assert gap.reason == pb.GAP_REASON_SPOOL_LOST
        assert kept_as.name in gap.detail
        assert gap.start_unix_ns == 690
        assert {p.name for p in directory.glob("spool.db*")} <= {"spool.db", "spool.db-wal", "spool.db-shm"}
        spool.close()
    assert steps > 15, "hardly a step was interrupted"


def _damaged(path: Path, _agent_id: AgentId, _suspect: bool) -> sqlite3.Connection:
    raise SpoolCorrupt(f"{path}: as if")


def _kill(spool: Spool) -> None:
    """As SIGKILL leaves it: nothing remembered is written, the lock falls with the process."""
    spool._db.close()
    os.close(spool._lock_fd)


_SCHEMA_1 = """
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


def test_a_conflict_sets_batches_aside_in_the_step_that_opens_the_epoch(tmp_path: Path) -> None:
    spool = opened(tmp_path, now=5_000)
    old = spool.epoch
    spool.commit([draft(), draft(), draft()], b"")
    spool.open_epoch(old + 10, 5_000, BatchKey(old, 2), b"reopened")
    assert spool.epoch > old + 10
    assert everything(spool) == [(old, 1)]
    assert spool.quarantined() == 2
    (gap,) = spool.owed_gaps(9).values()
    assert (gap.reason, gap.count, gap.start_unix_ns, gap.end_unix_ns) == (
        pb.GAP_REASON_CONFLICT,
        2,
        990,
        1_000,
    )
    assert spool.held() == {old: 1, spool.epoch: 1}
    assert spool.commit([draft()], b"")[0].seq == 1
    spool.close()


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(SpoolError, match="in use by another"):
        opened(tmp_path)
    spool.close()


def test_undelivered_batches_of_another_agent_are_not_taken_over(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.commit([draft()], b"")
    spool.close()
    other = AgentId("99999999-2222-4333-8444-555555555555")
    with pytest.raises(SpoolError, match=f"token create --agent-id {AGENT}"):
        Spool.open(tmp_path, other, MIB, time.time_ns())


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="state_dir"):
        opened(tmp_path / "file" / "spool")


@pytest.mark.root
def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        spool = opened(disk)
        spool.commit([draft(size=100)], b"before")
        with pytest.raises(OSError, match="space"), (disk / "filler").open("wb") as filler:
            while True:
                filler.write(b"\0" * 4_096)
                filler.flush()
        with pytest.raises(SpoolUnavailable, match="free space"):
            spool.commit([draft(size=200_000)], b"after")
        assert spool.load_baseline() == b"before"
        assert everything(spool) == [(spool.epoch, 1)]
        (disk / "filler").unlink()
        assert spool.commit([draft(size=200_000)], b"after")[0].seq == 2
        spool.close()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(SpoolError, match="writable for this user"):
            opened(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_kill_nine_at_any_moment_leaves_batches_and_baseline_in_step(tmp_path: Path) -> None:
    """A child commits and acknowledges as fast as it can; what it leaves must always fit together."""
    child = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        from tests.agent.test_spool import draft, opened
        spool = opened(Path({str(tmp_path)!r}))
        n = int(spool.load_baseline() or b"0")
        print("up", flush=True)
        while True:
            n += 1
            stored = spool.commit([draft(str(n)), draft(str(n))], str(n).encode())
            if n % 3 == 0:
                spool.acknowledge([stored[0].key, stored[1].key])
            if n % 7 == 0:
                spool.flush()
        """
    )
    last = 0
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        time.sleep(0.02 * (attempt % 5) + 0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        spool = opened(tmp_path)
        committed = int(spool.load_baseline() or b"0")
        assert committed >= last
        assert spool.next_seq == 2 * committed + 1
        assert spool.opened is not Opened.SET_ASIDE
        for batch in spool.pending(None, 1_000_000, 1 << 40):
            # Batch k was made by commit (k + 1) // 2, and its tenant says which commit made it.
            assert batch.tenant == str((batch.seq + 1) // 2)
        spool.close()
        last = committed
    assert last > 20, "the child hardly ran: nothing was tested"
    assert export.verify(tmp_path).damaged == []


def test_an_export_reads_back_as_it_was(tmp_path: Path) -> None:
    spool = opened(tmp_path / "a")
    stored = spool.commit([draft(size=n * 40) for n in range(20)], b"")
    with (tmp_path / "out").open("wb") as out:
        assert export.export(tmp_path / "a", out) == 20
    with (tmp_path / "out").open("rb") as source:
        assert list(export.read_export(source)) == [b.body for b in stored]
    data = (tmp_path / "out").read_bytes()
    for cut in (1, 5, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(SpoolError), (tmp_path / "cut").open("rb") as source:
            list(export.read_export(source))
    verdict = export.verify(tmp_path / "a")
    assert verdict.sound
    assert verdict.batches == 20
    spool._db.execute("DELETE FROM batch WHERE seq = 5")
    spool._db.execute("UPDATE batch SET digest = x'00' WHERE seq = 9")
    verdict = export.verify(tmp_path / "a")
    assert not verdict.sound
    assert verdict.missing == [f"{spool.epoch}/5..5"]
    assert f"{spool.epoch}/9" in verdict.damaged
    spool.close()


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
        import tempfile

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
            _kill(self.spool)
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
