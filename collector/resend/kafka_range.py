"""What collectors have handed off to Kafka, as batches to be sent again.

Each comes under the identity it was born with: what was accepted, parked or released, and what was rejected, whose
place in its stream is used up, too. One that was parked and released is in two topics; the second is a duplicate. What
was refused is no part of a stream, and stays where it is.
"""

from __future__ import annotations

import re

from collector.config import Settings
from collector.errors import CollectorError
from collector.handoff.kafka.reader import Entry, TopicReader
from collector.resend.batches import Found, Source, unreadable
from collector.resend.files import of_identity
from wire.identity import AgentId, BatchId, digest
from wire.kafka.topics import Topics

CLOCK_MARGIN_NS = 3_600 * 10**9
"""So far the clocks of collectors and brokers may differ."""
_NS_A_MS = 1_000_000
_AGENT = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER = re.compile(rb"[0-9]{1,19}")


class KafkaRange:
    """The topics of `handoff.kafka`, up to now; `total` records of them are read."""

    def __init__(self, settings: Settings, start_unix_ns: int | None) -> None:
        """CollectorError when they cannot be read. `start_unix_ns`: older usage is not asked for."""
        kafka = settings.handoff.kafka
        if not kafka.brokers:
            raise CollectorError("no Kafka in the settings: set `handoff.kafka.brokers`")
        since = None
        if start_unix_ns is not None:
            # No batch that ends later was published sooner. But any time later: a spool may be weeks old.
            earliest = start_unix_ns - settings.validation.clock_ahead.ns - CLOCK_MARGIN_NS
            since = max(0, earliest) // _NS_A_MS
        self.topics = Topics.of(kafka.topic)
        self._reader = TopicReader(kafka, self.topics, since)
        self.total = self._reader.total

    def batches(self) -> Source:
        """Every batch, and every record that is none."""
        try:
            yield from filter(None, map(_found, self._reader.entries()))
        finally:
            self._reader.close()


def _found(entry: Entry) -> Found | None:
    """None: no part of a stream."""
    headers = entry.headers
    if headers.get("kind") == b"refused":
        return None
    agent_id, epoch, seq = (headers.get(name, b"") for name in ("agent_id", "epoch", "seq"))
    if not (_AGENT.fullmatch(agent_id) and _NUMBER.fullmatch(epoch) and _NUMBER.fullmatch(seq)):
        return unreadable(entry.place, entry.read, "no batch of a collector: its headers are missing")
    if headers.get("digest") != digest(entry.value).hex().encode():
        return unreadable(entry.place, entry.read, "damaged: these are not the bytes of its digest")
    identity = BatchId(AgentId(agent_id.decode()), int(epoch), int(seq))
    return of_identity(entry.place, entry.read, identity, entry.value)
