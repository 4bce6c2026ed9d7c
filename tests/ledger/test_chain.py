"""Every booked batch is billed once for each period that it overlaps, whatever came when; and who looks can tell."""

from __future__ import annotations

import hashlib
from collections import Counter

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ledger.periods.calendar import Period, following, parse
from ledger.periods.chain import Fault, billed, late, verify_chain
from ledger.periods.manifest import Manifest
from ledger.periods.manifest import parse as parse_manifest
from ledger.periods.streams import Span
from tests.ledger.closes import Batch, close

HOUR = 3_600_000_000_000
FIRST = parse("2026-11-21", "day")


class Closing(RuleBasedStateMachine):
    """Two streams of long intervals, batches that arrive in any order, and days that are closed, come what may."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = {("a", 1): FIRST.start_unix_ns, ("b", 7): FIRST.start_unix_ns - 5 * HOUR}
        self.seqs: Counter[tuple[str, int]] = Counter()
        self.on_the_way: list[Batch] = []
        self.booked: list[Batch] = []
        self.closed: list[Period] = []
        self.documents: list[bytes] = []
        self.billable: set[Span] = set()

    @rule(stream=st.sampled_from([("a", 1), ("b", 7)]), hours=st.integers(1, 60), batches=st.integers(1, 3))
    def meter(self, stream: tuple[str, int], hours: int, batches: int) -> None:
        start = self.ends[stream]
        self.ends[stream] += hours * HOUR
        for number in range(batches):
            self.seqs[stream] += 1
            tenant = f"tenant-{number}"
            self.on_the_way.append(Batch(*stream, self.seqs[stream], tenant, start, self.ends[stream]))

    @precondition(lambda self: self.on_the_way)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.on_the_way) - 1))
        self.booked.append(self.on_the_way.pop(at))

    @rule()
    def everything_arrives(self) -> None:
        self.booked += self.on_the_way
        self.on_the_way.clear()

    @rule()
    def close_the_next_day(self) -> None:
        period = following(self.closed[-1]) if self.closed else FIRST
        self.documents.append(close(period, self.closed, self.documents, self.booked).canonical())
        self.closed.append(period)
        self.billable = {batch.span for batch in self.booked}

    @invariant()
    def each_batch_is_in_one_manifest_for_each_closed_period_it_overlaps(self) -> None:
        manifests = [parse_manifest(document) for document in self.documents]
        for period in self.closed:
            wanted = Counter(
                b.span
                for b in self.booked
                if b.span in self.billable and period.overlaps(b.start_unix_ns, b.end_unix_ns)
            )
            spans = billed(manifests, period.name)
            found = Counter(
                Span(s.agent_id, s.epoch, seq, seq)
                for s in spans
                for seq in range(s.first_seq, s.last_seq + 1)
            )
            assert found == wanted

    @invariant()
    def the_chain_holds(self) -> None:
        assert verify_chain(self.documents) == []


Closing.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestClosing = Closing.TestCase


def three() -> list[Manifest]:
    """Days of one stream with a batch every six hours; of the first day one came on the second, one on the third."""
    batches = [
        Batch(
            "a",
            1,
            seq,
            "acme",
            FIRST.start_unix_ns + (seq - 1) * 6 * HOUR,
            FIRST.start_unix_ns + seq * 6 * HOUR,
        )
        for seq in range(1, 13)
    ]
    documents: list[bytes] = []
    closed: list[Period] = []
    for late_ones in ((2, 3), (3,), ()):
        period = following(closed[-1]) if closed else FIRST
        booked = [batch for batch in batches if batch.seq not in late_ones]
        documents.append(close(period, closed, documents, booked).canonical())
        closed.append(period)
    return [parse_manifest(document) for document in documents]


def stored(manifests: list[Manifest]) -> list[bytes]:
    """As they would be stored by somebody who keeps the digests right."""
    out: list[bytes] = []
    for manifest in manifests:
        previous = hashlib.sha256(out[-1]).digest() if out else b""
        out.append(msgspec.structs.replace(manifest, previous_digest=previous).canonical())
    return out


def faults(documents: list[bytes]) -> list[tuple[str, str]]:
    return [(str(finding.fault), finding.period) for finding in verify_chain(documents)]


def test_late_usage_is_an_adjustment_of_its_own_period_in_the_next_close() -> None:
    first, second, third = three()
    assert [r.span for r in first.ranges] == [Span("a", 1, 1, 1), Span("a", 1, 4, 4)]
    assert [(a.period, [r.span for r in a.ranges]) for a in second.adjustments] == [
        ("2026-11-21", [Span("a", 1, 2, 2)])
    ]
    assert [(a.period, [r.span for r in a.ranges]) for a in third.adjustments] == [
        ("2026-11-21", [Span("a", 1, 3, 3)])
    ]
    assert late([Span("a", 1, 1, 4)], billed([first, second], "2026-11-21")) == [Span("a", 1, 3, 3)]
    assert faults([m.canonical() for m in (first, second, third)]) == []


def test_a_change_shows_in_the_next_manifest() -> None:
    first, second, third = three()
    dearer = msgspec.structs.replace(first.accounts[0], sums={"cpu_usage_ns": 9})
    forged = msgspec.structs.replace(first, accounts=(dearer,))
    documents = [m.canonical() for m in (forged, second, third)]
    assert faults(documents) == [(Fault.PREVIOUS_DIGEST, "2026-11-22")]


def test_a_manifest_that_was_taken_out_shows_as_a_gap_though_the_digests_were_mended() -> None:
    first, second, third = three()
    (digest, gap) = verify_chain([first.canonical(), third.canonical()])
    assert (digest.fault, digest.period) == (Fault.PREVIOUS_DIGEST, "2026-11-23")
    assert (gap.fault, gap.sentence) == (Fault.GAP, "follows 2026-11-21, and 2026-11-22 should")
    assert faults(stored([first, third])) == [(Fault.GAP, "2026-11-23")]
    (beginning,) = verify_chain([second.canonical(), third.canonical()])
    assert (beginning.fault, beginning.period) == (Fault.PREVIOUS_DIGEST, "2026-11-22")


def test_an_adjustment_of_a_period_that_was_open_then_is_found() -> None:
    first, second, third = three()
    too_soon = msgspec.structs.replace(second.adjustments[0], period="2026-11-23")
    early = msgspec.structs.replace(second, adjustments=(too_soon,))
    assert (Fault.NOT_CLOSED_BEFORE, "2026-11-22") in faults(stored([first, early, third]))


def test_a_batch_in_two_manifests_for_the_same_period_is_found() -> None:
    first, second, third = three()
    again = msgspec.structs.replace(third, adjustments=(*second.adjustments,))
    (finding,) = verify_chain(stored([first, second, again]))
    assert (finding.fault, finding.period) == (Fault.BILLED_TWICE, "2026-11-21")
    assert finding.sentence == "a/1/2..2 is billed more than once for 2026-11-21"


def test_a_count_that_does_not_fit_its_range_or_its_tenants_is_found() -> None:
    first, *_ = three()
    short = (msgspec.structs.replace(first.ranges[0], batches=2), *first.ranges[1:])
    assert faults(stored([msgspec.structs.replace(first, ranges=short)])) == [
        (Fault.MISCOUNTED, "2026-11-21"),
        (Fault.MISCOUNTED, "2026-11-21"),
    ]
    without = msgspec.structs.replace(first, accounts=())
    assert faults(stored([without])) == [(Fault.MISCOUNTED, "2026-11-21")]


@pytest.mark.parametrize("change", [(b":", b": "), (b'"batches":1', b'"batches":1.0'), (b"{", b"")])
def test_bytes_that_are_not_the_canonical_ones_are_found(change: tuple[bytes, bytes]) -> None:
    first, *_ = three()
    document = first.canonical().replace(*change, 1)
    assert document != first.canonical()
    (finding,) = verify_chain([document])
    assert finding.fault in (Fault.NOT_CANONICAL, Fault.UNREADABLE)


def test_a_manifest_of_no_period_is_unreadable_and_the_others_are_judged() -> None:
    first, second, _ = three()
    nameless = msgspec.structs.replace(first, period="2026-11-31").canonical()
    assert faults([nameless, second.canonical()]) == [
        (Fault.UNREADABLE, "#1"),
        (Fault.PREVIOUS_DIGEST, "2026-11-22"),
    ]
