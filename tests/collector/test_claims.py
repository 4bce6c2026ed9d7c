"""What a collector makes of a verdict: publish, say that it may be there already, skip, wait, or refuse."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.decide.claims import (
    MAX_SHARED_SEQ,
    SPARE_SECONDS,
    Batches,
    Claimed,
    Fate,
    Standing,
    StreamId,
    Verdict,
    lease_ms,
    pack,
    read_reply,
    unpack,
)
from collector.handoff.kafka.messages import conflict_of, message_of
from collector.handoff.kafka.sharing import Sharing
from collector.handoff.log import UNVERIFIED, Kind, Record
from wire.identity import AgentId, digest
from wire.kafka.topics import Topics

AGENT = AgentId("6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11")
NOW_NS = 1_800_000_000_000_000_000
SECOND_NS = 1_000_000_000
TOPICS = Topics.of("usage")

digests = st.binary(min_size=32, max_size=32)
numbered = st.lists(st.tuples(st.integers(0, MAX_SHARED_SEQ - 1), digests), max_size=20)


def record(kind: Kind, offset: int = 0, *, age_ns: int = 0, note: bytes = b"", flags: int = 0) -> Record:
    return Record(offset, kind, NOW_NS - age_ns, AGENT, 1, offset + 1, digest(b""), note, b"", flags)


@given(numbered)
def test_packed_batches_come_out_as_they_went_in(batches: list[tuple[int, bytes]]) -> None:
    packed = pack(batches)
    assert len(packed) == 40 * len(batches)
    assert list(unpack(packed)) == batches


@given(st.lists(st.sampled_from(list(Verdict)[:5]), min_size=1, max_size=20), st.data())
def test_the_script_s_reply_is_read_item_by_item(verdicts: list[Verdict], data: st.DataObject) -> None:
    conflicts = verdicts.count(Verdict.CONFLICT)
    known = data.draw(st.lists(st.binary(min_size=16, max_size=16), min_size=conflicts, max_size=conflicts))
    reply: list[bytes | int] = ["".join(map(str, verdicts)).encode(), 700, *known]
    answers = read_reply([(seq, digest(b"")) for seq in range(len(verdicts))], reply)
    assert [a.verdict for a in answers] == verdicts
    assert [a.known for a in answers if a.verdict is Verdict.CONFLICT] == known
    assert {a.retry_after_ms for a in answers if a.verdict is Verdict.HELD} <= {700}


def test_a_claim_outlives_what_is_produced_under_it() -> None:
    """Used while it is SPARE_SECONDS old, the message leaves the producer within the delivery timeout."""
    for timeout in (1.0, 15.0, 45.0):
        assert lease_ms(timeout) == (timeout + 2 * SPARE_SECONDS) * 1_000


@pytest.mark.parametrize(
    ("age_seconds", "asked"), [(0, False), (4.9, False), (5.1, True), (86_400, True), (-1, True)]
)
def test_a_claim_is_renewed_before_it_gets_old_and_when_the_clock_was_set_back(
    age_seconds: float, asked: bool
) -> None:
    standing = Standing(True, False, False, round(age_seconds * SECOND_NS))
    assert standing.must_claim is asked


@pytest.mark.parametrize(("handed_over", "flagged"), list(product((False, True), repeat=2)))
def test_without_other_collectors_nobody_is_asked_and_only_a_second_copy_says_so(
    handed_over: bool, flagged: bool
) -> None:
    standing = Standing(False, handed_over, flagged, 10**18)
    assert not standing.must_claim
    assert standing.fate(None) is (Fate.UNVERIFIED if handed_over or flagged else Fate.PUBLISH)


@pytest.mark.parametrize(
    ("verdict", "first", "again"),
    [
        (Verdict.GRANTED, Fate.PUBLISH, Fate.UNVERIFIED),
        (Verdict.UNVERIFIED, Fate.UNVERIFIED, Fate.UNVERIFIED),
        (Verdict.AWAY, Fate.UNVERIFIED, Fate.UNVERIFIED),
        (Verdict.HELD, Fate.WAIT, Fate.WAIT),
        (Verdict.DELIVERED, Fate.SKIP, Fate.SKIP),
        (Verdict.CONFLICT, Fate.REFUSE, Fate.REFUSE),
    ],
)
def test_what_was_not_handed_over_before_and_is_granted_goes_out_plain_and_nothing_else(
    verdict: Verdict, first: Fate, again: Fate
) -> None:
    for handed_over, flagged in product((False, True), repeat=2):
        fate = Standing(True, handed_over, flagged, 10**18).fate(Claimed(verdict))
        assert fate is (again if handed_over or flagged else first)


class Answering:
    """A ledger that gives one verdict to everybody, and remembers who asked."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = dict(enumerate(verdicts, 1))
        self.asked: list[int] = []
        self.marked: list[int] = []

    def claim_and_wait(self, batches: Batches) -> Mapping[tuple[StreamId, int], Claimed]:
        answers = {}
        for stream, some in batches.items():
            for seq, _ in some:
                self.asked.append(seq)
                answers[stream, seq] = Claimed(self.verdicts[seq])
        return answers

    def mark_and_wait(self, batches: Batches) -> None:
        self.marked += [seq for some in batches.values() for seq, _ in some]


