"""What the ledger reads of a real broker's topics, and what it says when it cannot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    NewPartitions,
    ResourcePatternType,
    ResourceType,
)

from bench.fleet import Stream
from bench.kafka_broker import USERS, KafkaBroker
from ledger.config import Kafka
from ledger.consume import kafka as module
from ledger.consume.arrival import NOBODY, Arrival, Kind
from ledger.consume.kafka import KafkaSource
from ledger.errors import LedgerError
from tests.kafka.topic import admin, allow, damaged, fresh_name
from tests.waiting import until
from wire.daemon.settings import Seconds
from wire.identity import new_agent_id
from wire.kafka.topics import Topics

MOST = 1 << 20
SASL: dict[str, str | int | bool] = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "PLAIN",
    "sasl.username": "writer",
    "sasl.password": USERS["writer"],
}

Sources = Callable[..., KafkaSource]


@pytest.fixture
def topics(broker: KafkaBroker) -> Topics:
    names = Topics.of(fresh_name())
    for name in names:
        broker.make_topic(name, partitions=3 if name == names.usage else 1)
    return names


@pytest.fixture
def source(broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    """Makes sources that look often, and closes them."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.3)
    made: list[KafkaSource] = []

    def make(topics: Topics, positions: dict[str, int] | None = None, **more: Any) -> KafkaSource:
        settings = {"brokers": [broker.plain], "topic": topics.usage, "timeout": Seconds(2)} | more
        made.append(KafkaSource(Kafka(**settings), positions or {}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def publish(
    broker: KafkaBroker, topic: str, values: list[bytes], partition: int = 0, **headers: bytes
) -> None:
    producer = Producer({"bootstrap.servers": broker.plain, "acks": "all"})
    for value in values:
        producer.produce(topic, value, partition=partition, headers=list(headers.items()))
    assert producer.flush(20) == 0


def forget(broker: KafkaBroker, topics: Topics, before: int) -> None:
    """As retention does."""
    client = admin(broker)
    for future in client.delete_records([TopicPartition(topics.usage, 0, before)]).values():
        future.result()


def batches(count: int) -> list[bytes]:
    stream = Stream(new_agent_id(), 1)
    return [stream.next().batch for _ in range(count)]


def read(source: KafkaSource, count: int, most_bytes: int = MOST) -> list[Arrival]:
    """So many, and no more come."""
    found: list[Arrival] = []
    until(lambda: found.extend(source.read(most_bytes, 0.2)) or len(found) >= count)
    assert len(found) == count
    return found


def test_all_partitions_of_the_three_topics_arrive_each_in_its_order_and_once(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    streams = [batches(40) for _ in range(3)]
    for partition, values in enumerate(streams):
        publish(broker, topics.usage, values, partition)
    (parked,), (rejected,) = batches(1), batches(1)
    publish(broker, topics.parked, [parked])
    publish(broker, topics.rejected, [rejected], kind=b"rejected", reason=b"REASON_X")
    one = source(topics)
    found = read(one, 122, most_bytes=20_000)
    for values in streams:
        assert [a.body for a in found if a.kind is Kind.BOOKABLE and a.body in values] == values
    assert [a.body for a in found if a.kind is Kind.PARKED] == [parked]
    # Without headers nobody's word counts that an identity is used up; `kind` alone is one.
    assert [(a.body, a.reason) for a in found if a.kind is Kind.REJECTED] == [(rejected, "REASON_X")]
    assert one.positions() == {
        f"{topics.usage}/0": 40,
        f"{topics.usage}/1": 40,
        f"{topics.usage}/2": 40,
        f"{topics.parked}/0": 1,
        f"{topics.rejected}/0": 1,
    }
    assert one.places == tuple(sorted(one.positions()))
    assert (one.lag(), one.lost, one.trouble) == (0, {}, "")
    assert one.read(MOST, 0.3) == []


def test_it_goes_on_from_the_positions_it_is_given_and_a_small_bite_loses_nothing(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    values = batches(30)
    publish(broker, topics.usage, values)
    one = source(topics)
    first: list[Arrival] = until(lambda: one.read(1, 0.2))
    assert [a.body for a in first] == values[:1]
    assert until(lambda: one.lag() == 29)
    second = source(topics, one.positions())
    assert [a.body for a in read(second, 29)] == values[1:]


def test_what_is_no_batch_is_evidence_and_what_is_no_value_as_well(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    garbage = os.urandom(50)
    publish(broker, topics.usage, [garbage, b""])
    found = read(source(topics), 2)
    assert [(a.kind, a.agent_id, a.body) for a in found] == [
        (Kind.REFUSED, NOBODY, garbage),
        (Kind.REFUSED, NOBODY, b""),
    ]


def test_what_retention_took_is_told_once_and_what_is_kept_is_read(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    values = batches(10)
    publish(broker, topics.usage, values)
    place = f"{topics.usage}/0"
    forget(broker, topics, 6)
    one = source(topics, {place: 2})
    assert [a.body for a in read(one, 4)] == values[6:]
    assert one.lost == {place: (2, 6)}
    assert one.trouble == ""
    fresh = source(topics)
    assert [a.body for a in read(fresh, 4)] == values[6:]
    assert fresh.lost == {}


def test_a_position_behind_the_end_is_that_of_another_topic(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    publish(broker, topics.usage, batches(3))
    (parked,) = batches(1)
    publish(broker, topics.parked, [parked])
    one = source(topics, {f"{topics.usage}/0": 9})
    found: list[Arrival] = []
    with pytest.raises(
        LedgerError, match=rf"{topics.usage}/0 was read up to 9, .* ends at 3.*weighbridge-ledger reread"
    ):
        until(lambda: found.extend(one.read(MOST, 0.2)))
    assert one.positions().get(f"{topics.parked}/0", 0) == len(found), (
        "what is counted as read was handed over"
    )
    with pytest.raises(LedgerError, match="reread"):
        one.read(MOST, 0)


def test_topics_that_do_not_exist_yet_are_named_and_read_once_they_do(
    broker: KafkaBroker, source: Sources
) -> None:
    names = Topics.of(fresh_name())
    one = source(names)
    until(lambda: one.read(MOST, 0.1) == [] and f"no topic {names.usage}, {names.parked}" in one.trouble)
    assert one.trouble.startswith("METER-001")
    for name in names:
        broker.make_topic(name)
    (value,) = batches(1)
    publish(broker, names.usage, [value])
    assert [a.body for a in read(one, 1)] == [value]
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")


def test_a_partition_that_is_added_is_read_from_its_beginning(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    one = source(topics)
    until(lambda: one.read(MOST, 0.1) == [] and len(one.places) == 5)
    client = admin(broker)
    for future in client.create_partitions([NewPartitions(topics.usage, 4)]).values():
        future.result()
    (value,) = batches(1)
    until(lambda: len(client.list_topics(topics.usage, timeout=20).topics[topics.usage].partitions) == 4)
    publish(broker, topics.usage, [value], partition=3)
    assert [a.body for a in read(one, 1)] == [value]
    assert one.positions()[f"{topics.usage}/3"] == 1


def test_brokers_that_are_away_are_named_and_it_goes_on_by_itself(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    values = batches(4)
    publish(broker, topics.usage, values[:2])
    one = source(topics)
    read(one, 2)
    broker.kill()
    try:
        until(lambda: one.read(MOST, 0.1) == [] and "kafka.brokers" in one.trouble)
        assert one.trouble.startswith("METER-001 no broker answers: ")
    finally:
        broker.start()
    publish(broker, topics.usage, values[2:])
    assert [a.body for a in read(one, 2)] == values[2:]
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")


def test_a_right_that_is_missing_is_named_until_it_is_given(
    broker: KafkaBroker, topics: Topics, source: Sources
) -> None:
    allow(broker, topics.usage)
    one = source(topics, brokers=[broker.sasl], client=SASL)
    until(lambda: one.read(MOST, 0.1) == [] and "allow this user READ" in one.trouble)
    for _ in range(20):
        assert one.read(MOST, 0.1) == []
        assert "allow this user READ" in one.trouble
    client = admin(broker)
    right = AclBinding(
        ResourceType.TOPIC,
        topics.usage,
        ResourcePatternType.PREFIXED,
        "User:writer",
        "*",
        AclOperation.READ,
        AclPermissionType.ALLOW,
    )
    for future in client.create_acls([right]).values():
        future.result()
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")
    (value,) = batches(1)
    publish(broker, topics.usage, [value])
    assert [a.body for a in read(one, 1)] == [value]


def digits() -> list[bytes]:
    """librdkafka takes what lies behind a damaged record's header for records: with these, for one far beyond the end."""
    return [str(number).encode() * 2_000 for number in range(3)]


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("values", [batches(3), digits()], ids=["batches", "digits"])
def test_a_record_that_is_damaged_on_the_brokers_disk_is_named_and_never_passed_over(
    broker: KafkaBroker, topics: Topics, source: Sources, values: list[bytes], place: int
) -> None:
    for value in values:
        publish(broker, topics.usage, [value])
    with damaged(broker, topics.usage, values[place]):
        one = source(topics)
        assert [a.body for a in read(one, place)] == values[:place]
        until(lambda: one.read(MOST, 0.1) == [] and f"{topics.usage}/0 cannot be read" in one.trouble)
        for _ in range(20):
            assert one.read(MOST, 0.1) == []
            assert f"{topics.usage}/0 cannot be read" in one.trouble
    assert [a.body for a in read(one, 3 - place)] == values[place:]
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")


@pytest.mark.parametrize("values", [batches(3), digits()], ids=["batches", "digits"])
def test_a_first_record_that_retention_took_while_it_was_damaged_is_told(
    broker: KafkaBroker, topics: Topics, source: Sources, values: list[bytes]
) -> None:
    for value in values:
        publish(broker, topics.usage, [value])
    place = f"{topics.usage}/0"
    with damaged(broker, topics.usage, values[0]):
        one = source(topics)
        until(lambda: one.read(MOST, 0.1) == [] and f"{place} cannot be read" in one.trouble)
        forget(broker, topics, 1)
        assert [a.body for a in read(one, 2)] == values[1:]
    assert one.lost == {place: (0, 1)}
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")


class Silent:
    """A consumer whose brokers never say what they have of a partition."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.asked: list[str] = []
        self.waited_seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def get_watermark_offsets(self, part: TopicPartition, **how: Any) -> Any:
        if "cached" in how:
            return self._consumer.get_watermark_offsets(part, **how)
        self.asked.append(f"{part.topic}/{part.partition}")
        self.waited_seconds.append(how["timeout"])
        time.sleep(how["timeout"])
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def test_partitions_of_brokers_that_say_nothing_are_asked_in_turn_one_a_look_with_all_its_time(
    broker: KafkaBroker, topics: Topics, source: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = batches(2)
    publish(broker, topics.usage, values)
    one = source(topics)
    silent = Silent(one._consumer)
    monkeypatch.setattr(one, "_consumer", silent)
    until(lambda: one.read(MOST, 0.1) == [] and len(silent.asked) >= 5)
    assert "do not say what they have" in one.trouble
    assert one.positions() == {}
    assert sorted(silent.asked[:5]) == sorted(one.places), "each once before any is asked again"
    assert silent.waited_seconds == pytest.approx([2] * len(silent.asked), abs=0.1)  # the brokers' time limit
    monkeypatch.setattr(one, "_consumer", silent._consumer)
    assert [a.body for a in read(one, 2)] == values
    until(lambda: one.read(MOST, 0.1) == [] and one.trouble == "")


@pytest.mark.parametrize(
    ("client", "named"),
    [
        ({"auto.offset.reset": "latest"}, "auto.offset.reset is set by Weighbridge"),
        ({"no.such.key": 1}, 'No such configuration property: "no.such.key"'),
    ],
)
def test_settings_that_cannot_be_are_named(client: dict[str, str | int | bool], named: str) -> None:
    with pytest.raises(LedgerError, match=named):
        KafkaSource(Kafka(brokers=["127.0.0.1:1"], client=client), {})
