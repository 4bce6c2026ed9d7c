"""From a message of Kafka to an arrival: what a collector wrote, and what anybody else could."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import Stream
from collector.handoff.kafka.messages import conflict_of, message_of
from collector.handoff.log import Kind as Written
from collector.handoff.log import Record
from ledger.consume.arrival import NOBODY, Arrival, Kind
from ledger.consume.messages import Message, arrival_of
from wire.identity import AgentId, digest
from wire.kafka.topics import Topics

TOPICS = Topics.of("usage-metering")
AGENT = AgentId("6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11")
ITEM = Stream(AGENT, 7).next()
RECEIVED = 1_700_000_000_000_000_001


def published(
    kind: Written, body: bytes = ITEM.batch, note: bytes = b"", unverified: bool = False
) -> Message:
    """As the collector publishes it."""
    record = Record(0, kind, RECEIVED, AGENT, 7, 1, digest(body), note, body)
    message = message_of(record, TOPICS, {}, unverified)
    assert message is not None
    headers = {name: value for name, value in message.headers if isinstance(value, bytes)}
    return Message(message.topic, headers, message.value, 5)


@pytest.mark.parametrize(
    ("written", "kind", "reason"),
    [
        (Written.ACCEPTED, Kind.BOOKABLE, ""),
        (Written.RELEASED, Kind.BOOKABLE, ""),
        (Written.PARKED, Kind.PARKED, ""),
        (Written.REJECTED, Kind.REJECTED, "REASON_X detail"),
        (Written.REFUSED, Kind.REFUSED, "REASON_X detail"),
    ],
)
@pytest.mark.parametrize("unverified", [False, True])
def test_what_a_collector_publishes_arrives_as_it_was_logged(
    written: Written, kind: Kind, reason: str, unverified: bool
) -> None:
    arrival = arrival_of(published(written, note=b"REASON_X detail", unverified=unverified), TOPICS)
    assert arrival == Arrival(kind, RECEIVED, AGENT, 7, 1, ITEM.digest, reason, ITEM.batch)


def test_a_conflict_that_was_found_at_publication_is_evidence_only() -> None:
    record = Record(0, Written.ACCEPTED, RECEIVED, AGENT, 7, 1, ITEM.digest, b"", ITEM.batch)
    message = conflict_of(record, TOPICS, b"12345678")
    headers = {name: value for name, value in message.headers if isinstance(value, bytes)}
    arrival = arrival_of(Message(message.topic, headers, message.value, 0), TOPICS)
    assert arrival.kind is Kind.REFUSED
    assert arrival.reason.startswith("REASON_IDENTITY_CONFLICT 7/1")


def test_a_batch_without_headers_is_known_by_its_own_words() -> None:
    for headers in ({}, {"agent_id": b"someone", "epoch": b"7", "seq": b"1"}, {"epoch": b"-1"}):
        arrival = arrival_of(Message(TOPICS.usage, headers, ITEM.batch, 5), TOPICS)
        assert arrival == Arrival(Kind.BOOKABLE, 5, AGENT, 7, 1, ITEM.digest, "", ITEM.batch)
    assert arrival_of(Message(TOPICS.rejected, {}, ITEM.batch, 5), TOPICS).kind is Kind.REFUSED


@pytest.mark.parametrize("written", [Written.ACCEPTED, Written.PARKED, Written.REJECTED, Written.REFUSED])
def test_bytes_that_are_not_those_of_the_digest_are_evidence_only_under_their_own_digest(
    written: Written,
) -> None:
    message = published(written)
    arrival = arrival_of(message._replace(value=message.value + b"\0"), TOPICS)
    assert (arrival.kind, arrival.reason) == (
        Kind.REFUSED,
        "bytes do not match the digest they were sent with",
    )
    assert arrival.digest == digest(message.value + b"\0")
    assert (arrival.agent_id, arrival.epoch, arrival.seq) == (AGENT, 7, 1)


@given(
    topic=st.sampled_from(TOPICS),
    headers=st.dictionaries(
        st.sampled_from(["agent_id", "epoch", "seq", "digest", "received_at", "kind", "reason"]),
        st.binary(max_size=30) | st.sampled_from([b"7", b"1" * 20, AGENT.encode(), b"rejected", b"refused"]),
    ),
    value=st.binary(max_size=60) | st.just(ITEM.batch),
)
def test_whatever_somebody_writes_is_an_arrival_within_its_bounds(
    topic: str, headers: dict[str, bytes], value: bytes
) -> None:
    arrival = arrival_of(Message(topic, headers, value, 5), TOPICS)
    assert arrival.body == value
    assert arrival.digest == digest(value)
    assert 0 <= arrival.epoch < 1 << 64
    assert 0 <= arrival.seq < 1 << 64
    assert 0 <= arrival.received_at_unix_ns < 1 << 64
    assert len(arrival.reason) <= 1_024
    if arrival.agent_id == NOBODY:
        assert (arrival.kind, arrival.epoch, arrival.seq) == (Kind.REFUSED, 0, 0)
    if arrival.kind is Kind.BOOKABLE:
        assert topic == TOPICS.usage
    if arrival.kind is Kind.REJECTED:
        assert headers["kind"] == b"rejected"
