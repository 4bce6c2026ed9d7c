"""From a record of the log to a Kafka message."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import Stream
from collector.handoff.kafka.messages import message_of
from collector.handoff.log import Kind, Record
from wire.identity import AgentId, digest
from wire.kafka.topics import Topics
from wire.v1 import usage_pb2 as pb

TOPICS = Topics.of("usage-metering")
AGENT = AgentId("6f1b7e9e-0f5c-4c0e-9d57-0d4a1c5d9a11")
NUMBERS = st.integers(0, (1 << 62) - 1)


def record(kind: Kind, body: bytes, note: bytes = b"", agent: AgentId = AGENT) -> Record:
    return Record(0, kind, 1_700_000_000_000_000_001, agent, 7, 9, digest(body), note, body)


@pytest.mark.parametrize(
    ("kind", "topic"),
    [
        (Kind.ACCEPTED, "usage-metering"),
        (Kind.RELEASED, "usage-metering"),
        (Kind.PARKED, "usage-metering.parked"),
        (Kind.REJECTED, "usage-metering.rejected"),
        (Kind.REFUSED, "usage-metering.rejected"),
        (Kind.ADOPTED, None),
        (Kind.MARK, None),
    ],
)
def test_every_kind_of_record_has_its_topic_or_none(kind: Kind, topic: str | None) -> None:
    message = message_of(record(kind, Stream(AGENT, 1).next().batch), TOPICS, {})
    assert (message and message.topic) == topic


def test_the_headers_say_what_the_log_knows() -> None:
    item = Stream(AGENT, 1).next()
    message = message_of(record(Kind.ACCEPTED, item.batch), TOPICS, {})
    assert message is not None
    assert message.value == item.batch
    assert message.headers == [
        ("agent_id", AGENT.encode()),
        ("epoch", b"7"),
        ("seq", b"9"),
        ("digest", item.digest.hex().encode()),
        ("schema_version", b"1"),
        ("received_at", b"1700000000000000001"),
    ]


@given(st.text(alphabet="abcXYZ019._-", min_size=1, max_size=128), st.uuids(), st.integers(2, 1_000))
def test_the_key_is_the_tenant_and_a_giant_s_agents_are_spread_over_as_many_as_declared(
    tenant: str, agent: uuid.UUID, shards: int
) -> None:
    body = pb.UsageBatch(schema_version=1, tenant=tenant, cpu_usage_ns=[1, 2, 3]).SerializeToString()
    small = message_of(record(Kind.PARKED, body), TOPICS, {})
    giant = message_of(record(Kind.PARKED, body, agent=AgentId(str(agent))), TOPICS, {tenant: shards})
    assert small is not None
    assert giant is not None
    assert small.key == tenant.encode()
    name, _, shard = giant.key.partition(b"/")
    assert name == tenant.encode()
    assert 0 <= int(shard) < shards


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4), NUMBERS)
def test_the_key_is_the_tenant_that_was_validated_also_when_a_batch_names_several(
    tenants: list[str], cpu_usage_ns: int
) -> None:
    parts = [pb.UsageBatch(tenant=tenant, cpu_usage_ns=[cpu_usage_ns]) for tenant in tenants]
    body = b"".join(part.SerializeToString() for part in parts)
    message = message_of(record(Kind.ACCEPTED, body), TOPICS, {})
    assert message is not None
    assert message.key == pb.UsageBatch.FromString(body).tenant.encode()


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_whatever_was_rejected_goes_out_as_it_came_with_its_reason(body: bytes, note: bytes) -> None:
    for kind in (Kind.REJECTED, Kind.REFUSED):
        message = message_of(record(kind, body, note), TOPICS, {})
        assert message is not None
        assert (message.key, message.value) == (AGENT.encode(), body)
        assert message.headers[-2:] == [("kind", kind.name.lower().encode()), ("reason", note)]
