"""Runs of numbers against a set, and what is held back against the rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ledger.book.booking import Chunk, Verdict
from ledger.book.held import HeldBack
from ledger.book.streams import BookedRun, Runs, StreamId, Streams
from tests.ledger.site import agent

NUMBERS = st.integers(1, 24) | st.integers(2**64 - 4, 2**64 - 1)
A, B = StreamId(agent(1), 1), StreamId(agent(2), 1)


class RunsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runs = Runs()
        self.model: dict[int, tuple[int, int]] = {}

    @rule(number=NUMBERS, start=st.integers(1, 50), length=st.integers(1, 9))
    def add(self, number: int, start: int, length: int) -> None:
        self.runs.add(number, start, start + length)
        self.model.setdefault(number, (start, start + length))

    @invariant()
    def is_the_set(self) -> None:
        islands: list[list[int]] = []
        for number in sorted(self.model):
            if islands and islands[-1][-1] + 1 == number:
                islands[-1].append(number)
            else:
                islands.append([number])
        wanted = []
        for island in islands:
            starts, ends = zip(*(self.model[n] for n in island), strict=True)
            wanted.append(BookedRun(island[0], island[-1], min(starts), min(ends), max(starts), max(ends)))
        assert list(self.runs) == wanted
        assert len(self.runs) == len(wanted)
        assert self.runs.missing == (max(self.model, default=0) - len(self.model))
        for number in (*range(26), *range(2**64 - 5, 2**64)):
            assert (number in self.runs) == (number in self.model)
        assert list(Runs(self.runs)) == wanted


TestRuns = RunsMachine.TestCase


def test_streams_are_kept_apart() -> None:
    streams = Streams([(A, [BookedRun(1, 3, 0, 1, 2, 3)])])
    streams.add(B, 2, 5, 6)
    assert streams.booked(A, 1)
    assert not streams.booked(B, 1)
    assert not streams.booked(StreamId(A.agent_id, 2), 1)
    assert (len(streams), streams.agents, streams.missing) == (2, 2, 1)


def verdict(kind: str, seq: int, digest: bytes = b"d", stream: StreamId = A) -> Verdict:
    return Verdict(stream.agent_id, stream.epoch, seq, digest, kind, "acme", 1, 2, 3, "why")


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["book", "parked", "rejected", "refused", "conflict"]),
        st.integers(1, 3),
        st.sampled_from([b"x", b"y"]),
    ),
    max_size=12,
)


@given(chunks=st.lists(EVENTS, max_size=4))
def test_what_is_held_back_is_what_is_not_booked_and_every_conflict(
    chunks: list[list[tuple[str, int, bytes]]],
) -> None:
    held, streams = HeldBack(), Streams()
    booked: set[int] = set()
    said: set[tuple[str, int, bytes]] = set()
    for events in chunks:
        chunk = Chunk()
        for what, seq, digest in events:
            if what == "book":
                if seq not in booked:
                    chunk.new.append((A, seq, 1, 2))
                    booked.add(seq)
            else:
                chunk.verdicts.append(verdict(what, seq, digest))
                said.add((what, seq, digest))
        for new in chunk.new:
            streams.add(*new)
        held.take(chunk, streams)
        wanted = {
            (kind, seq, digest)
            for kind, seq, digest in said
            if kind == "conflict" or (kind in ("parked", "rejected") and seq not in booked)
        }
        found = [(v.kind, v.seq, v.digest) for v in held]
        assert set(found) == wanted
        assert len(found) == len(wanted)
        assert found == sorted(found, key=lambda f: (f[1], f[0], f[2]))
