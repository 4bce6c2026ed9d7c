"""The one thread that reads the log and publishes it, in order, from the cursor on.

    log ─► Tail ─► claims ─► group of messages ─► librdkafka ─► delivery reports ─► marks ─► cursor ─► receipts ─► answers

Invariants. Nothing is published that is not durable in the log, and nothing is published out of memory: what a
restart does is what the daemon does all the time. The cursor passes a group when the brokers have confirmed every
message of it and of all before it. Unconfirmed bytes are bounded by `in_flight` and one group.

Failure model. Whatever goes wrong (a message not confirmed within `delivery_timeout`, a topic gone, credentials
refused, a fatal error of the idempotent producer) ends a session: the producer is thrown away with all that was on its
way, and after a pause a new one begins at the cursor. Some messages are then in the topic twice with identical
bytes, and what may be a second one says so (`dedup=unverified`). Nothing is ever skipped but what another collector has
delivered: what cannot be published stops the rest, is named, and agents keep their batches.

Claims and marks, with other collectors beside this one, are `sharing`'s.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Message as Sent

from collector.config import Kafka
from collector.decide.claims import Fate, Numbered, StreamId
from collector.errors import CollectorError
from collector.handoff.kafka.client import Client, KafkaAway
from collector.handoff.kafka.cursor import Cursor
from collector.handoff.kafka.messages import Topics, conflict_of, message_of
from collector.handoff.kafka.sharing import Fated, Sharing
from collector.handoff.kafka.topics import TopicCheck
from collector.handoff.log import Record, Tail
from wire.daemon.journal import Journal

GROUP_BYTES = 512 << 10
POLL_SECONDS = 0.005
"""While reports are awaited: how long what has newly come waits at most."""
IDLE_SECONDS = 0.25
PAUSE_SECONDS = 1.0
"""Between two sessions."""
HELD_SECONDS = 0.2
"""Between two looks at a batch that another collector is publishing."""

log = Journal("collector.kafka")

News = Callable[[int, str], object]
"""Called from the publisher's thread: offset up to which the log is confirmed, and the trouble, if any."""


class _Group:
    """Messages that were read together."""

    __slots__ = ("batches", "bytes", "end", "error", "left", "messages")

    def __init__(self, end: int, size: int, batches: dict[StreamId, list[Numbered]]) -> None:
        self.end, self.bytes, self.batches = end, size, batches
        self.messages = self.left = 0
        self.error: KafkaError | None = None

    def report(self, error: KafkaError | None, _sent: Sent) -> None:
        """A delivery report; called by `poll`."""
        self.left -= 1
        if error is not None:
            self.error = error


