"""What was just written need not be read back, and nobody can tell where a record came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fleet import Stream
from collector.handoff.log import DurableLog, Kind, Recent, Tail, frame, scan
from collector.handoff.log.writer import FORGET_BYTES
from wire.identity import AgentId, digest

AGENT = AgentId("6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11")
KINDS = (Kind.ACCEPTED, Kind.REJECTED, Kind.ADOPTED, Kind.PARKED)


def frames_of(stream: Stream, count: int) -> list[bytes]:
    """Records of all shapes: with a note, without one, without a body."""
    frames: list[bytes] = []
    for number in range(count):
        item, kind = stream.next(), KINDS[(stream.seq + number) % len(KINDS)]
        note = b"REASON_MALFORMED because" if kind is Kind.REJECTED else b""
        body = b"" if kind is Kind.ADOPTED else item.batch
        frames += frame(kind, 1, b"\1" * 16, item.epoch, item.seq, digest(body), note, body)
    return frames


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 6)),
        st.tuples(st.just("read"), st.sampled_from([1, 700, 5_000, 1 << 20])),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(steps=STEPS, most_bytes=st.sampled_from([0, 900, 6_000, 1 << 20]), durable=st.integers(0, 8))
def test_a_reader_finds_in_memory_and_on_disk_together_exactly_what_is_on_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], most_bytes: int, durable: int
) -> None:
    directory: Path = tmp_path_factory.mktemp("log")
    recent = Recent(most_bytes)
    log = DurableLog(directory, 8 << 10, 0, recent=recent)
    stream, found = Stream(AGENT, 1, rows=2), []
    tail, ends = Tail(directory, 0, recent), [0]
    try:
        for step, size in steps:
            if step == "write":
                end = log.append_and_wait(frames_of(stream, size))
                assert end is not None
                ends.append(end)
            else:
                # A reader is told of an end that may be older than what was written since.
                until = ends[max(0, len(ends) - 1 - durable)]
                records = tail.read(until, size)
                assert bool(records) == (until > found[-1].end if found else until > 0)
                assert all(record.end <= until for record in records)
                found += records
        while records := tail.read(log.end, 4_000):
            found += records
        end = log.end
    finally:
        tail.close()
        log.close()
    assert [r.offset for r in found[1:]] == [r.end for r in found[:-1]], "nothing is left out"
    assert [r for r in found if r.kind is not Kind.MARK] == list(scan(directory, 0, end))


def test_what_is_held_is_taken_from_memory_and_not_from_the_disk(tmp_path: Path) -> None:
    recent = Recent(1 << 20)
    log = DurableLog(tmp_path, 1 << 20, 0, recent=recent)
    tail = Tail(tmp_path, 0, recent)
    try:
        end = log.append_and_wait(frames_of(Stream(AGENT, 1), 4))
        assert end is not None
        (segment,) = tmp_path.glob("*.log")
        whole = segment.read_bytes()
        segment.write_bytes(bytes(len(whole)))
        assert next(r.kind for r in tail.read(end, 1 << 20)) is Kind.MARK
        assert tail.offset == end
        segment.write_bytes(whole)
    finally:
        tail.close()
        log.close()


@pytest.mark.parametrize("from_memory", [True, False])
def test_a_log_that_is_taken_from_memory_does_not_fill_the_page_cache(
    tmp_path: Path, from_memory: bool
) -> None:
    segments_bytes, count = 24 << 20, 60
    recent = Recent(1 << 20) if from_memory else None
    log = DurableLog(tmp_path, segments_bytes, 0, recent=recent)
    body = bytes(1 << 20)
    try:
        for seq in range(1, count + 1):
            log.append_and_wait([*frame(Kind.ACCEPTED, 1, b"\1" * 16, 1, seq, digest(body), b"", body)])
        end = log.end
        resident = _resident_bytes(tmp_path)
    finally:
        log.close()
    segments = len(list(tmp_path.glob("*.log")))
    assert segments >= 3
    assert end > count << 20
    # Of each segment at most what had not been forgotten yet when the next one began.
    assert (resident <= segments * (FORGET_BYTES + (2 << 20))) == from_memory, resident


def _resident_bytes(directory: Path) -> int:
    """Of the log in the page cache; fincore(1) is util-linux's. A tmpfs would keep all of it, whatever it is told."""
    told = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, directory.glob("*.log"))],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return sum(map(int, told.stdout.split()))


def test_what_nobody_takes_is_given_up_at_the_bound() -> None:
    recent = Recent(2_000)
    offset = 0
    stream = Stream(AGENT, 1, rows=1)
    for _ in range(50):
        frames = [piece for piece in frames_of(stream, 1) if piece]
        recent.add(offset, frames)
        offset += sum(map(len, frames))
        assert recent.held_bytes <= 2_000
    assert recent.take(0, offset, 1 << 20) == []
