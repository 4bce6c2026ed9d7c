"""What the collector acknowledges is in the topics of a real broker, as it came in."""

from __future__ import annotations

import json
import uuid

from bench.fleet import Stream
from bench.kafka_broker import KafkaBroker
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.kafka.topic import fresh_name, kafka_settings, read_all, topics
from tests.waiting import until
from wire.limits import MAX_BATCH_BYTES
from wire.v1 import ingest_pb2 as pb


def begin(site: Site, broker: KafkaBroker, topic: str, more: dict[str, object] | None = None) -> Door:
    kafka = {"giants": {"goliath": 4}}
    site.prepare(collector=kafka_settings(broker, topic, **kafka) | (more or {}))
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    until(lambda: not site.ask("collector", "status")["ready"])
    return door


def test_an_accepted_batch_is_in_the_topic_with_its_bytes_its_key_and_its_headers(
    site: Site, broker: KafkaBroker
) -> None:
    topic = fresh_name()
    door = begin(site, broker, topic)
    agents = [door.agent() for _ in range(6)]
    sent: dict[tuple[str, int, int], tuple[str, pb.Item]] = {}
    for number, agent in enumerate(agents):
        tenant = "goliath" if number % 2 else "acme"
        stream = Stream(agent.agent_id, number + 1, rows=number, tenant=tenant)
        items = [stream.next() for _ in range(20)]
        assert set(statuses(door.deliver(agent, stream, items))) == {"ACCEPTED"}
        # No waiting: what was acknowledged is there.
        sent |= {(agent.agent_id, item.epoch, item.seq): (tenant, item) for item in items}
    got = read_all(broker, topic)
    assert {one.identity for one in got} == set(sent)
    assert len(got) == len(sent)
    for one in got:
        tenant, item = sent[one.identity]
        agent_id = one.identity[0]
        assert one.value == item.batch
        shard = f"/{uuid.UUID(agent_id).int % 4}" if tenant == "goliath" else ""
        assert one.key == f"{tenant}{shard}".encode()
        assert set(one.headers) == {"agent_id", "epoch", "seq", "digest", "schema_version", "received_at"}
        assert one.headers["digest"] == item.digest.hex().encode()
        assert one.headers["schema_version"] == b"1"
    logged = {(r["agent_id"], r["epoch"], r["seq"]): r for r in door.log()}
    assert set(logged) == set(sent)
    # A stream's batches have one key, so one partition, and stand there in order.
    for agent in agents:
        mine = [one for one in got if one.identity[0] == agent.agent_id]
        assert len({one.partition for one in mine}) == 1
        assert [one.identity[2] for one in mine] == list(range(1, 21))


def test_topics_are_made_with_settings_that_lose_nothing(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    begin(site, broker, topic)
    assert {topic, f"{topic}.parked", f"{topic}.rejected"} <= topics(broker)
    done = site.command("collector", "check-config", "--online")
    assert "one replica" in done.stdout
    assert "max.message.bytes" not in done.stdout


def test_what_is_parked_or_rejected_is_in_topics_of_its_own_and_comes_when_it_is_released(
    site: Site, broker: KafkaBroker
) -> None:
    topic = fresh_name()
    door = begin(site, broker, topic, {"admission": {"tenants": {"acme": {"rate": 0.001, "burst": 62}}}})
    agent = door.agent()
    stream = Stream(agent.agent_id, 1, rows=100)
    items = [stream.next() for _ in range(40)]
    said = statuses(door.deliver(agent, stream, items))
    assert set(said) == {"ACCEPTED", "PARKED"}
    accepted, parked = said.count("ACCEPTED"), said.count("PARKED")
    stranger = stream.next()
    stranger.batch = b"no batch at all"
    assert statuses(door.deliver(agent, stream, [stranger])) == ["REJECTED"]
    assert [one.value for one in read_all(broker, topic)] == [item.batch for item in items[:accepted]]
    assert [one.value for one in read_all(broker, f"{topic}.parked")] == [i.batch for i in items[accepted:]]
    (rejected,) = read_all(broker, f"{topic}.rejected")
    assert (rejected.key, rejected.value) == (agent.agent_id.encode(), stranger.batch)
    assert rejected.headers["kind"] == b"refused"
    assert rejected.headers["reason"].startswith(b"REASON_DIGEST_MISMATCH")

    site.command("collector", "plan", "set", "acme", "--rate", "unlimited")
    until(lambda: door.metrics()["weighbridge_collector_released_batches_total"] == parked)
    until(lambda: door.metrics()["weighbridge_collector_kafka_unconfirmed_bytes"] == 0)
    assert [one.value for one in read_all(broker, topic)] == [item.batch for item in items]


def test_a_collector_that_gets_a_broker_later_publishes_what_its_log_has(
    site: Site, broker: KafkaBroker
) -> None:
    site.prepare(collector={"log": {"segment_size": "64KiB"}})
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    stream = Stream(agent.agent_id, 1, rows=50)
    items = [stream.next() for _ in range(200)]
    for first in range(0, len(items), 10):
        assert set(statuses(door.deliver(agent, stream, items[first : first + 10]))) == {"ACCEPTED"}
    site.stop("collector")
    assert len(list((site.directory / "collector/log").glob("*.log"))) > 5
    topic = fresh_name()
    drop_in = site.directory / "collector.d"
    drop_in.mkdir()
    (drop_in / "kafka.yaml").write_text(json.dumps(kafka_settings(broker, topic)))
    site.start_collector()
    until(lambda: door.metrics()["weighbridge_collector_kafka_published_batches"] == len(items))
    assert [one.value for one in read_all(broker, topic)] == [item.batch for item in items]
    # And after another restart nothing comes twice.
    site.stop("collector")
    site.start_collector()
    until(lambda: not site.ask("collector", "status")["ready"])
    assert set(statuses(door.deliver(agent, stream, items[:10]))) == {"DUPLICATE"}
    assert len(read_all(broker, topic)) == len(items)


def test_the_largest_batch_goes_through_and_a_larger_one_among_the_rejected(
    site: Site, broker: KafkaBroker
) -> None:
    topic = fresh_name()
    door = begin(site, broker, topic)
    agent = door.agent()
    stream = Stream(agent.agent_id, 1, rows=1_000)
    message = stream.plain_message()
    room = MAX_BATCH_BYTES - len(message.SerializeToString()) - 20_000
    for row in range(1_000):
        message.containers.cgroup_path[row] += "x" * min(900, room // 1_000)
    item = stream.seal(message)
    assert 900_000 < len(item.batch) <= MAX_BATCH_BYTES
    assert statuses(door.deliver(agent, stream, [item])) == ["ACCEPTED"]
    assert [one.value for one in read_all(broker, topic)] == [item.batch]
    # A rejected one may be as large as a message of gRPC.
    huge = pb.Item(epoch=1, seq=2, digest=b"\0" * 32, batch=b"\0" * (4_000_000))
    assert statuses(door.deliver(agent, stream, [huge])) == ["REJECTED"]
    assert [len(one.value) for one in read_all(broker, f"{topic}.rejected")] == [4_000_000]
