"""What a power cut, a kill and bit rot leave of the log, and what the next start makes of it.

A torn write of a group nobody was answered for is cut off by itself; bytes that were synced are never cut.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.handoff.log import (
    Damage,
    DamagedLog,
    DurableLog,
    Record,
    repair,
    scan,
    segments,
    unfinished_bytes,
    writer,
)
from tests.collector.logs import FIRST, FREE, SEGMENT, bodies_of, record, written
from tests.waiting import until
from wire.log.records import HEADER_BYTES, mark

PAGE = 4_096

groups_of_bodies = st.lists(
    st.lists(st.integers(0, 3 * PAGE), min_size=1, max_size=4), min_size=2, max_size=5
).map(
    lambda groups: [
        [bytes([1 + (group + at) % 255]) * size for at, size in enumerate(sizes)]
        for group, sizes in enumerate(groups)
    ]
)


class Disk:
    """A log whose last group was written and never synced."""

    def __init__(self, directory: Path, groups: list[list[bytes]]) -> None:
        self.groups = groups
        ends = written(directory, groups)
        self.synced, self.end = ends[-2:]
        self.whole = (directory / FIRST).read_bytes()[: self.end]
        self.directory = directory

    @property
    def acknowledged(self) -> list[bytes]:
        return [body for group in self.groups[:-1] for body in group]

    def power_cut(self, data: st.DataObject) -> tuple[bytearray, bool]:
        """Any pages of the last write, in a file of any length; and whether the mark of that write is whole."""
        pages = range(self.synced // PAGE, (self.end - 1) // PAGE + 1)
        kept = data.draw(st.sets(st.sampled_from(pages)), label="pages kept")
        size = data.draw(st.integers(self.synced, self.end), label="size")
        left = bytearray(self.whole[: self.synced]).ljust(self.end, b"\0")
        for page in kept:
            part = slice(max(self.synced, page * PAGE), min(self.end, (page + 1) * PAGE))
            left[part] = self.whole[part]
        mark_at = slice(self.synced, self.synced + HEADER_BYTES)
        return left[:size], left[:size][mark_at] == self.whole[mark_at]

    def write(self, left: bytes) -> None:
        (self.directory / FIRST).write_bytes(left)


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torn")


def fresh(somewhere: Path) -> Path:
    shutil.rmtree(somewhere / "log", ignore_errors=True)
    return somewhere / "log"


@given(groups_of_bodies, st.data())
def test_whatever_pages_a_power_cut_kept_of_the_last_write_the_start_keeps_all_that_was_acknowledged(
    somewhere: Path, groups: list[list[bytes]], data: st.DataObject
) -> None:
    disk = Disk(fresh(somewhere), groups)
    left, _ = disk.power_cut(data)
    disk.write(left)
    assert [r for r in scan(disk.directory) if isinstance(r, Damage)] == []
    unfinished = unfinished_bytes(disk.directory)
    log = DurableLog(disk.directory, SEGMENT, FREE, synced_end=disk.synced)
    assert log.torn_bytes == unfinished == len(left) - log.end
    if log.torn_bytes:
        assert (disk.directory / f"{log.end:020d}.torn").read_bytes() == left[log.end :]
    assert log.append_and_wait(record(99, b"after")) is not None
    log.close()
    last = groups[-1]
    kept = bodies_of(disk.directory)
    assert kept[-1] == b"after"
    assert kept[:-1] in [disk.acknowledged + last[:n] for n in range(len(last) + 1)]
    assert readable(disk.directory)


def readable(directory: Path) -> bool:
    return unfinished_bytes(directory) == 0 and all(isinstance(r, Record) for r in scan(directory))


@given(groups_of_bodies, st.data())
def test_a_bit_that_flipped_before_the_last_proof_stops_the_start_and_repair_keeps_every_other_record(
    somewhere: Path, groups: list[list[bytes]], data: st.DataObject
) -> None:
    disk = Disk(fresh(somewhere), groups)
    left, marked = disk.power_cut(data)
    at = data.draw(st.integers(0, disk.synced - 1), label="flipped")
    left[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    disk.write(left)
    # The mark of the torn group proves what is before it; where the tear took it, the checkpoint does.
    synced_end = 0 if marked else disk.synced
    with pytest.raises(DamagedLog, match="inside what had been synced"):
        DurableLog(disk.directory, SEGMENT, FREE, synced_end)
    assert (disk.directory / FIRST).read_bytes() == left
    assert not list(disk.directory.glob("*.torn"))
    (told,) = repair(disk.directory)
    assert "replaced by fillers" in told
    assert (disk.directory / f"{FIRST}.damaged").read_bytes() == left
    log = DurableLog(disk.directory, SEGMENT, FREE, synced_end)
    assert log.end >= disk.synced, "repair cuts nothing off"
    log.close()
    assert readable(disk.directory)
    acknowledged = disk.acknowledged
    kept = [r for r in scan(disk.directory) if isinstance(r, Record) and r.epoch == 7]
    found = {r.seq: r.body for r in kept if r.seq <= len(acknowledged)}
    assert len(found) >= len(acknowledged) - 1
    assert all(body == acknowledged[seq - 1] for seq, body in found.items())


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_log_that_rests_is_proven_to_its_last_record(somewhere: Path, at: int, flip: int) -> None:
    directory = fresh(somewhere)
    bodies = [bytes([n]) * 120 for n in range(5)]
    end = written(directory, [[body] for body in bodies])[-1]
    path = directory / FIRST
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= flip
    path.write_bytes(data)
    if at >= end:
        # Only the seal itself is hit: nothing that anybody was told about.
        log = DurableLog(directory, SEGMENT, FREE)
        assert log.end == end
        log.close()
        assert bodies_of(directory) == bodies
    else:
        assert any(isinstance(r, Damage) for r in scan(directory))
        assert len(bodies_of(directory)) >= 4
        with pytest.raises(DamagedLog):
            DurableLog(directory, SEGMENT, FREE)


def test_a_log_torn_at_any_byte_keeps_every_whole_record_and_goes_on(tmp_path: Path) -> None:
    bodies = [b"first", b"second" * 20, b"third"]
    ends = written(tmp_path / "whole", [[body] for body in bodies])
    data = (tmp_path / "whole" / FIRST).read_bytes()
    for cut in range(len(data) + 1):
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        (directory / FIRST).write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        log = DurableLog(directory, SEGMENT, FREE)
        assert log.end in ([0, *ends][whole], [0, *ends][whole] + HEADER_BYTES)
        assert log.torn_bytes == cut - log.end
        log.append_and_wait(record(9, b"after"))
        log.close()
        assert bodies_of(directory) == [*bodies[:whole], b"after"]


def test_the_last_group_of_a_running_collector_is_proven_once_nothing_more_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SEAL_AFTER_SECONDS", 0.05)
    log = DurableLog(tmp_path / "running", SEGMENT, FREE)
    end = log.append_and_wait(record(1, b"acknowledged"))
    until(lambda: log.end != end)
    (tmp_path / "cut").mkdir()
    data = bytearray((tmp_path / "running" / FIRST).read_bytes())
    log.close()
    data[end - 1 if end else 0] ^= 1
    (tmp_path / "cut" / FIRST).write_bytes(data)
    with pytest.raises(DamagedLog):
        DurableLog(tmp_path / "cut", SEGMENT, FREE)


def test_what_looks_like_a_mark_inside_a_torn_batch_proves_nothing(tmp_path: Path) -> None:
    forged = b"x" * PAGE + mark(0) + mark(12_345) + b"".join(record(1, b"forged"))
    disk = Disk(tmp_path, [[b"acknowledged"], [forged, b"behind"]])
    left = bytearray(disk.whole)
    left[disk.synced + 2 * HEADER_BYTES + 10] ^= 1
    disk.write(left)
    log = DurableLog(tmp_path, SEGMENT, FREE)
    assert log.torn_bytes > PAGE
    log.close()
    assert bodies_of(tmp_path) == [b"acknowledged"]


def test_a_reader_takes_an_unfinished_group_for_not_there_yet_and_not_for_damage(tmp_path: Path) -> None:
    disk = Disk(tmp_path, [[b"a" * 500], [b"b" * 500, b"c" * 500]])
    left = bytearray(disk.whole)
    left[disk.synced + 2 * HEADER_BYTES] = 0
    disk.write(left)
    assert unfinished_bytes(tmp_path) == disk.end - disk.synced - HEADER_BYTES
    assert [r.body for r in scan(tmp_path) if isinstance(r, Record)] == [b"a" * 500, b"c" * 500]
    assert not any(isinstance(r, Damage) for r in scan(tmp_path))


def test_copies_of_torn_tails_are_kept_within_a_bound(tmp_path: Path) -> None:
    for n in range(writer.KEPT_TORN_TAILS + 3):
        written(tmp_path, [[b"%d" % n]])
        with (tmp_path / FIRST).open("ab") as file:
            file.write(b"torn %d" % n)
    DurableLog(tmp_path, SEGMENT, FREE).close()
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("*.torn"))]
    assert kept == [b"torn %d" % n for n in range(3, writer.KEPT_TORN_TAILS + 3)]


def test_repair_fills_a_hole_larger_than_any_record(tmp_path: Path) -> None:
    bodies = [bytes([n]) * (1 << 20) for n in range(8)]
    ends = written(tmp_path, [[body] for body in bodies], segment=64 << 20)
    path = tmp_path / FIRST
    data = bytearray(path.read_bytes())
    data[ends[0] : ends[6]] = bytes(ends[6] - ends[0])
    path.write_bytes(data)
    repair(tmp_path)
    assert readable(tmp_path)
    DurableLog(tmp_path, 64 << 20, FREE, synced_end=ends[-1]).close()
    kept = [r.body for r in scan(tmp_path) if isinstance(r, Record) and r.epoch == 7]
    assert kept == [bodies[0], bodies[7]]


def test_repair_closes_the_gap_behind_a_segment_that_was_cut_short(tmp_path: Path) -> None:
    bodies = [bytes([n]) * 3_000 for n in range(12)]
    written(tmp_path, [[body] for body in bodies], segment=10_000)
    base = segments(tmp_path)[1]
    path = tmp_path / f"{base:020d}.log"
    path.write_bytes(path.read_bytes()[:-2_000])
    assert any(isinstance(r, Damage) for r in scan(tmp_path))
    (told,) = repair(tmp_path)
    assert path.name in told
    assert readable(tmp_path)
    assert repair(tmp_path) == []


def test_a_second_repair_keeps_the_original_of_the_first(tmp_path: Path) -> None:
    bodies = [bytes([n]) * 200 for n in range(6)]
    ends = written(tmp_path, [[body] for body in bodies])
    path = tmp_path / FIRST
    for spoiled in (ends[0] + 200, ends[2] + 200):
        data = bytearray(path.read_bytes())
        data[spoiled] ^= 1
        path.write_bytes(data)
        repair(tmp_path)
    assert {p.name for p in tmp_path.glob("*.damaged*")} == {f"{FIRST}.damaged", f"{FIRST}.damaged-2"}
    assert [r.body for r in scan(tmp_path) if isinstance(r, Record) and r.epoch == 7] == [
        bodies[n] for n in (0, 2, 4, 5)
    ]


def test_repair_cuts_nothing_off_behind_what_looks_like_a_record_inside_a_damaged_one(tmp_path: Path) -> None:
    hostile = b"x" * 10 + b"".join(record(1, b"forged")) + b"y" * 20
    written(tmp_path, [[hostile], [b"acknowledged"], [b"as well"]])
    path = tmp_path / FIRST
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 5] ^= 1
    path.write_bytes(data)
    repair(tmp_path)
    assert readable(tmp_path)
    assert bodies_of(tmp_path)[-2:] == [b"acknowledged", b"as well"]
