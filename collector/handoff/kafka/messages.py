"""From a record of the log to a Kafka message. Pure.

    ACCEPTED, RELEASED    TOPIC            what the ledger may book, each identity once
    PARKED                TOPIC.parked     waits at the collector; comes to TOPIC when it is released
    REJECTED, REFUSED     TOPIC.rejected   with the reason
    ADOPTED, MARK, ELSEWHERE
                          nowhere: the log's own

The value is the batch as it came in, byte for byte. The key is the tenant; of a rejected batch, which may name any
tenant or none, the agent. Header values are text: numbers in decimal, the digest in lower-case hexadecimal.
`dedup=unverified` says that it may be in the topic already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

from google.protobuf.message import DecodeError

from collector.handoff.log import Kind, Record
from wire.kafka.topics import Topics
from wire.v1 import usage_pb2 as pb

Headers = list[tuple[str, str | bytes | None]]
"""As librdkafka takes them; all values here are bytes."""


class Message(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    headers: Headers


def message_of(
    record: Record, topics: Topics, giants: Mapping[str, int], unverified: bool = False
) -> Message | None:
    """What to publish of a record; None if it is none of Kafka's. `giants`: tenant -> over how many keys it is spread."""
    kind = record.kind
    if kind is Kind.ACCEPTED or kind is Kind.RELEASED or kind is Kind.PARKED:
        # The fields a router needs, under the numbers they have in a UsageBatch: a twentieth of the work.
        head = pb.UsageHead.FromString(record.body)
        topic = topics.parked if kind is Kind.PARKED else topics.usage
        return Message(
            topic,
            _key(head.tenant, record.agent_id, giants),
            record.body,
            _headers(record, head.schema_version, unverified),
        )
    if kind is Kind.REJECTED or kind is Kind.REFUSED:
        headers = _headers(record, _version(record.body), unverified)
        headers += [("kind", kind.name.lower().encode()), ("reason", record.note)]
        return Message(topics.rejected, record.agent_id.encode(), record.body, headers)
    return None


def conflict_of(record: Record, topics: Topics, known: bytes) -> Message:
    """Evidence of what was taken in here while another collector delivered something else under its name."""
    reason = (
        f"REASON_IDENTITY_CONFLICT {record.epoch}/{record.seq} was delivered by another collector with a digest that"
        f" begins {known.hex()}"
    )
    headers = _headers(record, _version(record.body), True)
    headers += [("kind", b"refused"), ("reason", reason.encode())]
    return Message(topics.rejected, record.agent_id.encode(), record.body, headers)


def _key(tenant: str, agent_id: str, giants: Mapping[str, int]) -> bytes:
    """The tenant; of a giant, with the agent's shard. No tenant's name has a slash."""
    shards = giants.get(tenant)
    if shards is None:
        return tenant.encode()
    return b"%s/%d" % (tenant.encode(), UUID(agent_id).int % shards)


def _headers(record: Record, schema_version: int, unverified: bool) -> Headers:
    headers: Headers = [
        ("agent_id", record.agent_id.encode()),
        ("epoch", b"%d" % record.epoch),
        ("seq", b"%d" % record.seq),
        ("digest", record.digest.hex().encode()),
        ("schema_version", b"%d" % schema_version),
        ("received_at", b"%d" % record.received_at_unix_ns),
    ]
    if unverified:
        headers.append(("dedup", b"unverified"))
    return headers


def _version(body: bytes) -> int:
    """Of a rejected batch; 0 if it is no batch at all."""
    try:
        return pb.UsageHead.FromString(body).schema_version
    except DecodeError:
        return 0
