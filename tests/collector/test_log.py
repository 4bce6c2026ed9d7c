"""The durable log: what was reported durable is there, whatever was cut, flipped or full."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.handoff.log import (
    Damage,
    DamagedLog,
    DurableLog,
    Kind,
    LogError,
    Record,
    frame,
    repair,
    scan,
    segments,
)
from wire.identity import digest

AGENT = bytes(range(16))
SEGMENT, FREE = 1 << 20, 0


def record(seq: int, body: bytes, kind: Kind = Kind.ACCEPTED, note: bytes = b"") -> list[bytes]:
    return list(frame(kind, seq, AGENT, 7, seq, digest(body), note, body))


def append(log: DurableLog, pieces: list[bytes]) -> int | None:
    done = threading.Event()
    result: list[int | None] = []

    def finished(end: int | None) -> None:
        result.append(end)
        done.set()

    log.append(pieces, finished)
    assert done.wait(20)
    return result[0]


def written(directory: Path, bodies: list[bytes], segment: int = SEGMENT) -> list[int]:
    """Offsets behind each record."""
    log = DurableLog(directory, segment, FREE)
    ends = [append(log, record(seq, body)) for seq, body in enumerate(bodies, 1)]
    log.close()
    assert all(end is not None for end in ends)
    return [end for end in ends if end is not None]


def bodies_of(directory: Path) -> list[bytes]:
    return [r.body for r in scan(directory) if isinstance(r, Record)]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    first = append(log, record(1, b"one") + record(2, b"two", Kind.REJECTED, b"REASON_X because"))
    second = append(log, [])
    third = append(log, record(3, b"", Kind.ADOPTED))
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
    assert len(ends) == 199
    assert ends == sorted(set(ends), key=lambda e: e or 0)
    assert ends[-1] == sum((tmp_path / f"{base:020d}.log").stat().st_size for base in segments(tmp_path))


def test_a_log_torn_at_any_byte_keeps_every_whole_record_and_goes_on(tmp_path: Path) -> None:
    bodies = [b"first", b"second" * 20, b"third"]
    ends = written(tmp_path / "whole", bodies)
    data = (tmp_path / "whole" / f"{0:020d}.log").read_bytes()
    for cut in range(len(data) + 1):
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        (directory / f"{0:020d}.log").write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        log = DurableLog(directory, SEGMENT, FREE)
        assert log.end == ([0, *ends][whole])
        assert log.torn_bytes == cut - log.end
        append(log, record(9, b"after"))
        log.close()
        assert bodies_of(directory) == [*bodies[:whole], b"after"]


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60)
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, flip: int) -> None:
    directory = tmp_path_factory.mktemp("flip")
    bodies = [os.urandom(120) for _ in range(5)]
    written(directory, bodies)
    path = directory / f"{0:020d}.log"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    found = list(scan(directory))
    good = [r.body for r in found if isinstance(r, Record)]
    assert len(good) == 4
    assert all(body in bodies for body in good)
    last = at % len(data) >= len(data) * 4 // 5
    assert any(isinstance(r, Damage) for r in found) or last


def test_damage_in_the_middle_stops_the_start_and_repair_keeps_what_is_good(tmp_path: Path) -> None:
    bodies = [bytes([n]) * 200 for n in range(6)]
    ends = written(tmp_path, bodies)
    path = tmp_path / f"{0:020d}.log"
    data = bytearray(path.read_bytes())
    data[ends[1] + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedLog, match="log repair"):
        DurableLog(tmp_path, SEGMENT, FREE)
    (told,) = repair(tmp_path)
    assert "1 damaged" in told
    assert path.with_suffix(".log.damaged").read_bytes() == bytes(data)
    log = DurableLog(tmp_path, SEGMENT, FREE)
    assert log.end == ends[-1]
    log.close()
    kinds = [r.kind for r in scan(tmp_path) if isinstance(r, Record)]
    assert kinds == [Kind.ACCEPTED] * 2 + [Kind.REFUSED] + [Kind.ACCEPTED] * 3


def test_segments_follow_one_another_without_a_hole(tmp_path: Path) -> None:
    bodies = [os.urandom(3_000) for _ in range(40)]
    ends = written(tmp_path, bodies, segment=10_000)
    assert len(segments(tmp_path)) > 5
    assert bodies_of(tmp_path) == bodies
    middle = segments(tmp_path)[2]
    assert next(r.offset for r in scan(tmp_path, middle)) == middle
    log = DurableLog(tmp_path, 10_000, FREE)
    assert log.end == ends[-1]
    log.close()
    (tmp_path / f"{segments(tmp_path)[2]:020d}.log").unlink()
    assert any(isinstance(r, Damage) for r in scan(tmp_path))


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
def test_a_full_disk_is_said_nothing_is_claimed_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        log = DurableLog(disk, 64 << 20, FREE)
        assert append(log, record(1, b"a" * 1_000)) is not None
        filler = disk / "filler"
        filler.write_bytes(b"\0" * 800_000)
        assert append(log, record(2, b"b" * 400_000)) is None
        assert "space" in log.trouble or "free" in log.trouble
        assert append(log, record(3, b"c" * 400_000)) is None
        filler.unlink()
        assert append(log, record(4, b"d" * 400_000)) is not None
        assert log.trouble == ""
        log.close()
        assert [r.seq for r in scan(disk) if isinstance(r, Record)] == [1, 4]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(LogError, match="Read-only"):
            DurableLog(disk, SEGMENT, FREE)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_free_space_is_refused_before_it_is_used_up(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, 1 << 60)
    assert append(log, record(1, b"a")) is None
    assert "log.min_free" in log.trouble
    log.close()
    assert bodies_of(tmp_path) == []