class Publisher:
    def __init__(
        self,
        kafka: Kafka,
        log_directory: Path,
        cursor: Cursor,
        durable_end: int,
        news: News,
        sharing: Sharing,
    ) -> None:
        """Begins at once. CollectorError when librdkafka does not take the settings; brokers that are away are no error."""
        Client(kafka).close()
        self._kafka = kafka
        self._directory = log_directory
        self._cursor = cursor
        self._news = news
        self.sharing = sharing
        self._read: deque[Record] = deque()
        """Records of the log that were read and not yet sent."""
        self._held_until = 0.0
        """Monotonic seconds."""
        self._topics = Topics.of(kafka.topic)
        self._wake = threading.Condition()
        self._durable_end = durable_end
        self._closing = False
        self._trouble = ""
        self._advice: set[str] = set()
        self.published = 0
        """Messages confirmed since the start."""
        self.unverified = 0
        """Messages published as such, since the start."""
        self.sessions_broken = 0
        self._thread = threading.Thread(target=self._run, name="kafka-publisher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def durable(self, end: int) -> None:
        """The log is durable up to `end`, the end of a record."""
        with self._wake:
            if end > self._durable_end:
                self._durable_end = end
                self._wake.notify()

    def close(self) -> None:
        """Wait for what is on its way, `delivery_timeout` at most; the rest is in the log."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._session()
            except (CollectorError, KafkaException, OSError) as error:
                self.sessions_broken += 1
                self._in_trouble(str(error))
                self._pause(PAUSE_SECONDS)

    def _session(self) -> None:
        """Publish until told to close. KafkaAway, LogError, OSError end it."""
        client = Client(self._kafka)
        tail = Tail(self._directory, self._cursor.offset)
        self._read.clear()
        try:
            self._check_topics(client)
            self._publish(client, tail)
        finally:
            tail.close()
            client.close()
            sent_end = self._read[0].offset if self._read else tail.offset
            self.sharing.handed_over_end = max(self.sharing.handed_over_end, sent_end)

    def _check_topics(self, client: Client) -> None:
        found = TopicCheck(client, self._kafka).findings(make=True)
        for finding in found:
            if finding.stops:
                raise KafkaAway(finding.text)
        advice = {finding.text for finding in found}
        for text in sorted(advice - self._advice):
            log.warning("topic_settings_weak", finding=text)
        self._advice = advice

    def _publish(self, client: Client, tail: Tail) -> None:
        groups: deque[_Group] = deque()
        unconfirmed = 0
        if tail.offset >= self._durable_end:
            self._confirmed()  # nothing to try it with: that the topics answer is the best there is to know
        while not (self._closing and not groups):
            while not self._closing and unconfirmed < self._kafka.in_flight:
                group = self._send(client, tail)
                if group is None:
                    break
                groups.append(group)
                unconfirmed += group.bytes
            client.producer.poll(POLL_SECONDS if groups else 0)
            if any(group.error is not None for group in groups):
                error = next(group.error for group in groups if group.error is not None)
                raise client.away(error, f"not confirmed within {self._kafka.delivery_timeout:g} s")
            whole: list[_Group] = []
            while groups and groups[0].left == 0:
                whole.append(groups.popleft())
            if whole:
                unconfirmed -= sum(group.bytes for group in whole)
                self._delivered(whole)
                client.is_well()
                self._confirmed()
            if not groups and self._read:
                self._pause(HELD_SECONDS)
            elif not groups:
                self._wait(tail.offset)

    def _send(self, client: Client, tail: Tail) -> _Group | None:
        """Hand the next records to librdkafka; None if there are none, or another collector holds the next one."""
        if time.monotonic() < self._held_until:
            return None
        if not self._read:
            self._read.extend(tail.read(self._durable_end, GROUP_BYTES))
        fated = self.sharing.fates(self._read, time.time_ns())
        if not fated and self._read:
            self._held_until = time.monotonic() + HELD_SECONDS
        if not fated:
            return None
        end, start = fated[-1][0].end, fated[0][0].offset
        group = _Group(end, end - start, self.sharing.to_mark(fated))
        for one in fated:
            self._produce(client, group, one)
            self._read.popleft()
        return group

    def _produce(self, client: Client, group: _Group, fated: Fated) -> None:
        record, fate, claimed = fated
        if fate is Fate.SKIP:
            return
        if fate is Fate.REFUSE and claimed is not None:
            message = conflict_of(record, self._topics, claimed.known)
        else:
            published = message_of(record, self._topics, self._kafka.giants, fate is Fate.UNVERIFIED)
            if published is None:
                return
            message = published
            self.unverified += fate is Fate.UNVERIFIED
        group.messages += 1
        group.left += 1
        try:
            client.producer.produce(
                message.topic, message.value, message.key, on_delivery=group.report, headers=message.headers
            )
        except (KafkaException, BufferError) as error:
            raise client.away(error, f"{message.topic} did not take a batch") from error

    def _delivered(self, groups: list[_Group]) -> None:
        """The brokers have them: the other collectors know it before the cursor does, and the cursor before agents."""
        batches: dict[StreamId, list[Numbered]] = {}
        for group in groups:
            self.published += group.messages
            for stream, numbered in group.batches.items():
                batches.setdefault(stream, []).extend(numbered)
        self.sharing.delivered(batches)
        self._cursor.advance(groups[-1].end)

    def _confirmed(self) -> None:
        if self._trouble:
            log.info("kafka_recovered")
        self._trouble = ""
        self._news(self._cursor.offset, "")

    def _in_trouble(self, text: str) -> None:
        if text != self._trouble:
            log.error("kafka_unavailable", code="METER-001", trouble=text)
        self._trouble = text
        self._news(self._cursor.offset, text)

    def _wait(self, read_up_to: int) -> None:
        with self._wake:
            if self._durable_end <= read_up_to and not self._closing:
                self._wake.wait(IDLE_SECONDS)

    def _pause(self, seconds: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._closing, seconds)
