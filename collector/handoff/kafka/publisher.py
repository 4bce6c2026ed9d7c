"""The one thread that reads the log and publishes it, in order, from the cursor on.

    log ─► Tail ─► claims ─► group of messages ─► librdkafka ─► delivery reports ─► marks ─► cursor ─► receipts ─► answers

Invariants. Nothing is published that is not durable in the log, in the log's order and from its offsets: what a restart
does is what the daemon does all the time. That bytes which were just synced need not be read back (`Recent`) changes
nothing of it: whatever is not there any more is read from the disk, and verified. One group is on its way at a time,
and the cursor passes it when the brokers have confirmed every message of it; what has come meanwhile is the next, so
groups grow with the load.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from confluent_kafka import KafkaException

from collector.config import Kafka
from collector.decide.claims import Fate
from collector.errors import CollectorError
from collector.handoff.kafka.client import GROUP_BYTES, Client, KafkaAway
from collector.handoff.kafka.cursor import Cursor
from collector.handoff.kafka.messages import Message, conflict_of, message_of
from collector.handoff.kafka.sharing import Fated, Sharing
from collector.handoff.kafka.topics import TopicCheck
from collector.handoff.log import Recent, Record, Tail
from wire.daemon.journal import Journal
from wire.kafka.topics import Topics

IDLE_SECONDS = 0.25
PAUSE_SECONDS = 1.0
"""Between two sessions."""
HELD_SECONDS = 0.2
"""Between two looks at a batch that another collector is publishing."""

log = Journal("collector.kafka")

News = Callable[[int, str], object]
"""Called from the publisher's thread: offset up to which the log is confirmed, and the trouble, if any."""


class Publisher:
    def __init__(
        self,
        kafka: Kafka,
        log_directory: Path,
        recent: Recent,
        cursor: Cursor,
        durable_end: int,
        news: News,
        sharing: Sharing,
    ) -> None:
        """Begins at once. CollectorError when librdkafka does not take the settings; brokers that are away are no error."""
        Client(kafka).close()
        self._kafka = kafka
        self._directory = log_directory
        self._recent = recent
        self._cursor = cursor
        self._news = news
        self.sharing = sharing
        self._read: deque[Record] = deque()
        """Records of the log that were read and not yet handed over."""
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
        tail = Tail(self._directory, self._cursor.offset, self._recent)
        self._read.clear()
        try:
            self._check_topics(client)
            self._publish(client, tail)
        finally:
            tail.close()
            client.close()
            self.sharing.handed_over_end = max(self.sharing.handed_over_end, self._next_offset(tail))

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
        if tail.offset >= self._durable_end:
            self._confirmed()  # nothing to try it with: that the topics answer is the best there is to know
        while not self._closing:
            if not self._read:
                self._read.extend(tail.read(self._durable_end, GROUP_BYTES))
            fated = self.sharing.fates(self._read, time.time_ns()) if self._read else []
            if fated:
                self._deliver(client, tail, fated)
            client.producer.poll(0)
            if self._read and not fated:
                self._pause(HELD_SECONDS)
            elif not self._read:
                self._wait(tail.offset)

    def _deliver(self, client: Client, tail: Tail, fated: list[Fated]) -> None:
        """Publish one group: the other collectors know of it before the cursor does, and the cursor before agents."""
        for _ in fated:
            self._read.popleft()
        self.published += client.deliver(self._messages(fated))
        self.sharing.delivered(self.sharing.to_mark(fated))
        self._cursor.advance(self._next_offset(tail))
        self._confirmed()

    def _messages(self, fated: Iterable[Fated]) -> Iterator[Message]:
        for record, fate, claimed in fated:
            if fate is Fate.SKIP:
                continue
            if fate is Fate.REFUSE and claimed is not None:
                yield conflict_of(record, self._topics, claimed.known)
                continue
            message = message_of(record, self._topics, self._kafka.giants, fate is Fate.UNVERIFIED)
            if message is not None:
                self.unverified += fate is Fate.UNVERIFIED
                yield message

    def _next_offset(self, tail: Tail) -> int:
        """Of the first record that was not yet handed over."""
        return self._read[0].offset if self._read else tail.offset

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
