"""The ledger behind a real broker: what two collectors publish, twice, parked, released and rejected, is booked once."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import SimulatedAgent, Stream
from bench.kafka_broker import KafkaBroker
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.collector.door import Door, statuses
from tests.kafka.topic import fresh_name, kafka_settings, read_all
from tests.ledger.both_sides import Books, accepted, booked, total
from tests.waiting import until
from wire.identity import digest

FOREVER_NS = 1 << 62
SLOW = {"admission": {"tenants": {"globex": {"rate": 0.001, "burst": 62}}}}
BATCHES = 200


@pytest.fixture
def pair(tmp_path: Path, broker: KafkaBroker) -> Iterator[tuple[str, SimulatedAgent, list[Door]]]:
    """A topic, an agent, and two collectors of one authority that know nothing of one another."""
    topic = fresh_name()
    sites = [Site(tmp_path / name) for name in ("one", "two")]
    for site in sites:
        kafka = {"source": {"kafka": {"brokers": [broker.plain], "topic": topic}}}
        site.prepare(collector=kafka_settings(broker, topic) | SLOW, ledger=kafka)
    first, second = (site.directory / "collector/ca" for site in sites)
    agent = Door(sites[0], CertificateAuthority(first)).agent()
    shutil.rmtree(second)
    shutil.copytree(first, second)
    for site in sites:
        site.start_collector()
        until(lambda site=site: not site.ask("collector", "status")["ready"])
    yield topic, agent, [Door(site, CertificateAuthority(first)) for site in sites]
    for site in sites:
        site.close()


def of_topic(broker: KafkaBroker, topic: str) -> tuple[Books, int]:
    """What is in the topic, each identity once, and how many messages that is."""
    messages = read_all(broker, topic)
    values = {message.identity: message.value for message in messages}
    return accepted((digest(value), value) for value in values.values()), len(messages)


def settled(site: Site) -> bool:
    """Whether everything that the topics have is booked."""
    site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=1, by="tenant")  # books what is in hand
    lags = site.ask("ledger", "status").get("source_lag", [])
    return bool(lags) and not any(lag["lag"] for lag in lags)


def hops(site: Site) -> dict[str, tuple[int, int, int]]:
    """Tenant -> batches booked, parked, rejected; sound so far but for the one that is rejected."""
    answer = site.ask("ledger", "reconcile")
    (finding,) = answer["findings"]
    assert (finding["kind"], finding["count"]) == ("rejected", 1), finding
    return {hop["tenant"]: (hop["booked"], hop["parked"], hop["rejected"]) for hop in answer["hops"]}


def usage(site: Site) -> list[dict[str, Any]]:
    return list(site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=FOREVER_NS, by="hour")["rows"])


def read_anew(site: Site) -> int:
    """Batches that the running ledger found to be booked already."""
    ports = json.loads((site.directory / "ledger/endpoints.json").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{ports['local']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("weighbridge_ledger_duplicates_total "))
    return int(float(line.split()[1]))


def test_what_two_collectors_publish_twice_is_booked_once_and_reading_it_again_changes_nothing(
    pair: tuple[str, SimulatedAgent, list[Door]], broker: KafkaBroker
) -> None:
    topic, agent, doors = pair
    stream = Stream(agent.agent_id, 1, rows=50)
    items = []
    for number in range(BATCHES):
        stream.tenant = "globex" if number % 2 else "acme"
        message = stream.message()
        message.cpus = 0 if number == 8 else 64
        items.append(stream.seal(message))
    said = [statuses(door.deliver(agent, stream, items)) for door in doors]
    parked = {of_one.count("PARKED") for of_one in said}
    assert len(parked) == 1, "each has a bucket of its own, and they are alike"
    parked = parked.pop()
    assert BATCHES // 2 > parked > 20
    assert [of_one.count("REJECTED") for of_one in said] == [1, 1]
    site = doors[0].site
    site.start_ledger()
    site.wait_booking()
    until(lambda: settled(site), 60)
    assert hops(site) == {"acme": (99, 0, 1), "globex": (BATCHES // 2 - parked, parked, 0)}

    # Both of them release it.
    for door in doors:
        door.site.command("collector", "plan", "set", "globex", "--rate", "unlimited")
        until(lambda door=door: not door.site.ask("collector", "parked")["tenants"], 60)
    until(lambda: settled(site) and hops(site)["globex"] == (100, 0, 0), 60)
    assert hops(site) == {"acme": (99, 0, 1), "globex": (100, 0, 0)}
    made, messages = of_topic(broker, topic)
    assert len(made.digests) == BATCHES - 1
    assert messages > 1.5 * len(made.digests), "nothing was there twice"
    before = usage(site)
    assert total(before) == made.sums

    duplicates = read_anew(site)
    site.command("ledger", "reread")
    until(lambda: read_anew(site) == duplicates + messages, 60)
    until(lambda: settled(site), 60)
    assert usage(site) == before
    assert hops(site) == {"acme": (99, 0, 1), "globex": (100, 0, 0)}
    assert site.ask("ledger", "verify")["ok"]
    assert site.stop("ledger") == 0, site.journal("ledger")[-2_000:]
    there = booked(site.directory / "ledger")
    assert there.digests == made.digests
    assert there.sums == made.sums
