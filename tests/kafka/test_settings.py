"""What is wrong between the collector and its brokers is named, with what to do about it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from bench.fleet import Stream
from bench.kafka_broker import USERS, KafkaBroker
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.kafka.topic import allow, alter, fresh_name, kafka_settings, read_all, topics
from tests.waiting import until

SASL = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "writer"}


def trouble(site: Site) -> str:
    """What the running collector says of its brokers."""
    ready: dict[str, str] = site.ask("collector", "status")["ready"]
    said = ready.get("kafka_unavailable", "")
    return "" if "nothing has been heard" in said else said


def checked(site: Site) -> tuple[int, str]:
    done = site.command("collector", "check-config", "--online", check=False)
    return done.returncode, done.stdout


def test_an_online_check_says_what_is_there_and_makes_nothing(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    site.prepare(collector=kafka_settings(broker, topic))
    code, said = checked(site)
    assert code == 0, said
    assert "certificate: good until" in said
    assert "ok       kafka" in said
    assert topic not in topics(broker)
    drop_in = site.directory / "collector.d"
    drop_in.mkdir()
    (drop_in / "kafka.yaml").write_text("handoff: {kafka: {create_topics: false}}")
    code, said = checked(site)
    assert code == 1
    assert f"topics {topic}, {topic}.parked, {topic}.rejected are missing; create them" in said


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"cleanup.policy": "compact"}, "cleanup.policy is compact: .*set it to delete"),
        ({"max.message.bytes": "1000000"}, "max.message.bytes is 1000000: .*set it to 1114112 or more"),
    ],
)
def test_a_topic_that_would_lose_usage_stops_publishing_until_it_is_mended(
    site: Site, broker: KafkaBroker, config: dict[str, str], named: str
) -> None:
    topic = fresh_name()
    broker.make_topic(topic, config=config)
    site.prepare(collector=kafka_settings(broker, topic))
    code, said = checked(site)
    assert code == 1
    assert re.search(named, said)
    site.start_collector()
    until(lambda: re.search(named, trouble(site)))
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item])) == ["RETRY"]
    assert read_all(broker, topic) == []
    alter(broker, topic, {"max.message.bytes": "2000000", "cleanup.policy": "delete"})
    until(lambda: not site.ask("collector", "status")["ready"])
    assert statuses(door.deliver(agent, stream, [item])) == ["ACCEPTED"]


def test_a_missing_topic_that_may_not_be_made_is_named_with_the_right_that_is_missing(
    site: Site, broker: KafkaBroker
) -> None:
    topic = fresh_name()
    client = SASL | {"sasl.password": USERS["writer"]}
    allow(broker, topic)
    settings = kafka_settings(broker, topic, client=client)
    settings["handoff"]["kafka"]["brokers"] = [broker.sasl]
    site.prepare(collector=settings)
    code, said = checked(site)
    assert code == 1
    assert f"topic {topic} is missing and cannot be made" in said
    assert "create it by hand: kafka-topics.sh" in said
    site.start_collector()
    until(lambda: "missing and cannot be made" in trouble(site))
    # An administrator makes them: the collector goes on by itself.
    for name, size in ((topic, 1_200_000), (f"{topic}.parked", 1_200_000), (f"{topic}.rejected", 4_300_000)):
        broker.make_topic(name, config={"max.message.bytes": str(size)})
    until(lambda: not site.ask("collector", "status")["ready"])
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    item = stream.next()
    assert statuses(door.deliver(agent, stream, [item])) == ["ACCEPTED"]
    assert [one.value for one in read_all(broker, topic)] == [item.batch]


@pytest.mark.parametrize(
    ("listener", "client", "named"),
    [
        ("sasl", SASL | {"sasl.password": "guessed"}, ["Authentication failed", "credentials"]),
        ("sasl", {}, ["handoff.kafka.client", "security.protocol"]),
        ("tls", {"security.protocol": "SSL"}, ["ssl.ca.location"]),
        ("plain", {"security.protocol": "SSL"}, ["is it their protocol?", "security.protocol"]),
    ],
)
def test_wrong_credentials_and_wrong_tls_are_named_with_the_settings_they_come_from(
    site: Site, broker: KafkaBroker, listener: str, client: dict[str, Any], named: list[str]
) -> None:
    settings = kafka_settings(broker, fresh_name(), client=client, delivery_timeout="3s")
    settings["handoff"]["kafka"]["brokers"] = [getattr(broker, listener)]
    site.prepare(collector=settings)
    code, said = checked(site)
    assert code == 1, said
    assert all(word in said for word in named), said
    assert "guessed" not in said


def test_tls_to_the_brokers_is_passed_through(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    settings = kafka_settings(
        broker, topic, client={"security.protocol": "SSL", "ssl.ca.location": str(broker.ca_file)}
    )
    settings["handoff"]["kafka"]["brokers"] = [broker.tls]
    site.prepare(collector=settings)
    code, said = checked(site)
    # The broker knows nobody behind its TLS port, so it may only look.
    assert "kafka" in said
    assert "TLS failed" not in said
    assert "cannot be made" in said or code == 0


@pytest.mark.parametrize(
    ("kafka", "named"),
    [
        ({"client": {"acks": 1}}, "handoff.kafka.client: acks is set by Weighbridge"),
        (
            {"client": {"no.such.key": 1}},
            'handoff.kafka.client: No such configuration property: "no.such.key"',
        ),
        ({"delivery_timeout": "60s"}, "handoff.kafka.delivery_timeout: 1s to 45s"),
        ({"in_flight": "1MiB"}, "handoff.kafka.in_flight: 8MiB or more"),
        ({"giants": {"acme": 1}}, "handoff.kafka.giants.acme: 2 to 1000"),
        ({"topic": "usage metering"}, "handoff.kafka.topic: up to 200 letters"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(
    site: Site, kafka: dict[str, Any], named: str
) -> None:
    site.prepare()
    site.collector_file.write_text(
        site.collector_file.read_text()
        + yaml.safe_dump({"handoff": {"kafka": {"brokers": ["127.0.0.1:1"], **kafka}}})
    )
    for words in (["check-config"], ["run"]):
        done = site.command("collector", *words, check=False)
        assert done.returncode == 2
        assert named in done.stderr
