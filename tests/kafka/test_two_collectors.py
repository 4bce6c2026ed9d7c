"""Two collectors behind one name, with a real broker and a real Redis: an agent may come to either, at any moment."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fleet import SimulatedAgent, Stream
from bench.kafka_broker import KafkaBroker
from bench.redis_server import RedisServer, installed
from bench.site import Site
from bench.two_collectors import measure
from collector.door.ca import CertificateAuthority
from collector.log_commands import verify
from tests.collector.door import Door, statuses
from tests.kafka.topic import fresh_name, kafka_settings, read_all
from tests.waiting import until

pytestmark = pytest.mark.skipif(not installed(), reason="needs redis-server; ./dev setup installs it")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Pair:
    """Two running collectors with one authority, and an agent that knows both."""

    def __init__(self, directory: Path, broker: KafkaBroker, redis: RedisServer) -> None:
        self.broker, self.topic = broker, fresh_name()
        self.sites = [Site(directory / name) for name in ("one", "two")]
        settings = kafka_settings(broker, self.topic, delivery_timeout="2s")
        for site in self.sites:
            site.prepare(collector={**settings, "shared": {"redis": redis.url}})
        first, second = (site.directory / "collector/ca" for site in self.sites)
        self.agent: SimulatedAgent = Door(self.sites[0], CertificateAuthority(first)).agent()
        shutil.rmtree(second)
        shutil.copytree(first, second)
        self.doors = [Door(site, CertificateAuthority(first)) for site in self.sites]
        self.stream = Stream(self.agent.agent_id, 1)
        """New to everybody: what it has before its first Hello would be unverified."""
        for site in self.sites:
            site.start_collector()
            until(lambda site=site: not site.ask("collector", "status")["ready"])
        self.deliver(0, [])

    def deliver(self, at: int, items: list[object], oldest: int = 1) -> list[str]:
        return statuses(self.doors[at].deliver(self.agent, self.stream, items, oldest_seq=oldest))

    def copies(self) -> list[tuple[int, bytes, bool]]:
        got = read_all(self.broker, self.topic)
        return sorted((one.identity[2], one.value, "dedup" in one.headers) for one in got)

    def close(self) -> None:
        for site in self.sites:
            site.close()


@pytest.fixture
def pair(tmp_path: Path, broker: KafkaBroker, redis: RedisServer) -> Iterator[Pair]:
    redis.command("FLUSHALL")
    made = Pair(tmp_path, broker, redis)
    yield made
    made.close()


def test_what_one_has_delivered_is_a_duplicate_at_the_other_and_in_the_topic_once(pair: Pair) -> None:
    items = [pair.stream.next() for _ in range(12)]
    assert pair.deliver(0, items[:8]) == ["ACCEPTED"] * 8
    # The agent never saw those answers, and is at the other one now.
    assert pair.deliver(1, items) == ["DUPLICATE"] * 8 + ["ACCEPTED"] * 4
    assert pair.deliver(0, items) == ["DUPLICATE"] * 12
    assert pair.copies() == [(item.seq, item.batch, False) for item in items]
    other = pair.doors[1].metrics()
    assert other["weighbridge_collector_delivered_elsewhere_batches_total"] == 8
    # Each log says what it has and what it knows to be elsewhere; so it does after a restart.
    for site in pair.sites:
        site.stop("collector", signal.SIGKILL)
        site.start_collector()
        until(lambda site=site: not site.ask("collector", "status")["ready"])
    assert [pair.deliver(at, items) for at in (0, 1)] == [["DUPLICATE"] * 12] * 2
    assert len(pair.copies()) == 12
    for site in pair.sites:
        verdict = verify(site.directory / "collector/log")
        assert verdict.sound, verdict


def test_the_same_identity_with_other_bytes_is_a_conflict_at_either(pair: Pair) -> None:
    first, second = pair.stream.next(), pair.stream.next()
    assert pair.deliver(0, [first, second]) == ["ACCEPTED"] * 2
    clone = Stream(pair.agent.agent_id, 1, rows=5)
    forged = clone.next()
    (answer,) = pair.doors[1].deliver(pair.agent, clone, [forged], oldest_seq=1)
    assert statuses([answer]) == ["REJECTED"]
    assert first.digest.hex()[:32] in answer.detail, "both digests"
    assert forged.digest.hex() in answer.detail
    assert pair.doors[1].refusals("METER-006", "identity_conflict") == 1
    (evidence,) = read_all(pair.broker, f"{pair.topic}.rejected")
    assert evidence.value == forged.batch
    assert evidence.headers["reason"].startswith(b"REASON_IDENTITY_CONFLICT")
    assert pair.copies() == [(item.seq, item.batch, False) for item in (first, second)]


def test_what_one_is_publishing_the_other_does_not_and_takes_over_when_it_is_gone(
    pair: Pair,
) -> None:
    items = [pair.stream.next() for _ in range(3)]
    pair.broker.pause()
    try:
        # In the first one's log, and not in the topic: RETRY from both.
        assert pair.deliver(0, items) == ["RETRY"] * 3
        pair.sites[0].stop("collector", signal.SIGKILL)
    finally:
        pair.broker.resume()
    until(lambda: not pair.sites[1].ask("collector", "status")["ready"])
    (answer, *_) = pair.doors[1].deliver(pair.agent, pair.stream, items, oldest_seq=1)
    assert statuses([answer]) == ["RETRY"]
    assert answer.reason == 45
    until(lambda: set(pair.deliver(1, items)) == {"ACCEPTED"}, 30)
    # Back again, the first one finds that it is too late, and publishes nothing; what the broker had before it hung
    # may be there. No two copies call themselves the only one.
    pair.sites[0].start_collector()
    until(lambda: pair.doors[0].metrics()["weighbridge_collector_kafka_skipped_batches"] == 3)
    assert pair.deliver(0, items) == ["DUPLICATE"] * 3
    copies = pair.copies()
    assert {(seq, value) for seq, value, _ in copies} == {(item.seq, item.batch) for item in items}
    for item in items:
        assert [doubt for seq, _, doubt in copies if seq == item.seq].count(False) <= 1


def test_without_redis_batches_are_taken_unverified_and_the_others_are_told_later(
    pair: Pair, redis: RedisServer
) -> None:
    items = [pair.stream.next() for _ in range(9)]
    assert pair.deliver(0, items[:3]) == ["ACCEPTED"] * 3
    assert redis.process is not None
    redis.process.send_signal(signal.SIGSTOP)
    try:
        assert pair.deliver(0, items[3:6]) == ["ACCEPTED"] * 3
        reasons = pair.sites[0].ask("collector", "status")["ready"]
        assert reasons["shared_streams_away"].startswith("METER-001")
        metrics = pair.doors[0].metrics()
        assert metrics["weighbridge_collector_kafka_unverified_batches"] == 3
        assert metrics["weighbridge_collector_shared_owed_marks"] == 3
    finally:
        redis.process.send_signal(signal.SIGCONT)
    until(lambda: not pair.sites[0].ask("collector", "status")["ready"])
    assert pair.deliver(1, items) == ["DUPLICATE"] * 6 + ["ACCEPTED"] * 3
    assert pair.copies() == [(item.seq, item.batch, 3 < item.seq <= 6) for item in items]
    journal = pair.sites[0].journal("collector")
    assert journal.count('"shared_streams_away"') == 1
    assert journal.count('"shared_streams_back"') == 1


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_fifty_agents_lose_nothing_whatever_is_killed_and_every_second_copy_says_so(tmp_path: Path) -> None:
    """The long form: `./dev bench two_collectors`."""
    figures = measure(tmp_path, seconds=20, seed=int.from_bytes(tmp_path.name.encode()[-4:]), per_second=4)
    print(figures)
    assert figures["in_topic"] - figures["unverified"] > figures["made"] / 10 > 100, (
        "hardly anything was plain"
    )
    assert (figures["lost"], figures["unknown"], figures["plain_twice"]) == (0, 0, 0)
    assert len(figures["faults"]) >= 4
