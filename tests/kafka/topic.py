"""What is in a topic, read by a consumer of our own, and what can happen to it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from bench.kafka_broker import KafkaBroker


class Got(NamedTuple):
    partition: int
    key: bytes
    value: bytes
    headers: dict[str, bytes]

    @property
    def identity(self) -> tuple[str, int, int]:
        h = self.headers
        return h["agent_id"].decode(), int(h["epoch"]), int(h["seq"])


def fresh_name() -> str:
    return f"usage-{uuid.uuid4().hex[:12]}"


def kafka_settings(broker: KafkaBroker, topic: str, **more: Any) -> dict[str, Any]:
    """Settings of a collector that hands off to this broker."""
    return {"handoff": {"kafka": {"brokers": [broker.plain], "topic": topic, "partitions": 3, **more}}}


def admin(broker: KafkaBroker) -> AdminClient:
    """To be kept until its futures are done."""
    return AdminClient({"bootstrap.servers": broker.plain})


def alter(broker: KafkaBroker, name: str, config: Mapping[str, str]) -> None:
    resource = ConfigResource(ResourceType.TOPIC, name)
    for key, value in config.items():
        entry = ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
        resource.add_incremental_config(entry)
    client = admin(broker)
    for future in client.incremental_alter_configs([resource]).values():
        future.result()


def allow(broker: KafkaBroker, prefix: str) -> None:
    """The user `writer` may use topics whose names begin so, and make none."""
    rights = (AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS, AclOperation.WRITE)
    bindings = [
        AclBinding(
            ResourceType.TOPIC,
            prefix,
            ResourcePatternType.PREFIXED,
            "User:writer",
            "*",
            right,
            AclPermissionType.ALLOW,
        )
        for right in rights
    ]
    client = admin(broker)
    for future in client.create_acls(bindings).values():
        future.result()


def topics(broker: KafkaBroker) -> set[str]:
    return set(admin(broker).list_topics(timeout=20).topics)


def read_all(broker: KafkaBroker, topic: str, seconds: float = 60.0) -> list[Got]:
    """Everything in a topic as it is now, partition by partition in order."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker.plain,
            "group.id": uuid.uuid4().hex,
            "enable.auto.commit": False,
            "check.crcs": True,
        }
    )
    try:
        deadline = time.monotonic() + seconds
        partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
        places = [TopicPartition(topic, number, 0) for number in partitions]
        left = {place.partition: consumer.get_watermark_offsets(place, timeout=20)[1] for place in places}
        consumer.assign(places)
        got: list[Got] = []
        while any(left.values()):
            assert time.monotonic() < deadline, f"{left} are still to come"
            for message in consumer.consume(10_000, timeout=1):
                assert message.error() is None, message.error()
                number = message.partition()
                assert number is not None
                left[number] -= 1
                headers = dict(message.headers() or [])
                got.append(Got(number, message.key() or b"", message.value() or b"", headers))
        return got
    finally:
        consumer.close()


@contextmanager
def damaged(broker: KafkaBroker, topic: str, value: bytes) -> Iterator[None]:
    """Meanwhile a bit of the record with this value is another one on the broker's disk. The topic has one segment."""
    (segment,) = broker.directory.glob(f"data/{topic}-0/*.log")
    at = segment.read_bytes().index(value) + 20
    with segment.open("r+b") as file:
        file.seek(at)
        file.write(bytes([value[20] ^ 1]))
        file.flush()
        try:
            yield
        finally:
            file.seek(at)
            file.write(value[20:21])


def distinct(got: list[Got]) -> dict[tuple[str, int, int], bytes]:
    """The batches by identity; what is there twice must be the same."""
    batches: dict[tuple[str, int, int], bytes] = {}
    for one in got:
        assert batches.setdefault(one.identity, one.value) == one.value
    return batches
