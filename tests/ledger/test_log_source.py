"""What the ledger reads of a log that a collector writes, tears, mends and replaces under its eyes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.handoff.log import DurableLog, Record, repair, segments, writer
from collector.handoff.log import Kind as Written
from ledger.consume import log as module
from ledger.consume.arrival import NOBODY, Arrival, Kind
from ledger.consume.log import LogSource
from ledger.errors import LedgerError
from tests.collector.logs import AGENT, FIRST, FREE, SEGMENT, record, written
from tests.waiting import until
from wire.identity import digest
from wire.log import frame, scan
from wire.log.records import HEADER_BYTES, mark

MOST = 1 << 20


def all_of(source: LogSource, most_bytes: int = MOST) -> list[Arrival]:
    found = []
    while arrivals := source.read(most_bytes, 0):
        found += arrivals
    return found


def bodies(arrivals: list[Arrival]) -> list[bytes]:
    return [arrival.body for arrival in arrivals]


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


def fresh(somewhere: Path) -> Path:
    shutil.rmtree(somewhere / "log", ignore_errors=True)
    return somewhere / "log"


@pytest.fixture
def quick_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEAL_AFTER_SECONDS", 0.05)


def test_every_kind_of_record_arrives_as_what_it_is_to_the_books(tmp_path: Path) -> None:
    log = DurableLog(tmp_path, SEGMENT, FREE)
    for seq, (kind, note) in enumerate(
        [
            (Written.ACCEPTED, b"let in after all"),
            (Written.RELEASED, b"acme 1 2 3"),
            (Written.PARKED, b"acme 1 2"),
            (Written.REJECTED, b"REASON_X \xff" + b"y" * 4_000),
            (Written.REFUSED, b"REASON_Y"),
            (Written.ADOPTED, b""),
            (Written.ELSEWHERE, digest(b"theirs")),
        ],
        1,
    ):
        log.append_and_wait(record(seq, b"" if kind >= Written.ELSEWHERE else b"bytes", kind, note))
    log.close()
    found = all_of(LogSource(tmp_path, {}))
    assert [(a.seq, a.kind) for a in found] == [
        (1, Kind.BOOKABLE),
        (2, Kind.BOOKABLE),
        (3, Kind.PARKED),
        (4, Kind.REJECTED),
        (5, Kind.REFUSED),
        (6, Kind.ADOPTED),
    ]
    assert [a.reason for a in found[:3]] == ["", "", ""]
    assert found[3].reason.startswith("REASON_X \ufffdyyy")
    assert len(found[3].reason) == 1_024
    assert found[4].reason == "REASON_Y"
    assert {(a.epoch, a.digest, a.received_at_unix_ns) for a in found[:1]} == {(7, digest(b"bytes"), 1)}


@given(
    groups=st.lists(st.lists(st.integers(0, 5_000), min_size=1, max_size=4), min_size=1, max_size=8),
    segment=st.sampled_from([2_000, 10_000, SEGMENT]),
    most_bytes=st.sampled_from([1, 100, 4_000, MOST]),
    restart=st.booleans(),
)
def test_every_record_arrives_once_in_order_whatever_the_sizes_and_restarts(
    somewhere: Path, groups: list[list[int]], segment: int, most_bytes: int, restart: bool
) -> None:
    directory = fresh(somewhere)
    sizes = [size for group in groups for size in group]
    written(
        directory, [[bytes([n % 251]) * size for n, size in enumerate(group)] for group in groups], segment
    )
    source = LogSource(directory, {})
    found: list[Arrival] = []
    while arrivals := source.read(most_bytes, 0):
        assert len(arrivals) == 1 or sum(HEADER_BYTES + len(a.body) for a in arrivals) <= most_bytes
        found += arrivals
        if restart:
            source.close()
            source = LogSource(directory, source.positions())
    assert [a.seq for a in found] == list(range(1, len(sizes) + 1))
    assert [len(a.body) for a in found] == sizes
    assert source.lag() == 0
    source.close()


@pytest.mark.usefixtures("quick_seal")
def test_a_log_is_followed_while_it_is_written_over_changes_of_the_segment(tmp_path: Path) -> None:
    source = LogSource(tmp_path / "log", {})
    assert source.read(MOST, 0) == []
    assert "no log in" in source.trouble
    log = DurableLog(tmp_path / "log", 10_000, FREE)
    found: list[Arrival] = []
    for seq in range(1, 60):
        log.append_and_wait(record(seq, os.urandom(500)))
        if seq % 7 == 0:
            found += source.read(MOST, 0)
    found += until(lambda: source.read(MOST, 0))
    until(lambda: found.extend(source.read(MOST, 0)) or len(found) == 59)
    assert len(segments(tmp_path / "log")) > 2
    assert source.trouble == ""
    log.close()
    assert bodies(found) == [r.body for r in scan(tmp_path / "log") if isinstance(r, Record)]
    assert [a.seq for a in found] == list(range(1, 60))
    assert source.read(MOST, 0) == []


def test_what_nothing_proves_yet_is_not_read_and_a_mark_or_a_segment_behind_it_proves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SEAL_AFTER_SECONDS", 3_600.0)
    log = DurableLog(tmp_path, 1_000, FREE)
    source = LogSource(tmp_path, {})
    log.append_and_wait(record(1, b"one"))
    assert source.read(MOST, 0) == []
    assert source.lag() > HEADER_BYTES
    end = log.append_and_wait(record(2, b"two" * 400))
    assert bodies(source.read(MOST, 0)) == [b"one"]
    assert source.read(MOST, 0) == []
    (tmp_path / f"{end:020d}.log").touch()
    assert bodies(source.read(MOST, 0)) == [b"two" * 400]
    log.close()


def test_a_group_that_was_cut_off_and_written_anew_is_read_as_it_became(tmp_path: Path) -> None:
    (end,) = written(tmp_path, [[b"kept"]])
    whole = (tmp_path / FIRST).read_bytes()
    source = LogSource(tmp_path, {})
    assert bodies(all_of(source)) == [b"kept"]

    def left_behind(group: bytes) -> None:
        with (tmp_path / FIRST).open("r+b") as file:
            file.truncate(len(whole))
            file.seek(len(whole))
            file.write(group)
        os.utime(tmp_path / FIRST, ns=(0, len(group)))

    base = len(whole)
    torn = mark(base) + b"".join(record(2, b"never acknowledged" * 9))
    left_behind(torn)
    assert source.read(MOST, 0) == []
    group = mark(base) + b"".join(record(2, b"instead" * 40))
    left_behind(group + mark(base + len(group)))
    assert bodies(source.read(MOST, 0)) == [b"instead" * 40]
    assert source.positions()["log"] == base + len(group)
    assert end < base


@given(
    groups=st.lists(
        st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    cut=st.integers(0, 10_000),
)
def test_cut_at_any_byte_nothing_is_damaged_and_what_comes_goes_on_where_the_position_is(
    somewhere: Path, groups: list[list[bytes]], cut: int
) -> None:
    directory = fresh(somewhere)
    whole = [body for group in groups for body in group]
    written(directory, groups)
    path = directory / FIRST
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    source = LogSource(directory, {})
    found = bodies(all_of(source))
    assert found == whole[: len(found)]
    log = DurableLog(directory, SEGMENT, FREE)
    log.append_and_wait(record(99, b"after"))
    log.close()
    found += bodies(all_of(source))
    assert found[-1] == b"after"
    assert found[:-1] == whole[: len(found) - 1]
    assert bodies(all_of(LogSource(directory, {}))) == found
    source.close()


@given(at=st.integers(0, 10_000), flip=st.integers(1, 255), segment=st.sampled_from([700, SEGMENT]))
def test_a_damaged_place_stops_with_its_name_and_behind_a_repair_everything_sound_is_read(
    somewhere: Path, at: int, flip: int, segment: int
) -> None:
    directory = fresh(somewhere)
    whole = [bytes([n]) * 120 for n in range(1, 9)]
    written(directory, [[body] for body in whole], segment)
    bases = segments(directory)
    at %= sum((directory / f"{base:020d}.log").stat().st_size for base in bases) - HEADER_BYTES
    base = max(base for base in bases if base <= at)
    path = directory / f"{base:020d}.log"
    data = bytearray(path.read_bytes())
    data[at - base] ^= flip
    path.write_bytes(data)
    source = LogSource(directory, {})
    found: list[Arrival] = []
    with pytest.raises(LedgerError) as told:
        while True:
            arrivals = source.read(MOST, 0)
            assert arrivals, "a damaged place is never waited for"
            found += arrivals
    assert str(path) in str(told.value)
    assert "weighbridge-collector log repair" in str(told.value)
    place = int(str(told.value).partition("at byte ")[2].partition(",")[0]) + base
    assert place <= at < place + HEADER_BYTES + 120
    assert bodies(found) == whole[: len(found)]
    with pytest.raises(LedgerError, match="damaged at byte"):
        LogSource(directory, source.positions()).read(MOST, 0)
    repair(directory)
    rest = all_of(source)
    assert bodies(found) + [a.body for a in rest if a.agent_id != NOBODY] in (
        whole,  # it was a mark
        [body for n, body in enumerate(whole) if n != len(found)],
    )
    assert all(a.kind is Kind.REFUSED and "log repair" in a.reason for a in rest if a.agent_id == NOBODY)
    source.close()


def test_a_segment_that_was_cut_short_is_damage_and_not_the_end(tmp_path: Path) -> None:
    written(tmp_path, [[bytes([n]) * 3_000] for n in range(12)], segment=10_000)
    path = tmp_path / f"{segments(tmp_path)[1]:020d}.log"
    path.write_bytes(path.read_bytes()[:-2_000])
    source = LogSource(tmp_path, {})
    with pytest.raises(LedgerError, match=path.name):
        all_of(source)


@pytest.mark.usefixtures("quick_seal")
def test_a_repair_under_the_eyes_of_a_reader_does_not_leave_it_with_the_old_file(tmp_path: Path) -> None:
    ends = written(tmp_path, [[b"one" * 50], [b"two" * 50], [b"three" * 50]])
    source = LogSource(tmp_path, {})
    assert len(all_of(source)) == 3
    data = bytearray((tmp_path / FIRST).read_bytes())
    data[ends[0] + HEADER_BYTES + 5] ^= 1
    (tmp_path / FIRST).write_bytes(data)
    repair(tmp_path)
    log = DurableLog(tmp_path, SEGMENT, FREE)
    log.append_and_wait(record(4, b"four"))
    assert bodies(until(lambda: source.read(MOST, 0))) == [b"four"]
    log.close()


@pytest.mark.parametrize(
    ("why", "groups"),
    [("it ends at", [[b"x"]]), ("no record begins there", [[b"y" * 70], [b"z" * 900], [b"w"]])],
)
def test_a_log_that_is_not_the_one_that_was_read_is_told_with_the_fix(
    tmp_path: Path, why: str, groups: list[list[bytes]]
) -> None:
    written(tmp_path, [[b"a" * 100], [b"b" * 100], [b"c"]])
    source = LogSource(tmp_path, {})
    all_of(source)
    shutil.rmtree(tmp_path)
    written(tmp_path, groups)
    for reader in (source, LogSource(tmp_path, source.positions())):
        with pytest.raises(LedgerError, match=rf"{why}.*weighbridge-ledger reread"):
            reader.read(MOST, 0)
    assert len(all_of(LogSource(tmp_path, {}))) == sum(map(len, groups))


def test_a_log_that_is_gone_or_begins_behind_the_position_is_told_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is none"):
        LogSource(tmp_path / "nowhere", {"log": 500}).read(MOST, 0)
    written(tmp_path, [[bytes(900)] for _ in range(6)], segment=1_000)
    first, second, *_ = segments(tmp_path)
    (tmp_path / f"{first:020d}.log").unlink()
    with pytest.raises(
        LedgerError, match=rf"it begins at {second}.*prunes it \(`log.keep`, `log.max_size`\)"
    ):
        LogSource(tmp_path, {"log": 88}).read(MOST, 0)
    assert LogSource(tmp_path, {}).read(1, 0)[0].seq > 1


@pytest.mark.root
def test_a_log_that_may_not_be_read_is_told_with_the_group(tmp_path: Path) -> None:
    written(tmp_path / "log", [[b"one"]])
    (tmp_path / "log").chmod(0o700)
    os.seteuid(65_534)
    try:
        with pytest.raises(LedgerError, match="weighbridge-collector"):
            LogSource(tmp_path / "log", {}).read(MOST, 0)
    finally:
        os.seteuid(0)


def test_a_look_at_a_log_that_rests_costs_no_read_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [[b"one"]])
    source = LogSource(tmp_path, {})
    all_of(source)

    def never(*_: object) -> bytes:
        raise AssertionError("the log was read")

    monkeypatch.setattr(os, "pread", never)
    assert source.read(MOST, 0) == []


def test_much_to_catch_up_on_in_one_segment_is_read_without_going_over_all_of_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WALK_BYTES", 10_000)
    written(tmp_path, [[bytes(3_000)] for _ in range(100)])
    source = LogSource(tmp_path, {})
    first = source.read(MOST, 0)
    assert 3 <= len(first) <= 6
    assert len(first) + len(all_of(source)) == 100


def test_what_looks_like_a_mark_inside_a_batch_proves_nothing_that_is_not_proven(tmp_path: Path) -> None:
    forged = b"x" * 40 + mark(40 + 2 * HEADER_BYTES)
    piece = frame(Written.ACCEPTED, 1, AGENT, 7, 1, digest(forged), b"", forged)
    (tmp_path / FIRST).write_bytes(mark(0) + b"".join(piece))
    source = LogSource(tmp_path, {})
    assert source.read(MOST, 0) == []
    assert source.positions() == {"log": 0}
