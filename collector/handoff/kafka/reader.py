"""What the topics hold, read back in the order in which it arrived at the collectors.

A stream's batches stand in several topics (parked and rejected ones in their own), and those of several tenants in several
partitions. Each partition is in order; together they are read as one, always on from the partition whose next record
arrived first. What is read ahead of that is bounded: a partition that is far ahead of the others pauses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Got

from collector.config import Kafka
from collector.errors import CollectorError
from collector.handoff.kafka.client import connection, explained
from wire.kafka.client import Told
from wire.kafka.topics import MAX_VALUE_BYTES, OVERHEAD_BYTES

AHEAD_BYTES = 64 << 20
"""Read and not given yet, of all partitions together; and a record of each."""
FETCHED_KIB = 16 << 10
MESSAGES_AT_ONCE = 500
_NS_A_MS = 1_000_000


class Entry(NamedTuple):
    """One record of a topic."""

    place: str
    """For people."""
    read: int
    """How many were read up to it."""
    headers: dict[str, bytes]
    value: bytes


class _Partition:
    """One partition, from where it is read up to its end."""

    def __init__(self, topic: str, number: int, start: int, end: int) -> None:
        self.topic, self.number = topic, number
        self.start = self.next = start
        self.end = end
        self.ahead: deque[tuple[int, int, Entry]] = deque()
        """(received at, bytes, entry) of what is read and not given."""
        self.bytes = 0
        self.paused = False

    @property
    def behind(self) -> bool:
        """Nobody knows what comes next here."""
        return not self.ahead and self.next < self.end

    def at(self, offset: int) -> TopicPartition:
        return TopicPartition(self.topic, self.number, offset)


class TopicReader:
    """One pass over topics, from what was published at a time on (None: all there is) up to now. `total`: how many records."""

    def __init__(self, kafka: Kafka, topics: Sequence[str], since_unix_ms: int | None) -> None:
        """CollectorError when nobody answers, or a topic is not there."""
        self._seconds = float(kafka.delivery_timeout)
        self._told = Told()
        settings = connection(kafka) | {
            # Places are ours to keep: the group has no members and no offsets.
            "group.id": "weighbridge-replay",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "check.crcs": True,
            "queued.max.messages.kbytes": FETCHED_KIB,
            "fetch.message.max.bytes": MAX_VALUE_BYTES + OVERHEAD_BYTES,
            "error_cb": self._told,
        }
        try:
            self._consumer = Consumer(settings)
        except (KafkaException, TypeError, ValueError) as error:
            raise CollectorError(f"handoff.kafka.client: {error}") from error
        try:
            found = [self._range(topic, number, since_unix_ms) for topic, number in self._places(topics)]
        except KafkaException as error:
            self.close()
            raise explained("the topics cannot be read", error, self._told.last) from error
        except CollectorError:
            self.close()
            raise
        self._partitions = {(part.topic, part.number): part for part in found}
        self._most_bytes = AHEAD_BYTES // max(1, len(found))
        self.total = sum(part.end - part.start for part in found)

    def close(self) -> None:
        self._consumer.close()

    def entries(self) -> Iterator[Entry]:
        """Every record, once. CollectorError when the brokers are away for longer than `delivery_timeout`."""
        parts = self._partitions.values()
        self._consumer.assign([part.at(part.next) for part in parts if part.behind])
        while True:
            if any(part.behind for part in parts):
                self._fetch()
                continue
            first = min(
                (part for part in parts if part.ahead), key=lambda part: part.ahead[0][0], default=None
            )
            if first is None:
                return
            _, size, entry = first.ahead.popleft()
            first.bytes -= size
            if first.paused and first.bytes < self._most_bytes // 2:
                self._consumer.resume([first.at(first.next)])
                first.paused = False
            done = sum(part.next - part.start - len(part.ahead) for part in parts)
            yield entry._replace(read=done)

    def _places(self, topics: Sequence[str]) -> Iterator[tuple[str, int]]:
        # All of them: asking for one by name could make it, with the brokers' defaults.
        known = self._consumer.list_topics(timeout=self._seconds).topics
        for topic in topics:
            if topic not in known:
                raise CollectorError(f"there is no topic {topic}; see `handoff.kafka.topic`")
            for number in sorted(known[topic].partitions):
                yield topic, number

    def _range(self, topic: str, number: int, since_unix_ms: int | None) -> _Partition:
        marks = self._consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=self._seconds)
        if marks is None:
            raise CollectorError(f"{topic}/{number}: no answer within {self._seconds:g} s; is its leader up?")
        start, end = marks
        if since_unix_ms is not None:
            asked = [TopicPartition(topic, number, since_unix_ms)]
            (told,) = self._consumer.offsets_for_times(asked, timeout=self._seconds)
            start = max(start, told.offset) if told.offset >= 0 else end
        return _Partition(topic, number, start, end)

    def _fetch(self) -> None:
        """Read on, wherever there is something."""
        deadline = time.monotonic() + self._seconds
        while not (messages := self._consumer.consume(MESSAGES_AT_ONCE, timeout=1.0)):
            if time.monotonic() > deadline:
                silent = KafkaError(KafkaError._TIMED_OUT)
                raise explained(f"nothing came for {self._seconds:g} s", silent, self._told.last)
        for message in messages:
            self._take(message)

    def _take(self, message: Got) -> None:
        part = self._partitions[message.topic() or "", message.partition() or 0]
        error = message.error()
        if error is not None and error.code() == KafkaError._PARTITION_EOF:
            part.next = part.end  # what the end had was no record of anybody's
            return
        if error is not None:
            raise explained(f"{part.topic}/{part.number} cannot be read", error, self._told.last)
        self._told.last = None
        offset = message.offset()
        assert offset is not None
        part.next = max(part.next, min(offset + 1, part.end))
        if offset < part.end:
            pairs = dict(message.headers() or ())
            headers = {name: value for name, value in pairs.items() if isinstance(value, bytes)}
            value = message.value() or b""
            assert isinstance(value, bytes)
            entry = Entry(f"{part.topic}/{part.number} at offset {offset}", 0, headers, value)
            part.ahead.append((_received_at_unix_ns(message, headers), len(value), entry))
            part.bytes += len(value)
        if not part.paused and (part.bytes > self._most_bytes or part.next >= part.end):
            self._consumer.pause([part.at(part.next)])
            part.paused = True


def _received_at_unix_ns(message: Got, headers: dict[str, bytes]) -> int:
    """When it came to a collector; of what no collector wrote, when it was published."""
    said = headers.get("received_at", b"")
    return int(said) if said.isdigit() and len(said) < 20 else message.timestamp()[1] * _NS_A_MS
