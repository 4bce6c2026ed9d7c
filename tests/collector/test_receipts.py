"""Who waits for the brokers, and the cursor and the reader that carry the news."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.fleet import Stream
from collector.handoff.kafka.cursor import Cursor
from collector.handoff.log import DamagedLog, DurableLog, Kind, Tail, frame, scan
from collector.handoff.receipts import Receipts
from wire.identity import AgentId

AGENT = AgentId("6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11")

Step = tuple[str, int]
STEPS = st.lists(st.tuples(st.sampled_from(["grow", "confirm", "trouble"]), st.integers(1, 40)), max_size=40)


@given(STEPS)
def test_everybody_is_told_once_and_yes_only_for_what_is_confirmed(steps: list[Step]) -> None:
    published: list[int] = []
    receipts = Receipts(0, 0, 100, published.append)
    receipts.update(0, "")
    told: dict[int, list[tuple[bool, int]]] = {}
    asked = 0
    for step, size in steps:
        if step == "grow":
            receipts.durable(receipts.log_end + size)
            end, number = receipts.log_end, asked
            asked += 1
            told[number] = []
            receipts.wait(
                end, lambda ok, number=number, end=end: told[number].append((ok, receipts.confirmed - end))
            )
        elif step == "confirm":
            receipts.update(min(receipts.log_end, receipts.confirmed + size), "")
        else:
            receipts.update(receipts.confirmed, "away")
            assert not len(receipts), "in trouble nobody is left waiting"
        assert receipts.take_more == (not receipts.trouble and receipts.log_end - receipts.confirmed <= 100)
    receipts.update(receipts.log_end, "")
    for answers in told.values():
        ((ok, beyond),) = answers
        assert ok == (beyond >= 0)
    assert published == sorted(published)


def test_nothing_is_taken_in_before_the_brokers_were_heard_of() -> None:
    assert not Receipts(0, 0, 100, lambda _: None).take_more


@given(st.lists(st.integers(0, 1 << 60), min_size=1, max_size=5))
def test_a_cursor_comes_back_as_it_was_left(
    tmp_path_factory: pytest.TempPathFactory, offsets: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cursor") / "kafka.cursor"
    cursor = Cursor(path, 0, 1 << 60)
    for offset in offsets:
        cursor.advance(offset)
    cursor.close()
    again = Cursor(path, 0, 1 << 60)
    assert again.offset == offsets[-1]
    again.close()
    shorter = Cursor(path, 0, 0)
    assert shorter.offset == 0, "a log that is shorter is another log"
    shorter.close()


@given(st.binary(max_size=64))
@example(bytes(31))
def test_a_cursor_that_cannot_be_read_is_as_good_as_none(
    tmp_path_factory: pytest.TempPathFactory, said: bytes
) -> None:
    path = tmp_path_factory.mktemp("cursor") / "kafka.cursor"
    path.write_bytes(said)
    cursor = Cursor(path, 0, 1 << 60)
    assert cursor.offset == 0
    cursor.advance(42)
    cursor.close()
    assert Cursor(path, 0, 1 << 60).offset == 42


def make_log(directory: Path, sizes: list[int]) -> int:
    log = DurableLog(directory, 16 << 10, 0)
    try:
        for group, size in enumerate(sizes):
            stream = Stream(AGENT, group + 1, rows=3)
            frames: list[bytes] = []
            for item in (stream.next() for _ in range(size)):
                frames += frame(
                    Kind.ACCEPTED, 1, b"\1" * 16, item.epoch, item.seq, item.digest, b"", item.batch
                )
            assert log.append_and_wait(frames) is not None
        return log.end
    finally:
        log.close()


@pytest.mark.parametrize("most_bytes", [1, 200, 3_000, 1 << 20])
def test_a_tail_reads_what_a_scan_reads_over_all_segments(tmp_path: Path, most_bytes: int) -> None:
    end = make_log(tmp_path, [1, 7, 30, 2, 20, 1])
    tail = Tail(tmp_path, 0)
    found = []
    while records := tail.read(end, most_bytes):
        assert sum(r.end - r.offset for r in records) <= most_bytes or len(records) >= 1
        found += [record for record in records if record.kind is not Kind.MARK]
    tail.close()
    assert tail.offset == end
    assert found == list(scan(tmp_path, 0, end))
    assert len(list(tmp_path.glob("*.log"))) > 2


def test_a_tail_stops_at_a_place_that_has_changed_and_names_it(tmp_path: Path) -> None:
    end = make_log(tmp_path, [5])
    (segment,) = tmp_path.glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    tail = Tail(tmp_path, 0)
    with pytest.raises(DamagedLog, match="log repair"):
        while tail.read(end, 1 << 20):
            pass
    tail.close()
