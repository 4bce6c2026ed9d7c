"""The broker hangs, is killed, comes back; the collector is killed: nothing is lost, and memory stays bounded."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict

import psutil
import pytest

from bench.fleet import Stream, enrol
from bench.kafka_broker import KafkaBroker
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.chaos.sender import Sender, sending
from tests.collector.door import Door, statuses
from tests.kafka.topic import distinct, fresh_name, kafka_settings, read_all
from tests.waiting import until

IN_FLIGHT_BYTES = 8 << 20
MOST_GROWTH_BYTES = 64 << 20
"""Twice `in_flight` in librdkafka, the gRPC messages on their way, and what malloc keeps."""


def begin(site: Site, broker: KafkaBroker, topic: str) -> CertificateAuthority:
    more = {"in_flight": IN_FLIGHT_BYTES, "delivery_timeout": "2s"}
    site.prepare(collector=kafka_settings(broker, topic, **more))
    site.start_collector()
    until(lambda: ready(site))
    return CertificateAuthority(site.directory / "collector" / "ca")


def ready(site: Site) -> bool:
    return not site.ask("collector", "status")["ready"]


def log_end(site: Site) -> int:
    end: int = site.ask("collector", "status")["log_end_bytes"]
    return end


def rss(site: Site) -> int:
    assert site.collector is not None
    resident: int = psutil.Process(site.collector.pid).memory_info().rss
    return resident


def test_without_a_broker_agents_are_told_to_retry_and_one_that_comes_back_gets_all(
    site: Site, shaken: KafkaBroker
) -> None:
    topic = fresh_name()
    authority = begin(site, shaken, topic)
    door = Door(site, authority)
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next() for _ in range(30)]
    assert set(statuses(door.deliver(agent, stream, items[:10]))) == {"ACCEPTED"}
    shaken.pause()
    # Taken into the log and not confirmed in time: no acknowledgement.
    answers = door.deliver(agent, stream, items[:20])
    assert set(statuses(answers)) == {"RETRY"}
    trouble = site.ask("collector", "status")["ready"]["kafka_unavailable"]
    assert "METER-001" in trouble
    assert "handoff.kafka" in trouble
    assert door.metrics()["weighbridge_collector_kafka_away"] == 1
    # From now on nothing is taken in, not even into the log.
    before = log_end(site)
    assert set(statuses(door.deliver(agent, stream, items[20:]))) == {"RETRY"}
    assert log_end(site) == before
    shaken.resume()
    until(lambda: ready(site))
    assert statuses(door.deliver(agent, stream, items)) == ["DUPLICATE"] * 20 + ["ACCEPTED"] * 10
    assert distinct(read_all(shaken, topic)) == {
        (agent.agent_id, item.epoch, item.seq): item.batch for item in items
    }


def test_a_collector_that_starts_without_a_broker_waits_for_it(site: Site, shaken: KafkaBroker) -> None:
    shaken.kill()
    topic = fresh_name()
    site.prepare(collector=kafka_settings(shaken, topic, delivery_timeout="2s"))
    site.start_collector()
    door = Door(site, CertificateAuthority(site.directory / "collector" / "ca"))
    agent = door.agent()
    stream = Stream(agent.agent_id, 1)
    items = [stream.next()]
    assert statuses(door.deliver(agent, stream, items)) == ["RETRY"]
    until(lambda: "Connection refused" in site.ask("collector", "status")["ready"]["kafka_unavailable"])
    shaken.start()
    until(lambda: ready(site))
    assert statuses(door.deliver(agent, stream, items)) == ["ACCEPTED"]
    assert [one.value for one in read_all(shaken, topic)] == [items[0].batch]


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_nothing_is_lost_whatever_is_stopped_and_killed_under_load(site: Site, shaken: KafkaBroker) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    print(f"seed {seed}")
    topic = fresh_name()
    authority = begin(site, shaken, topic)
    senders = [Sender(site, enrol(authority), f"tenant-{n}", random.Random(seed + n)) for n in range(4)]
    with sending(senders):
        time.sleep(3)
        for hangs in (True, False):
            before = rss(site)
            shaken.pause() if hangs else shaken.kill()
            until(lambda: not ready(site))
            time.sleep(1)
            end, grown = log_end(site), 0
            for _ in range(8):
                time.sleep(1)
                grown = max(grown, rss(site) - before)
            assert log_end(site) == end, "what nobody can be given is not taken in"
            assert grown < MOST_GROWTH_BYTES
            shaken.resume() if hangs else shaken.start()
            until(lambda: ready(site), 60)
            time.sleep(rng.uniform(1, 2))
        for _ in range(5):
            time.sleep(rng.uniform(0.5, 2.5))
            site.stop("collector", signal.SIGKILL)
            site.start_collector()
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]

    got = read_all(shaken, topic)
    assert distinct(got) == {
        (sender.agent.agent_id, item.epoch, item.seq): item.batch
        for sender in senders
        for item in sender.made
    }
    assert len(distinct(got)) > 500
    first: dict[str, list[int]] = defaultdict(list)
    seen = set()
    for one in got:
        if one.identity not in seen:
            seen.add(one.identity)
            first[one.identity[0]].append(one.identity[2])
    # The log's order, which is that of the answers; an agent that sends one Delivery at a time sees its own.
    assert all(numbers == sorted(numbers) for numbers in first.values())
