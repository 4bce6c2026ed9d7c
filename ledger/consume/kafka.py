"""The topics of any number of collectors, read from the ledger's own positions.

Strategy. All partitions of the three topics are assigned by hand: there is no group whose offsets could say something
else than the books. Every LOOK_SECONDS the brokers are asked which partitions there are. Of what was never read, the first
record that they have then is the position, and held on to as any other. `read` hands over what comes, in the order of each
partition; between partitions there is none, and nobody may assume it.

Failure model. Brokers that are away, a partition without a leader, a right that is missing: `trouble` says so, the other
partitions go on, and it is tried again by itself. Records that retention took before they were read are in `lost`, and it
goes on with what is kept. A position behind the end of a partition is that of another topic: a LedgerError.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Got

from ledger.config import Kafka
from ledger.consume.arrival import Arrival
from ledger.consume.messages import Message, arrival_of
from ledger.errors import LedgerError
from wire.kafka.client import Explainer, Told, connection, text_of
from wire.kafka.topics import MAX_VALUE_BYTES, OVERHEAD_BYTES, Topics
from wire.statuses import Meter

FETCHED_KIB = 16 << 10
"""librdkafka's memory of what is fetched and not read, of all partitions together; a fetch may be more."""
LOOK_SECONDS = 30.0
AGAIN_SECONDS = 2.0
"""To the next look while something is wrong."""
_LEAST_BYTES = 1 << 10
"""What an arrival is taken to weigh beside its body."""
_ANSWER_SECONDS = 5.0
_SLICE_SECONDS = 0.5
_NS_A_MS = 1_000_000

_OURS = frozenset(
    {
        "bootstrap.servers", "metadata.broker.list", "group.id", "enable.auto.commit", "auto.commit.enable",
        "enable.auto.offset.store", "auto.offset.reset", "enable.partition.eof", "check.crcs", "isolation.level",
        "queued.max.messages.kbytes", "fetch.max.bytes", "fetch.message.max.bytes", "max.partition.fetch.bytes",
        "allow.auto.create.topics", "error_cb",
    }
)  # fmt: skip
"""That nothing is skipped, and the bound of memory, hang on these."""

_EXPLAINER = Explainer(
    "kafka",
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED: "allow this user READ and DESCRIBE on the topics",
        KafkaError.UNKNOWN_TOPIC_OR_PART: "a collector with `handoff.kafka` makes it at its start; see `source.kafka.topic`",
        KafkaError._UNKNOWN_TOPIC: "a collector with `handoff.kafka` makes it at its first start; see `source.kafka.topic`",
    },
)


