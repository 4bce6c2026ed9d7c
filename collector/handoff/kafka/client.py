"""librdkafka: one producer, the settings that exactness needs, and errors with their fix.

Idempotence is off by default and a message may wait five minutes: both are set here, and what an operator passes
through cannot change them.

One group of messages is on its way at a time, and each is sent off whole. That is not for exactness' sake. An
idempotent producer of librdkafka (2.16, `rd_kafka_toppar_producer_serve`) sends a partition nothing while five or more
messages of it are unconfirmed; and while messages wait behind them longer than `linger.ms`, its thread polls without
pause, which cost more CPU than all else it does (docs/decisions/0026). Nothing of ours ever waits behind anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Sent

from collector.config import Kafka
from collector.errors import CollectorError
from collector.handoff.kafka.messages import Message
from wire.kafka.client import Explainer, Told, text_of
from wire.kafka.client import connection as kafka_connection
from wire.kafka.topics import MAX_VALUE_BYTES, OVERHEAD_BYTES
from wire.limits import MAX_BATCH_BYTES

GROUP_BYTES = 768 << 10
"""Of the log, published together: with keys and headers less than MAX_BATCH_BYTES, which one request takes."""
MAX_MESSAGES = 100_000
"""More than a group's bytes can hold."""
QUEUE_KIB = (2 * MAX_VALUE_BYTES) >> 10
"""librdkafka's memory: a group, or one message that is larger."""
LINGER_MS = 1_000
"""Longer than a group takes to be put together; `flush` sends it off at once."""
LOOK_SECONDS = 0.25
PURGE_SECONDS = 5.0

_OURS = frozenset(
    {
        "bootstrap.servers", "metadata.broker.list", "enable.idempotence", "acks", "request.required.acks",
        "message.timeout.ms", "delivery.timeout.ms", "linger.ms", "queue.buffering.max.ms",
        "queue.buffering.max.kbytes", "queue.buffering.max.messages", "batch.size", "batch.num.messages",
        "message.max.bytes", "partitioner",
        "allow.auto.create.topics", "transactional.id", "enable.gapless.guarantee", "error_cb",
        "delivery.report.only.error", "dr_cb", "on_delivery",
    }
)  # fmt: skip
"""Exactness, order or the bound of memory hangs on these."""

_EXPLAINER = Explainer(
    "handoff.kafka",
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED: "allow this user WRITE and DESCRIBE on the topics, READ to replay them",
        KafkaError.CLUSTER_AUTHORIZATION_FAILED: "allow this user IDEMPOTENT_WRITE on the cluster, and CREATE where it"
        " shall make topics",
        KafkaError.UNKNOWN_TOPIC_OR_PART: "create the topic, or set `handoff.kafka.create_topics`",
        KafkaError._UNKNOWN_TOPIC: "create the topic, or set `handoff.kafka.create_topics`",
        KafkaError.MSG_SIZE_TOO_LARGE: f"set the topic's max.message.bytes to {MAX_VALUE_BYTES + OVERHEAD_BYTES}",
        KafkaError.NOT_ENOUGH_REPLICAS: "brokers are away: fewer replicas in sync than min.insync.replicas",
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND: "brokers are away: fewer replicas in sync than min.insync.replicas",
    },
)


class KafkaAway(CollectorError):
    """Nothing can be published now; the message names the fix."""


def configuration(kafka: Kafka) -> dict[str, Any]:
    """What librdkafka is told. CollectorError for what is not an operator's to choose."""
    taken = sorted(_OURS.intersection(kafka.client))
    if taken:
        raise CollectorError(
            f"handoff.kafka.client: {taken[0]} is set by Weighbridge itself, or has a key of its own; take it out"
        )
    timeout_ms = round(kafka.delivery_timeout * 1_000)
    return {
        # One host's batches repeat each other: of 100 rows, half of the bytes are the same container table.
        "compression.type": "lz4",
        **connection(kafka),
        "enable.idempotence": True,
        "acks": "all",
        "message.timeout.ms": timeout_ms,
        "linger.ms": min(LINGER_MS, timeout_ms // 2),
        # One request for a group, whatever its partitions; a topic takes as much.
        "batch.size": MAX_BATCH_BYTES,
        "batch.num.messages": MAX_MESSAGES,
        "queue.buffering.max.kbytes": QUEUE_KIB,
        "queue.buffering.max.messages": MAX_MESSAGES,
        "message.max.bytes": MAX_VALUE_BYTES + OVERHEAD_BYTES,
        # As Java's clients spread keys, so that others who write or look up find the same partition.
        "partitioner": "murmur2_random",
        "allow.auto.create.topics": False,
    }


def connection(kafka: Kafka) -> dict[str, Any]:
    """How brokers are reached: the same for who writes and who reads."""
    return kafka_connection("weighbridge-collector", kafka.brokers, kafka.client, kafka.delivery_timeout)


def explained(what: str, error: KafkaError | Exception, said: KafkaError | None) -> KafkaAway:
    """`error` as a person needs it. `said`: what librdkafka was last told."""
    return KafkaAway(_EXPLAINER.explain(what, error, said))


class Client:
    """One producer and what it was last told. Of one thread."""

    def __init__(self, kafka: Kafka) -> None:
        self._told = Told()
        self._timeout = kafka.delivery_timeout
        self.configuration = {**configuration(kafka), "error_cb": self._told}
        try:
            self.producer = Producer(self.configuration)
        except (KafkaException, TypeError, ValueError) as error:
            raise CollectorError(f"handoff.kafka.client: {text_of(error)}") from error

    def deliver(self, messages: Iterable[Message]) -> int:
        """Publish them and wait until every one is confirmed; how many they were. KafkaAway at the first that is not."""
        waiting = 0
        failed: list[KafkaError] = []

        def report(error: KafkaError | None, _sent: Sent) -> None:
            nonlocal waiting
            waiting -= 1
            if error is not None:
                failed.append(error)

        produce = self.producer.produce
        for topic, key, value, headers in messages:
            try:
                produce(topic, value, key, on_delivery=report, headers=headers)
            except (KafkaException, BufferError) as error:
                raise self.away(error, f"{topic} did not take a batch") from error
            waiting += 1
        count = waiting
        while waiting:
            self.producer.flush(LOOK_SECONDS)
            if failed:
                raise self.away(failed[0], f"not confirmed within {self._timeout:g} s")
        self._told.last = None  # what was told before is no cause of what comes
        return count

    def away(self, error: KafkaError | Exception, what: str) -> KafkaAway:
        """`error` as a person needs it."""
        self.producer.poll(0)
        return explained(what, error, self._told.last)

    def close(self) -> None:
        """Forget what is on its way: it is in the log."""
        self.producer.purge()
        self.producer.flush(PURGE_SECONDS)
