"""What the brokers have confirmed and nobody waits for goes from the log; whatever is killed, the topic has everything."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bench.fleet import Stream, enrol
from bench.kafka_broker import KafkaBroker
from bench.site import Site
from collector.door.ca import CertificateAuthority
from tests.chaos.sender import Sender, sending
from tests.collector.door import Door, statuses
from tests.kafka.topic import distinct, fresh_name, kafka_settings, read_all
from tests.waiting import until

SEGMENT_BYTES = 64 << 10
SMALL = {"segment_size": "64KiB"}


def begin(site: Site, settings: dict[str, object]) -> Door:
    site.prepare(collector=settings)
    site.start_collector()
    until(lambda: ready(site))
    return Door(site, CertificateAuthority(site.directory / "collector" / "ca"))


def ready(site: Site) -> bool:
    return not site.ask("collector", "status")["ready"]


def segments(site: Site) -> list[Path]:
    return sorted((site.directory / "collector/log").glob("*.log"))


def log_bytes(site: Site) -> int:
    return sum(path.stat().st_size for path in segments(site))


def test_the_log_is_kept_within_its_size_and_says_where_it_begins(site: Site, broker: KafkaBroker) -> None:
    topic = fresh_name()
    bound = 4 * SEGMENT_BYTES
    door = begin(site, kafka_settings(broker, topic) | {"log": {**SMALL, "max_size": bound}})
    agent = door.agent()
    stream = Stream(agent.agent_id, 1, rows=100)
    items = [stream.next() for _ in range(200)]
    for first in range(0, len(items), 20):
        assert set(statuses(door.deliver(agent, stream, items[first : first + 20]))) == {"ACCEPTED"}
    until(lambda: log_bytes(site) <= bound, 30)
    assert len(segments(site)) > 1, "no more than needed"
    metrics = door.metrics()
    begins = metrics["weighbridge_collector_log_begin_bytes"]
    assert begins == int(segments(site)[0].stem) > 0
    assert metrics["weighbridge_collector_log_end_bytes"] - begins <= bound
    # What is gone from the log is a duplicate as before, in the topic once, and comes from there when it is asked for.
    assert set(statuses(door.deliver(agent, stream, items[:50]))) == {"DUPLICATE"}
    assert [one.value for one in read_all(broker, topic)] == [item.batch for item in items]
    verdict = json.loads(site.command("collector", "log", "verify", "--json").stdout)
    assert (verdict["sound"], verdict["begins_at"]) == (True, begins)
    assert 0 < verdict["batches"] < 100
    code, found, said = door.replay("--log", "--dry-run")
    assert (code, found["batches"]) == (0, verdict["batches"])
    assert "has been pruned and begins with what came in at" in said
    assert "--kafka" in said
    assert door.replay("--kafka", "--dry-run")[1]["batches"] == len(items)


def test_what_no_broker_has_and_what_is_parked_stays(site: Site, shaken: KafkaBroker) -> None:
    topic = fresh_name()
    settings = kafka_settings(shaken, topic, delivery_timeout="2s") | {
        "log": {**SMALL, "keep": "1s"},
        "admission": {"tenants": {"globex": {"rate": 0.001, "burst": 62}}},
    }
    door = begin(site, settings)
    agent = door.agent()
    stream = Stream(agent.agent_id, 1, rows=1_000, tenant="globex")
    items = [stream.next() for _ in range(8)]
    assert statuses(door.deliver(agent, stream, items)).count("PARKED") > 1
    first_parked = next(int(line["offset"]) for line in door.log("--parked"))
    stream.tenant = "acme"
    items += [stream.next() for _ in range(8)]
    assert set(statuses(door.deliver(agent, stream, items[8:]))) == {"ACCEPTED"}
    shaken.pause()
    unconfirmed = [stream.next() for _ in range(8)]
    assert set(statuses(door.deliver(agent, stream, unconfirmed))) == {"RETRY"}
    before = site.ask("collector", "status")["log_end_bytes"]
    # Restarted by a kill, with the brokers away: all that is parked or unconfirmed is as old as it is, and stays.
    time.sleep(1.5)
    site.stop("collector", signal.SIGKILL)
    site.start_collector()
    time.sleep(7)
    status = site.ask("collector", "status")
    assert status["log_begin_bytes"] <= first_parked
    assert status["log_end_bytes"] >= before
    shaken.resume()
    until(lambda: ready(site), 60)
    assert set(statuses(door.deliver(agent, stream, unconfirmed))) == {"DUPLICATE"}
    time.sleep(7)
    assert site.ask("collector", "status")["log_begin_bytes"] <= first_parked, "confirmed, but it waits"
    site.command("collector", "plan", "set", "globex", "--rate", "unlimited")
    until(lambda: site.ask("collector", "status")["log_begin_bytes"] > first_parked, 30)
    until(lambda: door.metrics()["weighbridge_collector_kafka_unconfirmed_bytes"] == 0)
    got = {one.identity: one.value for one in read_all(shaken, topic)}
    assert got == {(agent.agent_id, one.epoch, one.seq): one.batch for one in (*items, *unconfirmed)}


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_nothing_is_lost_when_a_collector_that_prunes_is_killed_and_loses_its_checkpoint(
    site: Site, broker: KafkaBroker
) -> None:
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    print(f"seed {seed}")
    topic = fresh_name()
    door = begin(site, kafka_settings(broker, topic) | {"log": {**SMALL, "keep": "1s"}})
    senders = [
        Sender(site, enrol(door.authority), f"tenant-{n}", random.Random(seed + n), most=12) for n in range(3)
    ]
    begins = [0]
    with sending(senders):
        for lost in ((), (), ("kafka.cursor",), ("streams.db", "streams.db-wal", "streams.db-shm"), ()):
            time.sleep(rng.uniform(1.5, 3))
            site.stop("collector", signal.SIGKILL)
            for name in lost:
                (site.directory / "collector" / name).unlink(missing_ok=True)
            site.start_collector()
            until(lambda: site.ask("collector", "status")["log_begin_bytes"] > begins[-1], 30)
            begins.append(site.ask("collector", "status")["log_begin_bytes"])
    assert site.stop("collector") == 0, site.journal("collector")[-2_000:]
    got = distinct(read_all(broker, topic))
    made = {(s.agent.agent_id, one.epoch, one.seq): one.batch for s in senders for one in s.made}
    assert got == made
    assert len(made) > 300
    verdict = json.loads(site.command("collector", "log", "verify", "--json", check=False).stdout)
    assert (verdict["damaged"], verdict["chain_breaks"], verdict["wrong_releases"]) == ([], [], [])
