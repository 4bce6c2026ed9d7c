"""`usage-replay --kafka`: what a real broker holds is sent again, in order, and nothing counts twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from bench.fleet import Stream
from bench.kafka_broker import KafkaBroker
from bench.site import Site
from collector.config import Kafka
from collector.door.ca import CertificateAuthority
from collector.errors import CollectorError
from collector.handoff.kafka import reader
from collector.handoff.kafka.reader import TopicReader
from tests.collector.door import Door, statuses
from tests.kafka.topic import Got, damaged, fresh_name, kafka_settings, read_all
from tests.waiting import until
from wire.daemon.settings import Seconds

START_UNIX_NS = 1_790_000_000 * 10**9
"""2026-09-21T14:13:20Z; seq n covers the second that begins n seconds later."""


def begin(site: Site, settings: dict[str, Any]) -> Door:
    validation = {"validation": {"clock_ahead": "4000d", "clock_behind": "4000d"}}
    site.prepare(collector=settings | validation)
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    until(lambda: not site.ask("collector", "status")["ready"])
    return door


def all_three(broker: KafkaBroker, topic: str) -> dict[str, list[Got]]:
    names = (topic, f"{topic}.parked", f"{topic}.rejected")
    return {name: sorted(read_all(broker, name), key=lambda one: one.partition) for name in names}


def stream_of(door: Door, **more: Any) -> tuple[Any, Stream]:
    agent = door.agent()
    return agent, Stream(agent.agent_id, 1, start_unix_ns=START_UNIX_NS, **more)


def test_a_replay_of_everything_changes_nothing_downstream(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    plan = {"admission": {"tenants": {"globex": {"rate": 0.001, "burst": 62}}}}
    door = begin(site, kafka_settings(broker, topic) | plan)
    agent, stream = stream_of(door, rows=50)
    items = []
    for number in range(300):
        stream.tenant = "globex" if number % 3 else "acme"
        message = stream.message()
        message.cpus = 0 if number == 7 else 64
        items.append(stream.seal(message))
    said = statuses(door.deliver(agent, stream, items[:150])) + statuses(
        door.deliver(agent, stream, items[150:])
    )
    assert set(said) == {"ACCEPTED", "PARKED", "REJECTED"}
    spoiled = items[0].__class__(epoch=1, seq=301, digest=b"x" * 32, batch=b"not what was meant")
    assert statuses(door.deliver(agent, stream, [spoiled])) == ["REJECTED"]
    before, end = all_three(broker, topic), site.ask("collector", "status")["log_end_bytes"]

    code, found, _ = door.replay("--kafka", "--dry-run")
    assert (code, found["batches"]) == (0, 300)
    code, answers, named = door.replay("--kafka")
    assert (code, answers, named) == (
        0,
        {"duplicate": 300, "sent": 300, "not_in": 0, "sent_before": 0},
        "",
    )
    assert all_three(broker, topic) == before
    assert site.ask("collector", "status")["log_end_bytes"] - end < 1_000, "marks at the most"

    # What was parked is released: it is in two topics now, and still counts once.
    door.site.command("collector", "plan", "set", "globex", "--rate", "unlimited")
    until(lambda: door.metrics()["weighbridge_collector_released_batches_total"] == said.count("PARKED"))
    until(lambda: door.metrics()["weighbridge_collector_kafka_unconfirmed_bytes"] == 0)
    before = all_three(broker, topic)
    code, answers, _ = door.replay("--kafka")
    assert (code, answers["duplicate"]) == (0, 300 + said.count("PARKED"))
    assert all_three(broker, topic) == before


def test_another_collector_takes_up_what_the_topics_hold_in_order(
    site: Site, broker: KafkaBroker, tmp_path: Path
) -> None:
    topic = fresh_name()
    plan = {"admission": {"tenants": {"globex": {"rate": 0.001, "burst": 62}}}}
    door = begin(site, kafka_settings(broker, topic) | plan)
    agent, stream = stream_of(door, rows=50)
    items = []
    for number in range(900):
        # More in a row than a stream's window has room for, of one tenant and in one topic.
        stream.tenant = "acme" if number < 450 else "globex"
        message = stream.message()
        message.cpus = 0 if number == 5 else 64
        items.append(stream.seal(message))
    for first in range(0, 900, 150):
        door.deliver(agent, stream, items[first : first + 150])
    assert len(read_all(broker, f"{topic}.rejected")) == 1
    assert len(read_all(broker, f"{topic}.parked")) > 300
    site.stop("collector")
    with Site(tmp_path / "second") as second:
        there = begin(second, kafka_settings(broker, topic))
        code, answers, named = there.replay("--kafka")
        assert (answers["accepted"], answers["rejected"], code) == (899, 1, 1), named
        assert "cpus" in named
        kept = [(line["seq"], line["digest"]) for line in there.log()]
        assert kept == [(item.seq, item.digest.hex()) for item in items if item.seq != 6]
        verdict = json.loads(second.command("collector", "log", "verify", "--json").stdout)
        assert (verdict["missing"], verdict["chain_breaks"]) == ([], [])


def test_a_time_a_tenant_and_a_rate_choose_what_is_sent(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    door = begin(site, kafka_settings(broker, topic))
    for tenant in ("acme", "globex"):
        agent, stream = stream_of(door, tenant=tenant)
        door.deliver(agent, stream, [stream.next() for _ in range(20)])
    middle = "2026-09-21T14:13:30Z"

    def would(*words: str) -> int:
        code, found, _ = door.replay("--kafka", "--dry-run", *words)
        assert code == 0
        return int(found["batches"])

    assert would() == 40
    assert would("--tenant", "acme") == 20
    assert would("--from", middle) == 22
    assert would("--to", middle) == 18
    assert would("--from", middle, "--to", "2026-09-21T14:13:31Z", "--tenant", "acme") == 1
    code, answers, _ = door.replay("--kafka", "--to", middle, "--rate", "1000")
    assert (code, answers["duplicate"]) == (0, 18)


def test_what_is_no_batch_of_a_collector_is_named_and_the_others_are_sent(
    site: Site, broker: KafkaBroker
) -> None:
    topic = fresh_name()
    door = begin(site, kafka_settings(broker, topic))
    agent, stream = stream_of(door)
    door.deliver(agent, stream, [stream.next() for _ in range(5)])
    (first, *_) = read_all(broker, topic)
    producer = Producer({"bootstrap.servers": broker.plain})
    producer.produce(topic, b"hello", partition=first.partition)
    producer.produce(topic, first.value + b"x", headers=dict(first.headers), partition=first.partition)
    assert producer.flush(20) == 0
    code, answers, named = door.replay("--kafka")
    assert (code, answers["duplicate"], answers["not_in"]) == (1, 5, 2)
    assert f"{topic}/{first.partition} at offset 5: no batch of a collector" in named
    assert f"{topic}/{first.partition} at offset 6: damaged" in named


def test_without_a_broker_or_a_topic_it_says_what_to_do(site: Site, broker: KafkaBroker) -> None:
    site.prepare()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    code, _, said = door.replay("--kafka")
    assert (code, "handoff.kafka.brokers" in said) == (2, True)
    drop_in = site.directory / "collector.d"
    drop_in.mkdir()
    settings = kafka_settings(broker, "usage-nobody-made")
    (drop_in / "kafka.yaml").write_text(json.dumps(settings))
    code, _, said = door.replay("--kafka")
    assert (code, "there is no topic usage-nobody-made" in said) == (2, True)
    settings["handoff"]["kafka"] |= {"brokers": ["127.0.0.1:1"], "delivery_timeout": "2s"}
    (drop_in / "kafka.yaml").write_text(json.dumps(settings))
    code, _, said = door.replay("--kafka")
    assert (code, "Connection refused" in said) == (2, True)


def test_a_partition_far_ahead_of_the_others_waits_for_them(
    broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = fresh_name(), fresh_name()
    producer = Producer({"bootstrap.servers": broker.plain})
    for name in (early, late):
        broker.make_topic(name)
    for number in range(3_000):
        name = late if number % 2 else early
        at = number if number % 2 else number // 100
        producer.produce(name, b"v" * 1_000, headers={"received_at": str(at)})
        producer.poll(0)
    assert producer.flush(30) == 0
    monkeypatch.setattr(reader, "AHEAD_BYTES", 100_000)
    topics = TopicReader(Kafka(brokers=[broker.plain], delivery_timeout=Seconds(10)), (early, late), None)
    most = 0
    order = []
    for entry in topics.entries():
        order.append(int(entry.headers["received_at"]))
        most = max(most, sum(part.bytes for part in topics._partitions.values()))
        read = entry.read
    topics.close()
    assert order == sorted(order)
    assert (len(order), read, topics.total) == (3_000, 3_000, 3_000)
    assert most <= 100_000 + 2 * reader.MESSAGES_AT_ONCE * 1_000


def test_a_record_that_is_damaged_on_the_brokers_disk_ends_the_reading_by_name(broker: KafkaBroker) -> None:
    """librdkafka goes on behind it, at offsets that it takes from the bytes it finds there: digits are far beyond the end."""
    topic = fresh_name()
    broker.make_topic(topic)
    values = [str(number).encode() * 2_000 for number in range(3)]
    producer = Producer({"bootstrap.servers": broker.plain, "acks": "all"})
    for value in values:
        producer.produce(topic, value, partition=0)
        assert producer.flush(20) == 0
    read: list[bytes] = []
    with damaged(broker, topic, values[1]):
        topics = TopicReader(Kafka(brokers=[broker.plain], delivery_timeout=Seconds(10)), [topic], None)
        with pytest.raises(CollectorError, match=rf"{topic}/0 cannot be read: .*CRC32C"):
            read.extend(entry.value for entry in topics.entries())
        topics.close()
    assert read == values[: len(read)], "in order, and nothing from behind it"