class KafkaSource:
    """One consumer."""

    def __init__(self, settings: Kafka, positions: dict[str, int]) -> None:
        """LedgerError for settings that cannot be. That no broker answers is no error, but `trouble`."""
        taken = sorted(_OURS.intersection(settings.client))
        if taken:
            raise LedgerError(f"source.kafka.client: {taken[0]} is set by Weighbridge itself; take it out")
        self.lost: dict[str, tuple[int, int]] = {}
        self._topics = Topics.of(settings.topic)
        self._positions = dict(positions)
        self._parts: dict[str, tuple[str, int]] = {}
        """Place -> (topic, partition) of what had a leader once: assigned, or refused."""
        self._told = Told()
        self._away = ""
        """What is wrong with the brokers or the topics, as of the last look."""
        self._refusals: dict[str, str] = {}
        """Place -> why it cannot be read."""
        self._halted: set[str] = set()
        """Where something was not read: librdkafka may go on behind it, and nobody else does before it is tried again. What it
        says there is of its own making."""
        self._answered: set[str] = set()
        """Of those refused, what had an answer since, at the last look."""
        self._asked: dict[str, float] = {}
        """Place -> when its brokers were last asked in vain what they have of it."""
        self._replaced = ""
        """Once it is said there is no going on."""
        self._next_look = 0.0
        self._answer_seconds = min(_ANSWER_SECONDS, float(settings.timeout))
        client = connection("weighbridge-ledger", settings.brokers, settings.client, settings.timeout)
        try:
            self._consumer = Consumer(
                client
                | {
                    "group.id": "weighbridge-ledger",  # of which there are no members and no offsets
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "error",
                    "check.crcs": True,
                    "queued.max.messages.kbytes": FETCHED_KIB,
                    "fetch.max.bytes": FETCHED_KIB << 10,
                    "fetch.message.max.bytes": MAX_VALUE_BYTES + OVERHEAD_BYTES,
                    "allow.auto.create.topics": False,
                    "error_cb": self._told,
                }
            )
        except (KafkaException, TypeError, ValueError) as error:
            raise LedgerError(f"source.kafka.client: {text_of(error)}") from error

    @property
    def places(self) -> tuple[str, ...]:
        """ "TOPIC/PARTITION" of every partition that is known."""
        return tuple(sorted(self._positions.keys() | self._parts.keys()))

    @property
    def trouble(self) -> str:
        text = self._away or next(iter(self._refusals.values()), "")
        return f"{Meter.DATABASE_UNAVAILABLE} {text}" if text else ""

    def read(self, most_bytes: int, wait_seconds: float) -> list[Arrival]:
        """It may take `_ANSWER_SECONDS` longer while brokers do not answer, and once more while there are partitions that were
        never read. LedgerError when the topic is another one than `positions` is of."""
        deadline = time.monotonic() + wait_seconds
        found: list[Arrival] = []
        size = 0
        while size < most_bytes:
            now = time.monotonic()
            if not found and now >= self._next_look:
                self._look(now)
            if not found and self._replaced:
                raise LedgerError(self._replaced)
            left = max(0.0, deadline - time.monotonic())
            got = self._consumer.poll(0.0 if found else min(left, _SLICE_SECONDS))
            if got is not None and (arrival := self._take(got)) is not None:
                found.append(arrival)
                size += len(arrival.body) + _LEAST_BYTES
            if got is None and self._told.last is not None:
                self._next_look = min(self._next_look, now + AGAIN_SECONDS)
            if got is None and (found or time.monotonic() >= deadline):
                break
        return found

    def positions(self) -> dict[str, int]:
        return dict(self._positions)

    def lag(self) -> int:
        """Records, by the ends that came with the last fetch of each partition."""
        return sum(
            max(0, end - self._positions.get(place, 0))
            for place in self._parts
            if (end := self._end_of(place)) is not None
        )

    def close(self) -> None:
        self._consumer.close()

    def _end_of(self, place: str) -> int | None:
        """As of the last fetch; None: nothing was fetched since it was assigned."""
        part = TopicPartition(*self._parts[place])
        marks = self._consumer.get_watermark_offsets(part, cached=True)
        return None if marks is None or marks[1] < 0 else marks[1]

    def _look(self, now: float) -> None:
        """Which partitions there are, and whether they can be read."""
        self._next_look = now + AGAIN_SECONDS
        try:
            # All of them: asking for one by name could make it, with the brokers' defaults.
            known = self._consumer.list_topics(timeout=self._answer_seconds).topics
        except KafkaException as error:
            self._away = _EXPLAINER.explain("no broker answers", error, self._told.last)
            return
        self._told.last = None
        parts: dict[str, tuple[str, int]] = {}
        leaderless: list[str] = []
        missing: list[str] = []
        for topic in self._topics:
            described = known.get(topic)
            if described is None or described.error is not None:
                missing.append(topic)
                continue
            for number, partition in described.partitions.items():
                if partition.leader < 0:
                    leaderless.append(f"{topic}/{number}")
                else:
                    parts[f"{topic}/{number}"] = (topic, number)
        self._away = _missing(missing) or _leaderless(leaderless)
        self._try_again()
        fresh = parts.keys() - self._parts.keys()
        self._parts |= parts
        self._assign(fresh)
        if not (self._away or self._refusals):
            self._next_look = now + LOOK_SECONDS

    def _try_again(self) -> None:
        """What was refused. It is over when a try brought something, or nothing but an end: that is known as soon as a fetch
        came back, and by the next look also what was wrong with it. A try of which nothing came back yet goes on: to assign
        anew drops what is on its way, and a fetch may take as long as from look to look."""
        answered = {
            place for place in self._refusals if place not in self._halted and self._end_of(place) is not None
        }
        for place in answered & self._answered:
            del self._refusals[place]
        self._answered = answered
        self._assign(tuple(self._halted))

    def _assign(self, places: Collection[str]) -> None:
        """Read these from their positions on; what was fetched of them and not read is fetched again. Always by number: where
        librdkafka looks for the beginning itself, what the brokers delete before it is read is passed over in silence."""
        self._halted.difference_update(places)
        parts: dict[tuple[str, int], TopicPartition] = {}
        self._find_beginnings([place for place in places if place not in self._positions])
        for place in places:
            if place in self._positions:
                parts[self._parts[place]] = TopicPartition(*self._parts[place], self._positions[place])
            else:
                self._refusals[place] = _silent(place)
                self._halt(place)
        if parts:
            assigned = {(part.topic, part.partition) for part in self._consumer.assignment()}
            self._consumer.incremental_unassign([parts[part] for part in parts.keys() & assigned])
            self._consumer.incremental_assign(list(parts.values()))

    def _find_beginnings(self, unread: Collection[str]) -> None:
        """One time limit for all of them, since those that can be read wait behind them. Who was asked longest ago comes first,
        with all the time there is: brokers that say nothing hold up nobody for good, nor does being many or far away."""
        deadline = time.monotonic() + self._answer_seconds
        for place in sorted(unread, key=lambda place: self._asked.get(place, 0.0)):
            now = time.monotonic()
            if now >= deadline:
                break
            if (marks := self._marks(place, deadline - now)) is None:
                self._asked[place] = now
            else:
                self._positions[place] = marks[0]
                self._asked.pop(place, None)

    def _take(self, got: Got) -> Arrival | None:
        topic, number, offset, error = got.topic(), got.partition(), got.offset(), got.error()
        if topic is None or number is None:
            if error is not None and error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
                self._told(error)
            return None
        place = f"{topic}/{number}"
        if place in self._halted:
            return None
        if error is not None:
            self._failed(place, error, offset)
            return None
        assert offset is not None
        if place in self._refusals and offset != self._positions[place]:
            self._halt(place)
            return None
        self._refusals.pop(place, None)
        self._positions[place] = offset + 1
        value = got.value() or b""
        assert isinstance(value, bytes)
        pairs = dict(got.headers() or ())
        headers = {name: text for name, text in pairs.items() if isinstance(text, bytes)}
        published = max(0, got.timestamp()[1]) * _NS_A_MS
        return arrival_of(Message(topic, headers, value, published), self._topics)

    def _halt(self, place: str) -> None:
        """It is not read on before the next look, which tries again."""
        self._next_look = min(self._next_look, time.monotonic() + AGAIN_SECONDS)
        self._halted.add(place)

    def _failed(self, place: str, error: KafkaError, offset: int | None) -> None:
        """`offset`: where. Behind a damaged record librdkafka takes bytes of it for offsets and goes on there: what is not at
        the position that is read is no news, and never what was lost."""
        self._halt(place)
        if error.code() not in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            self._refusals[place] = _EXPLAINER.explain(f"{place} cannot be read", error, None)
        elif offset == self._positions[place]:
            self._out_of_range(place, offset)
        else:
            self._refusals.setdefault(place, _EXPLAINER.explain(f"{place} cannot be read", error, None))

    def _marks(self, place: str, seconds: float) -> tuple[int, int] | None:
        """The first offset that the brokers have of it and the one behind their last; None: they do not say."""
        try:
            return self._consumer.get_watermark_offsets(TopicPartition(*self._parts[place]), timeout=seconds)
        except KafkaException:
            return None

    def _out_of_range(self, place: str, position: int) -> None:
        """The brokers do not have what comes next."""
        self._refusals[place] = _silent(place)
        marks = self._marks(place, self._answer_seconds)
        if marks is None:
            return
        low, end = marks
        if position < low:
            # What is written down as lost is written down once, also when it happens twice before anybody has.
            self.lost[place] = (self.lost.get(place, (position, low))[0], low)
            self._positions[place] = low
            self._assign([place])
            del self._refusals[place]
        elif position > end:
            self._replaced = (
                f"{place} was read up to {position}, and now it ends at {end}: the topic was made anew, or its brokers have"
                " forgotten what they had confirmed. `weighbridge-ledger reread` begins anew with it; what is booked stays"
                " booked once"
            )


def _missing(topics: list[str]) -> str:
    if not topics:
        return ""
    return (
        f"no topic {', '.join(topics)}: a collector with `handoff.kafka` makes it at its start; see `source.kafka.topic`, or"
        " allow this user DESCRIBE on it"
    )


def _leaderless(places: list[str]) -> str:
    if not places:
        return ""
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{places[0]}{more} has no leader: brokers are away; start them"


def _silent(place: str) -> str:
    return f"{place}: its brokers do not say what they have; are they up?"
