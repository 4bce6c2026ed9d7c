"""What is done with what arrives: a table of cases, and any order of anything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.book.booking import HOUR_NS, MAX_REASON_CHARACTERS, book, hours_of, repeated
from ledger.book.streams import BookedRun, StreamId, Streams
from ledger.consume.arrival import NOBODY, Arrival, Kind
from tests.ledger.site import HOUR, T0, agent, arrival, batch
from wire.identity import AgentId
from wire.v1 import usage_pb2 as pb

AGENT = agent(1)


def a(seq: int, cpu: int = 1, kind: Kind = Kind.BOOKABLE, reason: str = "") -> Arrival:
    return arrival(batch(AGENT, seq, T0, T0 + 10, [{"cpu_usage_ns": cpu}]), kind, reason)


ONE, OTHER = a(1), a(1, 2)
BAD = arrival(pb.UsageBatch(schema_version=1, agent_id=AGENT, epoch=1, seq=1))


@dataclass(frozen=True)
class Case:
    arrivals: list[Arrival]
    booked: Arrival | None
    new: int
    duplicates: int
    verdicts: list[str]


CASES = {
    "new": Case([ONE], None, 1, 0, []),
    "twice in a chunk": Case([ONE, ONE], None, 1, 1, []),
    "booked before": Case([ONE], ONE, 0, 1, []),
    "other bytes in a chunk": Case([ONE, OTHER], None, 1, 0, ["conflict"]),
    "other bytes than are booked": Case([OTHER], ONE, 0, 0, ["conflict"]),
    "the same other bytes again": Case([OTHER, OTHER], ONE, 0, 0, ["conflict", "conflict"]),
    "unreadable": Case([BAD], None, 0, 0, ["refused"]),
    "unreadable, then good": Case([BAD, ONE], None, 1, 0, ["refused"]),
    "parked": Case([a(1, kind=Kind.PARKED)], None, 0, 0, ["parked"]),
    "parked and released": Case([a(1, kind=Kind.PARKED), ONE], None, 1, 0, ["parked"]),
    "rejected and let in": Case([a(1, kind=Kind.REJECTED), ONE], None, 1, 0, ["rejected"]),
    "refused by the collector": Case([a(1, kind=Kind.REFUSED)], None, 0, 0, ["refused"]),
    "adopted": Case([a(1, kind=Kind.ADOPTED)], None, 0, 0, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_arrival_is_booked_once_or_has_a_verdict(name: str) -> None:
    case = CASES[name]
    streams, digests = Streams(), {}
    if case.booked is not None:
        streams.add(StreamId(AGENT, 1), 1, T0, T0 + 10)
        digests[AGENT, 1, 1] = {case.booked.digest}
        assert repeated(case.arrivals, streams)
    chunk = book(case.arrivals, streams, digests)
    assert (len(chunk.new), len(chunk.data), chunk.duplicates) == (case.new, case.new, case.duplicates)
    assert [v.kind for v in chunk.verdicts] == case.verdicts
    assert chunk.rows == case.new


def test_what_is_booked_with_two_digests_has_either_as_duplicate() -> None:
    digests = {(AGENT, 1, 1): {ONE.digest, OTHER.digest}}
    chunk = book([ONE, OTHER, a(1, 3)], Streams(), digests)
    assert (chunk.duplicates, [v.kind for v in chunk.verdicts]) == (2, ["conflict"])


def test_an_agent_that_is_no_uuid_is_refused_as_nobodys_and_not_asked_about() -> None:
    strange = ONE._replace(agent_id=AgentId("x'), (1, 1, 1)) OR 1=1 --"))
    streams = Streams([(StreamId(strange.agent_id, 1), [BookedRun(1, 1, 0, 1, 0, 1)])])
    assert repeated([strange], streams) == []
    for kind in Kind:
        (verdict,) = book([strange._replace(kind=kind)], streams, {}).verdicts
        assert (verdict.kind, verdict.agent_id, verdict.epoch, verdict.seq) == ("refused", NOBODY, 0, 0)


def test_a_verdict_says_whose_and_when_as_far_as_can_be_read_and_is_bounded() -> None:
    said = a(1, kind=Kind.REJECTED, reason="é" * 5_000)
    (verdict,) = book([said], Streams(), {}).verdicts
    assert (verdict.tenant, verdict.interval_start_ns, verdict.interval_end_ns) == ("acme", T0, T0 + 10)
    assert len(verdict.reason) == MAX_REASON_CHARACTERS
    (verdict,) = book([said._replace(body=b"\xff")], Streams(), {}).verdicts
    assert (verdict.tenant, verdict.interval_end_ns, verdict.digest) == ("", 0, said.digest)


@given(
    order=st.permutations([a(s, c) for s in (1, 2, 3) for c in (1, 2)] * 2),
    cuts=st.sets(st.integers(1, 11), max_size=4),
)
def test_of_every_identity_the_first_bytes_are_booked_however_it_is_cut(
    order: list[Arrival], cuts: set[int]
) -> None:
    streams = Streams()
    digests: dict[tuple[str, int, int], set[bytes]] = {}
    first: dict[int, bytes] = {}
    for one in order:
        first.setdefault(one.seq, one.digest)
    new = duplicates = conflicts = 0
    edges = [0, *sorted(cuts), len(order)]
    for begin, end in pairwise(edges):
        arrivals = order[begin:end]
        known = {identity: digests[identity] for identity in repeated(arrivals, streams)}
        chunk = book(arrivals, streams, known)
        for stream, seq, start, stop in chunk.new:
            assert not streams.booked(stream, seq)
            streams.add(stream, seq, start, stop)
            digests[AGENT, 1, seq] = {first[seq]}
        assert all(v.digest != first[v.seq] for v in chunk.verdicts)
        new, duplicates, conflicts = (
            new + len(chunk.new),
            duplicates + chunk.duplicates,
            conflicts + len(chunk.verdicts),
        )
    assert (new, duplicates, conflicts) == (3, 3, 6)


@given(st.lists(st.tuples(st.integers(1, 40 * HOUR), st.integers(1, 20 * HOUR)), max_size=6))
def test_a_chunk_lies_in_the_hours_of_its_batches(found: list[tuple[int, int]]) -> None:
    arrivals = [arrival(batch(AGENT, seq, s, s + n)) for seq, (s, n) in enumerate(found, 1)]
    wanted = {h for s, n in found for h in range(0, 61 * HOUR, HOUR) if h < s + n and s < h + HOUR}
    assert book(arrivals, Streams(), {}).hours == wanted


def test_clocks_that_began_in_1970_cost_their_hours_once() -> None:
    arrivals = [arrival(batch(AGENT, seq, 1, T0 - seq * HOUR)) for seq in range(1, 400)]
    assert len(book(arrivals, Streams(), {}).hours) == T0 // HOUR - 1


def test_an_hour_ends_where_the_next_begins() -> None:
    assert list(hours_of(T0, T0 + HOUR_NS)) == [T0]
    assert list(hours_of(T0 + HOUR_NS - 1, T0 + HOUR_NS + 1)) == [T0, T0 + HOUR_NS]
