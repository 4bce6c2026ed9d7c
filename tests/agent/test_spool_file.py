"""The spool as a file: damaged, of another schema, another agent's, on a disk that refuses."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.ship import spool_file
from agent.ship.spool import Aside, BatchKey, Spool
from agent.ship.spool_file import Opened, SpoolCorrupt, SpoolError, SpoolUnavailable
from tests.agent.test_spool import AGENT, MIB, draft, kill, opened
from wire.identity import AgentId, digest
from wire.v1 import usage_pb2 as pb


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
        kill(spool)
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
            kill(spool)
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
def test_a_read_only_disk_is_named_and_may_be_writable_later(mounted: Callable[[str], Path]) -> None:
    disk = mounted("ro,size=1m")
    with pytest.raises(SpoolUnavailable, match="read-only: mount it writable"):
        opened(disk)
