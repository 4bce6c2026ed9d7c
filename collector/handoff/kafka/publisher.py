"""The one thread that reads the log and publishes it, in order, from the cursor on.

    log ─► Tail ─► group of messages ─► librdkafka ─► delivery reports ─► cursor ─► receipts ─► answers

Invariants. Nothing is published that is not durable in the log, in the log's order and from its offsets: what a restart
does is what the daemon does all the time. That bytes which were just synced need not be read back (`Recent`) changes
nothing of it: whatever is not there any more is read from the disk, and verified. One group is on its way at a time,
and the cursor passes it when the brokers have confirmed every message of it; what has come meanwhile is the next, so
groups grow with the load.

Failure model. Whatever goes wrong (a message not confirmed within `delivery_timeout`, a topic gone, credentials
refused, a fatal error of the idempotent producer) ends a session: the producer is thrown away with all that was on its
way, and after a pause a new one begins at the cursor. Some messages are then in the topic twice with identical
bytes. Nothing is ever skipped: what cannot be published stops the rest, is named, and agents keep their batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import KafkaException

from collector.config import Kafka
from collector.errors import CollectorError
from collector.handoff.kafka.client import GROUP_BYTES, Client, KafkaAway
from collector.handoff.kafka.cursor import Cursor
from collector.handoff.kafka.messages import Topics, message_of
from collector.handoff.kafka.topics import TopicCheck
from collector.handoff.log import Recent, Tail
from wire.daemon.journal import Journal

IDLE_SECONDS = 0.25
PAUSE_SECONDS = 1.0
"""Between two sessions."""

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
    ) -> None:
        """Begins at once. CollectorError when librdkafka does not take the settings; brokers that are away are no error."""
        Client(kafka).close()
        self._kafka = kafka
        self._directory = log_directory
        self._recent = recent
        self._cursor = cursor
        self._news = news
        self._topics = Topics.of(kafka.topic)
        self._wake = threading.Condition()
        self._durable_end = durable_end
        self._closing = False
        self._trouble = ""
        self._advice: set[str] = set()
        self.published = 0
        """Messages confirmed since the start."""
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
        try:
            self._check_topics(client)
            self._publish(client, tail)
        finally:
            tail.close()
            client.close()

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
            if tail.offset < self._durable_end:
                records = tail.read(self._durable_end, GROUP_BYTES)
                messages = (message_of(record, self._topics, self._kafka.giants) for record in records)
                self.published += client.deliver(message for message in messages if message is not None)
                self._cursor.advance(tail.offset)
                self._confirmed()
            client.producer.poll(0)
            self._wait(tail.offset)

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
