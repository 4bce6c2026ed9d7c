"""The durable log: what was reported durable is there and comes back as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from collector.handoff.log import Damage, DurableLog, Kind, LogError, Record, repair, scan, segments
from tests.collector.logs import FREE, SEGMENT, bodies_of, record, written
from tests.waiting import until
from wire.log.records import HEADER_BYTES


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    first = log.append_and_wait(record(1, b"one") + record(2, b"two", Kind.REJECTED, b"REASON_X because"))
    second = log.append_and_wait([])
    third = log.append_and_wait(record(3, b"", Kind.ADOPTED))
    log.close()
    assert first is not None
    assert second == first
    assert third is not None
    assert third > first
    found = [r for r in scan(tmp_path) if isinstance(r, Record)]
    assert [(r.seq, r.kind, r.note, r.body) for r in found] == [
        (1, Kind.ACCEPTED, b"", b"one"),
        (2, Kind.REJECTED, b"REASON_X because", b"two"),
        (3, Kind.ADOPTED, b"", b""),
    ]
    assert [r.seq for r in scan(tmp_path, first) if isinstance(r, Record)] == [3]


def test_many_groups_share_a_sync_and_each_learns_its_own_end(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    ends: list[int | None] = []
    for seq in range(1, 200):
        log.append(record(seq, b"x" * seq), ends.append)
    log.close()
    assert ends == [r.end for r in scan(tmp_path) if isinstance(r, Record)]
    assert len(ends) == 199


def test_segments_follow_one_another_without_a_hole(tmp_path: Path) -> None:
    bodies = [os.urandom(3_000) for _ in range(40)]
    ends = written(tmp_path, [[body] for body in bodies], segment=10_000)
    assert len(segments(tmp_path)) > 5
    assert bodies_of(tmp_path) == bodies
    middle = segments(tmp_path)[2]
    assert next(r.offset for r in scan(tmp_path, middle)) == middle + HEADER_BYTES
    log = DurableLog(tmp_path, 10_000, FREE)
    assert log.end == ends[-1] + HEADER_BYTES, "the last group and the seal behind it"
    log.close()
    (tmp_path / f"{middle:020d}.log").unlink()
    assert any(isinstance(r, Damage) for r in scan(tmp_path))


def test_a_log_that_rests_does_not_grow_with_its_starts(tmp_path: Path) -> None:
    written(tmp_path, [[b"one"]])
    for _ in range(3):
        log = DurableLog(tmp_path, SEGMENT, FREE)
        end = log.end
        log.close()
        assert log.end == end


def test_a_start_syncs_what_a_killed_writer_left_before_anybody_is_told_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [[b"one"]])
    synced: list[int] = []
    sync = os.fdatasync

    def watched(fd: int) -> None:
        sync(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", watched)
    log = DurableLog(tmp_path, SEGMENT, FREE)
    assert synced == [log.end]
    log.close()


def test_one_collector_at_a_time(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    with pytest.raises(LogError, match="in use by another collector"):
        DurableLog(tmp_path, SEGMENT, FREE)
    with pytest.raises(LogError, match="stop it first"):
        repair(tmp_path)
    log.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match=r"log\.directory"):
        DurableLog(tmp_path / "file" / "log", SEGMENT, FREE)


@pytest.mark.root
def test_a_full_disk_is_said_nothing_is_claimed_and_it_goes_on_when_there_is_room(
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=1m")
    log = DurableLog(disk, 64 << 20, FREE)
    assert log.append_and_wait(record(1, b"a" * 1_000)) is not None
    filler = disk / "filler"
    filler.write_bytes(b"\0" * 800_000)
    assert log.append_and_wait(record(2, b"b" * 400_000)) is None
    assert "space" in log.trouble or "free" in log.trouble
    assert log.append_and_wait(record(3, b"c" * 400_000)) is None
    filler.unlink()
    assert log.append_and_wait(record(4, b"d" * 400_000)) is not None
    assert log.trouble == ""
    log.close()
    assert [r.seq for r in scan(disk) if isinstance(r, Record)] == [1, 4]


@pytest.mark.root
def test_a_log_that_nobody_writes_to_says_that_its_disk_is_full_and_that_it_is_not_any_more(
    mounted: Callable[[str], Path],
) -> None:
    disk = mounted("size=1m")
    log = DurableLog(disk, 64 << 20, 64 << 10)
    assert log.append_and_wait(record(1, b"a" * 1_000)) is not None
    assert log.refusal == ""
    filler = disk / "filler"
    filler.write_bytes(b"\0" * 1_000_000)
    assert "log.min_free" in log.refusal
    assert log.append_and_wait(record(2, b"b" * 100_000)) is None
    filler.unlink()
    until(lambda: not log.refusal)
    assert log.append_and_wait(record(3, b"c" * 1_000)) is not None
    log.close()
    assert [r.seq for r in scan(disk) if isinstance(r, Record)] == [1, 3]


@pytest.mark.root
def test_a_read_only_disk_is_named(mounted: Callable[[str], Path]) -> None:
    with pytest.raises(LogError, match="Read-only"):
        DurableLog(mounted("ro,size=1m"), SEGMENT, FREE)


def test_what_an_emergency_remount_made_read_only_is_refused_though_every_write_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for sysrq u, which is for all disks of a host; tests/acceptance has it in a machine."""
    log = DurableLog(tmp_path, SEGMENT, FREE)
    with monkeypatch.context() as remounted:
        remounted.setattr("collector.handoff.log.writer.is_read_only", lambda _: True)
        assert "Read-only" in log.refusal, "before anybody writes"
        assert log.append_and_wait(record(1, b"a")) is None
        assert "Read-only" in log.refusal
    until(lambda: not log.refusal)
    assert log.append_and_wait(record(2, b"b")) is not None
    log.close()
    assert bodies_of(tmp_path) == [b"b"]


def test_too_little_free_space_is_refused_before_it_is_used_up(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, 1 << 60)
    assert log.append_and_wait(record(1, b"a")) is None
    assert "log.min_free" in log.trouble
    log.close()
    assert bodies_of(tmp_path) == []


def test_a_write_that_does_not_come_back_is_seen_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    assert log.busy_seconds == 0
    writing, goes_on = threading.Event(), threading.Event()
    really = os.fdatasync

    def hanging(fd: int) -> None:
        writing.set()
        goes_on.wait(60)
        really(fd)

    monkeypatch.setattr(os, "fdatasync", hanging)
    log.append(record(1, b"one"), lambda end: None)
    assert writing.wait(60)
    assert log.busy_seconds > 0
    goes_on.set()
    log.close()
    assert log.busy_seconds == 0
