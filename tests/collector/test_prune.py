"""The log is deleted from its beginning on, only what nobody needs, and whatever is left tells the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import collector.handoff.log.writer as writer
from bench.fleet import Stream
from collector.config import AdmissionSettings, Settings, read
from collector.decide.admission import Admission, Changes, Parked
from collector.decide.dedup import Seen, StreamState
from collector.handoff.kafka.cursor import CURSOR_FILE, Cursor
from collector.handoff.log import Damage, DurableLog, Keep, Kind, Record, frame, records_at, scan, segments
from collector.handoff.log.prune import Segment, beginning
from collector.handoff.park_notes import parked_note
from collector.log_commands import verify
from collector.plans import Plans
from collector.resend.log_range import begins_at_unix_ns, extent_of, log_batches
from collector.server import load
from collector.state.memory import Streams
from collector.state.sqlite import Checkpoint
from tests.collector.logs import AGENT, FREE, bodies_of, record, written
from wire.daemon.settings import SettingsError
from wire.identity import AgentId, digest
from wire.log import segment_path

SMALL = 1_000
"""Of a segment: a few records."""
AGENT_ID = AgentId("00010203-0405-0607-0809-0a0b0c0d0e0f")
NOTHING = Keep(age_ns=0)


@st.composite
def logs(draw: st.DrawFn) -> list[Segment]:
    base = draw(st.integers(0, 1_000))
    found = []
    for size in draw(st.lists(st.integers(1, 100), min_size=1, max_size=8)):
        found.append(Segment(base, size, draw(st.integers(0, 100))))
        base += size
    return found


@given(
    logs(),
    st.none() | st.integers(0, 100),
    st.none() | st.integers(0, 900),
    st.integers(0, 2_000),
    st.integers(0, 200),
)
def test_only_what_is_beyond_a_bound_and_not_needed_goes_from_the_beginning_on(
    found: list[Segment], age_ns: int | None, size: int | None, needed_from: int, now: int
) -> None:
    begin = beginning(found, Keep(age_ns, size), needed_from, now)
    gone = [segment for segment in found if segment.base < begin]
    kept = found[len(gone) :]
    assert kept, "the last one stays"
    assert kept[0].base == begin
    for number, segment in enumerate(gone):
        assert segment.base + segment.size <= needed_from
        left = sum(s.size for s in found[number:])
        assert (age_ns is not None and now - segment.written_unix_ns > age_ns) or (
            size is not None and left > size
        )
    if len(kept) > 1 and kept[1].base <= needed_from:
        assert age_ns is None or now - kept[0].written_unix_ns <= age_ns
        assert size is None or sum(s.size for s in kept) <= size


def opened(directory: Path) -> DurableLog:
    return DurableLog(directory, SMALL, FREE)


def test_the_writer_goes_on_behind_what_it_prunes(tmp_path: Path) -> None:
    ends = written(tmp_path, [[b"%d" % n * 300] for n in range(9)], SMALL)
    bodies = bodies_of(tmp_path)
    log = opened(tmp_path)
    log.prune(Keep(), lambda: log.end)
    assert (log.begin, bodies_of(tmp_path)) == (0, bodies)
    log.prune(NOTHING, lambda: ends[3])
    assert 0 < log.begin <= ends[3]
    left = bodies_of(tmp_path)
    assert left == bodies[-len(left) :]
    assert len(left) >= 5
    log.prune(NOTHING, lambda: log.end)
    assert segments(tmp_path) == [log.begin]
    assert log.append_and_wait(record(10, b"x" * 2_000)) is not None
    log.close()
    again = opened(tmp_path)
    assert again.begin == log.begin
    assert bodies_of(tmp_path)[-1] == b"x" * 2_000
    again.close()


def test_nobody_is_asked_what_is_needed_while_nothing_would_go(tmp_path: Path) -> None:
    written(tmp_path, [[b"x" * 900] for _ in range(4)], SMALL)
    asked: list[int] = []

    def needed_from() -> int:
        asked.append(log.end)
        return log.end

    log = opened(tmp_path)
    before = segments(tmp_path)
    log.prune(Keep(age_ns=3_600 * 10**9, size=1 << 20), needed_from)
    assert (asked, segments(tmp_path)) == ([], before)
    log.prune(NOTHING, needed_from)
    assert asked
    assert len(segments(tmp_path)) < len(before)
    log.close()


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", range(8))
def test_a_kill_between_any_two_steps_leaves_one_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    written(tmp_path, [[b"%d" % n * 900] for n in range(6)], SMALL)
    bodies, before = bodies_of(tmp_path), segments(tmp_path)
    steps: list[str] = []

    def counted(name: str) -> None:
        if len(steps) == step:
            raise Killed
        steps.append(name)

    unlink, sync = Path.unlink, writer.sync_directory

    def unlink_one(path: Path, missing_ok: bool = False) -> None:
        counted(path.name)
        unlink(path, missing_ok)

    def sync_one(directory: Path) -> None:
        counted("sync")
        sync(directory)

    log = opened(tmp_path)
    monkeypatch.setattr(Path, "unlink", unlink_one)
    monkeypatch.setattr(writer, "sync_directory", sync_one)
    with pytest.raises(Killed):
        log.prune(NOTHING, lambda: log.end)
    monkeypatch.undo()
    log.close()
    assert steps == [name for base in before for name in (f"{base:020d}.log", "sync")][:step]
    assert segments(tmp_path) == before[(step + 1) // 2 :]
    assert not [found for found in scan(tmp_path) if isinstance(found, Damage)]
    left = bodies_of(tmp_path)
    assert left == bodies[-len(left) :]
    again = opened(tmp_path)
    assert again.begin == segments(tmp_path)[0]
    again.prune(NOTHING, lambda: again.end)
    assert len(segments(tmp_path)) == 1
    again.close()


def test_a_scan_that_is_overtaken_goes_on_where_the_log_begins_now(tmp_path: Path) -> None:
    written(tmp_path, [[b"%d" % n * 900] for n in range(6)], SMALL)
    bodies = bodies_of(tmp_path)
    scanning = scan(tmp_path)
    first = next(scanning)
    assert isinstance(first, Record)
    log = opened(tmp_path)
    log.prune(NOTHING, lambda: segments(tmp_path)[4])
    log.close()
    rest = [found for found in scanning if isinstance(found, Record)]
    assert [found.body for found in rest] == bodies[4:]


def test_a_segment_that_is_lost_from_the_middle_is_no_pruning(tmp_path: Path) -> None:
    written(tmp_path, [[b"%d" % n * 900] for n in range(6)], SMALL)
    segment_path(tmp_path, segments(tmp_path)[2]).unlink()
    assert [type(found) for found in scan(tmp_path)].count(Damage) == 1


def test_what_lies_before_the_beginning_is_not_there(tmp_path: Path) -> None:
    written(tmp_path, [[b"%d" % n * 900] for n in range(6)], SMALL)
    places = [(r.offset, len(r.body)) for r in scan(tmp_path) if isinstance(r, Record)]
    log = opened(tmp_path)
    log.prune(NOTHING, lambda: places[-1][0])
    log.close()
    found = records_at(tmp_path, places)
    assert [one is None for one in found] == [True] * 5 + [False]


def test_a_cursor_before_the_beginning_means_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / CURSOR_FILE
    for said, begin in ((None, 700), (5, 700), (900, 700)):
        if said is not None:
            cursor = Cursor(path, 0, 1 << 60)
            cursor.advance(said)
            cursor.close()
        cursor = Cursor(path, begin, 1_000)
        assert cursor.offset == max(said or 0, begin)
        cursor.close()


def nobody() -> Admission:
    return Admission(Plans(AdmissionSettings(), {}).of)


class Recalled:
    """What a start knows of a log and a checkpoint."""

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        bases = segments(directory)
        end = extent_of(directory).end
        self.streams, self.admission = Streams(), nobody()
        kept = Checkpoint(checkpoint)
        load(self.streams, self.admission, kept, directory, bases[0], end)
        kept.close()

    @property
    def state(self) -> StreamState:
        state = self.streams.get(AGENT_ID, 7)
        assert state is not None
        return state

    @property
    def waiting(self) -> list[int]:
        return [view.batches for view in self.admission.views(time.monotonic_ns())]


def test_a_start_without_its_checkpoint_takes_nothing_for_known_that_may_not_be(tmp_path: Path) -> None:
    log_directory = tmp_path / "log"
    written(log_directory, [[b"%d" % n * 90] for n in range(400)], SMALL)
    whole = Recalled(log_directory, tmp_path / "whole.db").state
    assert whole.watermark == 400
    log = opened(log_directory)
    log.prune(NOTHING, lambda: segments(log_directory)[-20])
    log.close()
    pruned = Recalled(log_directory, tmp_path / "pruned.db").state
    first = next(r for r in scan(log_directory) if isinstance(r, Record)).seq
    assert first > 300
    # What it is not told of it would take in once more, and the ledger books it once.
    assert pruned.watermark == 400 - 256
    assert pruned.judge(first - 1, digest(b"%d" % (first - 2) * 90)) is Seen.NEW
    for seq in range(first, 401):
        assert pruned.judge(seq, digest(b"%d" % (seq - 1) * 90)) is Seen.DUPLICATE
    # An agent says where it is.
    pruned.adopt(first + 3)
    assert (pruned.watermark, pruned.ahead, pruned.last_digest) == (400, {}, whole.last_digest)


def test_a_checkpoint_says_where_the_log_is_needed(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "streams.db")
    assert kept.needed_from() == 0
    parked = Changes({n: ("acme", Parked(500 + n, 10, 10, 1)) for n in range(3)}, [], [])
    kept.save(1_000, [], parked, 0)
    assert kept.needed_from() == 500
    kept.save(1_200, [], Changes({}, [500, 501], []), 0)
    assert kept.needed_from() == 502
    assert not (tmp_path / "streams.db-wal").stat().st_size, "the database itself is durable now"
    kept.begins(900)
    assert kept.needed_from() == 1_200
    reader = Checkpoint(tmp_path / "streams.db")
    reading = reader.parked()
    kept.close()
    assert list(reading) == []
    reader.close()


def parking(directory: Path) -> Iterator[tuple[Kind, int]]:
    """Three are parked, and then released, each record in a segment of its own; with the offset of the one that is meant."""
    log = opened(directory)
    offsets = []
    for seq in range(1, 4):
        pieces = record(seq, b"x" * SMALL, Kind.PARKED, parked_note("acme", 1, 1))
        end = log.append_and_wait(pieces)
        assert end is not None
        offsets.append(end - sum(map(len, pieces)))
        yield Kind.PARKED, offsets[-1]
    for seq, offset in enumerate(offsets, 1):
        note = b"%s %d" % (parked_note("acme", 1, 1), offset)
        assert log.append_and_wait(record(seq, b"x" * SMALL, Kind.RELEASED, note)) is not None
        yield Kind.RELEASED, offset
    log.close()


def test_what_is_parked_holds_the_log_until_it_is_released_also_over_restarts(tmp_path: Path) -> None:
    directory, checkpoint = tmp_path / "log", tmp_path / "streams.db"
    waiting: list[int] = []
    for kind, offset in parking(directory):
        waiting = [*waiting, offset] if kind is Kind.PARKED else waiting[1:]
        at = Recalled(directory, checkpoint)
        assert at.waiting == ([len(waiting)] if waiting else [])
        covered = extent_of(directory).end
        kept = Checkpoint(checkpoint)
        kept.save(covered, [], at.admission.changes(time.monotonic_ns(), time.time_ns()), time.time_ns())
        needed = kept.needed_from()
        kept.close()
        assert needed == (waiting[0] if waiting else covered)
        # A start that reads only the checkpoint, and one that has none, know the same of the queue.
        assert Recalled(directory, checkpoint).waiting == at.waiting
    verdict = verify(directory)
    assert (verdict.released, verdict.parked, verdict.wrong_releases) == (3, 0, [])
    # Everything before the last release is deleted: nothing is wrong with a release of what is gone.
    last = list(scan(directory))[-1].offset
    log = opened(directory)
    log.prune(NOTHING, lambda: last)
    log.close()
    verdict = verify(directory)
    assert (verdict.released, verdict.parked, verdict.wrong_releases) == (1, 0, [])


def test_a_checkpoint_from_a_backup_does_not_bring_back_what_was_released(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    old = tmp_path / "old.db"
    for kind, offset in parking(directory):
        if kind is Kind.PARKED:
            kept = Checkpoint(old)
            kept.save(offset, [], Changes({offset: ("acme", Parked(offset, SMALL, 10, 1))}, [], []), 0)
            kept.close()
    log = opened(directory)
    log.prune(NOTHING, lambda: log.end)
    log.close()
    again = Recalled(directory, old)
    assert again.waiting == []
    kept = Checkpoint(old)
    assert list(kept.parked()) == []
    kept.close()


def test_verify_says_what_a_pruned_log_cannot_tell(tmp_path: Path) -> None:
    log = opened(tmp_path)
    stream = Stream(str(AGENT_ID), 7)
    items = [stream.next() for _ in range(600)]
    for item in items:
        if item.seq not in (1, 150, 590):
            frames = frame(Kind.ACCEPTED, 5, AGENT, 7, item.seq, item.digest, b"", item.batch)
            assert log.append_and_wait(list(frames)) is not None
    whole = verify(tmp_path)
    assert whole.missing == [f"{AGENT_ID}/7/{seq}" for seq in (1, 150, 590)]
    assert (whole.begins_at, whole.perhaps_pruned) == (0, [])
    hundredth = next(r.offset for r in scan(tmp_path) if isinstance(r, Record) and r.seq == 100)
    log.prune(NOTHING, lambda: hundredth)
    log.close()
    verdict = verify(tmp_path)
    assert verdict.begins_at == segments(tmp_path)[0] > 0
    assert verdict.missing == [f"{AGENT_ID}/7/590"]
    assert verdict.perhaps_pruned == [f"{AGENT_ID}/7/150"]
    assert verdict.chain_breaks == []
    # A replay is of what is there.
    extent = extent_of(tmp_path)
    found = list(log_batches(tmp_path, extent))
    brought = [one.identity.seq for one in found if one.identity is not None]
    assert brought == [seq for seq in range(brought[0], 601) if seq not in (150, 590)]
    assert 1 < brought[0] <= 100
    assert all(0 < one.end <= extent.size for one in found)
    assert all(one.end < two.end for one, two in pairwise(found))
    assert begins_at_unix_ns(tmp_path) == 5


@pytest.mark.parametrize("bound", [{"keep": "7d"}, {"max_size": "1GiB"}])
def test_a_log_that_is_the_only_copy_is_not_pruned(tmp_path: Path, bound: dict[str, str]) -> None:
    file = tmp_path / "collector.yaml"
    file.write_text(json.dumps({"log": bound}))
    with pytest.raises(SettingsError, match=rf"log\.{next(iter(bound))}: only with handoff.kafka.brokers"):
        read(file)
    file.write_text(json.dumps({"log": bound, "handoff": {"kafka": {"brokers": ["127.0.0.1:9092"]}}}))
    assert isinstance(read(file), Settings)