def test_only_the_first_word_on_an_identity_is_claimed_what_follows_is_this_collector_s_own() -> None:
    ledger = Answering(*[Verdict.GRANTED] * 6)
    records = [
        record(Kind.ACCEPTED, 0),
        record(Kind.ACCEPTED, 1, note=b"READMITTED REASON_CLOCK_SKEW at log offset 0, by uid 0"),
        record(Kind.PARKED, 2),
        record(Kind.RELEASED, 3),
        record(Kind.REJECTED, 4),
        record(Kind.REFUSED, 5),
    ]
    fates = Sharing(ledger, handed_over_end=100).fates(records, NOW_NS)
    assert ledger.asked == [1, 3, 5]
    assert [fate for _, fate, _ in fates] == [Fate.UNVERIFIED] * 6


def test_what_comes_before_a_batch_that_another_collector_holds_goes_out_and_the_rest_waits() -> None:
    ledger = Answering(Verdict.GRANTED, Verdict.DELIVERED, Verdict.HELD, Verdict.GRANTED)
    old = round((SPARE_SECONDS + 1) * SECOND_NS)
    records = [record(Kind.ACCEPTED, offset, age_ns=old) for offset in range(4)]
    sharing = Sharing(ledger, 0)
    assert [fate for _, fate, _ in sharing.fates(records, NOW_NS)] == [Fate.PUBLISH, Fate.SKIP]
    assert sharing.skipped == 1
    # While it waits it renews nothing behind: another collector may be waiting for that.
    ledger.asked.clear()
    assert sharing.fates(records[2:], NOW_NS) == []
    assert sharing.fates(records[2:], NOW_NS) == []
    assert ledger.asked == [3, 3]
    ledger.verdicts[3] = Verdict.DELIVERED
    assert [fate for _, fate, _ in sharing.fates(records[2:], NOW_NS)] == [Fate.SKIP]
    assert [fate for _, fate, _ in sharing.fates(records[3:], NOW_NS)] == [Fate.PUBLISH]


def test_a_batch_taken_in_without_redis_asks_again_before_it_is_published() -> None:
    ledger = Answering(Verdict.GRANTED, Verdict.DELIVERED)
    records = [record(Kind.ACCEPTED, offset, flags=UNVERIFIED) for offset in range(2)]
    sharing = Sharing(ledger, 0)
    assert [fate for _, fate, _ in sharing.fates(records, NOW_NS)] == [Fate.UNVERIFIED, Fate.SKIP]


def test_the_header_says_what_may_be_there_already_and_a_late_conflict_is_evidence() -> None:
    accepted = record(Kind.ACCEPTED)
    plain, unverified = (message_of(accepted, TOPICS, {}, doubt) for doubt in (False, True))
    assert plain is not None
    assert unverified is not None
    assert "dedup" not in dict(plain.headers)
    assert dict(unverified.headers) == {**dict(plain.headers), "dedup": b"unverified"}
    refused = conflict_of(accepted, TOPICS, b"\xab" * 16)
    headers = dict(refused.headers)
    assert (refused.topic, headers["kind"]) == ("usage.rejected", b"refused")
    reason = headers["reason"]
    assert isinstance(reason, bytes)
    assert reason.startswith(b"REASON_IDENTITY_CONFLICT 1/1 ")
    assert b"abab" in reason
    assert message_of(record(Kind.ELSEWHERE), TOPICS, {}) is None
