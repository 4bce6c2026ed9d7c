"""From a message of Kafka to an arrival. Pure.

A collector says in the headers whose batch it is and which bytes it took in. The headers are anybody's who may write to
the topic: the digest is always that of the value, and where they name another one, this is not what a collector took in.
Whether the value of what is to be booked is a whole UsageBatch, and the one that the headers name, is for who decodes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ledger.consume.arrival import NOBODY, Arrival, Kind, bounded_reason
from wire.identity import AgentId, BatchId, digest, is_agent_id
from wire.kafka.topics import Topics
from wire.v1 import usage_pb2 as pb

_NUMBER = re.compile(rb"[0-9]{1,20}")
_END = 1 << 64
_NOTHING = BatchId(NOBODY, 0, 0)


class Message(NamedTuple):
    """What of it matters."""

    topic: str
    headers: Mapping[str, bytes]
    value: bytes
    published_at_unix_ns: int


def arrival_of(message: Message, topics: Topics) -> Arrival:
    headers, value = message.headers, message.value
    kind, reason = _kind(message, topics)
    actual = digest(value)
    said = headers.get("digest")
    identity = _of_headers(headers)
    if identity is None:
        identity = _of_value(value)
    if identity is None:
        identity, kind = _NOTHING, Kind.REFUSED
        reason = "no batch: it has no headers of a collector, and its bytes name none"
    elif said is not None and said != actual.hex().encode():
        kind, reason = Kind.REFUSED, "bytes do not match the digest they were sent with"
    received = _number(headers.get("received_at"))
    return Arrival(
        kind, message.published_at_unix_ns if received is None else received, *identity, actual, reason, value
    )


def _kind(message: Message, topics: Topics) -> tuple[Kind, str]:
    if message.topic == topics.usage:
        return Kind.BOOKABLE, ""
    if message.topic == topics.parked:
        return Kind.PARKED, ""
    # Only who says so uses an identity up.
    kind = Kind.REJECTED if message.headers.get("kind") == b"rejected" else Kind.REFUSED
    return kind, bounded_reason(message.headers.get("reason", b""))


def _of_headers(headers: Mapping[str, bytes]) -> BatchId | None:
    """None: no collector wrote them."""
    epoch, seq = _number(headers.get("epoch")), _number(headers.get("seq"))
    if epoch is None or seq is None:
        return None
    return _identity(headers.get("agent_id", b"").decode(errors="replace"), epoch, seq)


def _of_value(value: bytes) -> BatchId | None:
    try:
        batch = pb.UsageBatch.FromString(value)
    except DecodeError:
        return None
    return _identity(batch.agent_id, batch.epoch, batch.seq)


def _identity(agent_id: str, epoch: int, seq: int) -> BatchId | None:
    return BatchId(AgentId(agent_id), epoch, seq) if is_agent_id(agent_id) and seq else None


def _number(text: bytes | None) -> int | None:
    """None: none that fits 64 bits."""
    if text is None or not _NUMBER.fullmatch(text):
        return None
    number = int(text)
    return number if number < _END else None
