"""What collectors share of their streams in a real Redis: claims, marks, bounds, and life without it."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.redis_server import RedisServer, installed
from collector.decide.claims import Claimed, Numbered, StreamId, Verdict
from collector.errors import CollectorError
from collector.state.owner import owner_of
from collector.state.redis_streams import LIMIT, RING, RedisStreams
from tests.waiting import until
from wire.identity import digest, new_agent_id
from wire.limits import WINDOW

pytestmark = pytest.mark.skipif(not installed(), reason="needs redis-server; ./dev setup installs it")

LEASE_MS = 60_000
GRANTED, UNVERIFIED, HELD, DELIVERED, CONFLICT = (
    Verdict.GRANTED,
    Verdict.UNVERIFIED,
    Verdict.HELD,
    Verdict.DELIVERED,
    Verdict.CONFLICT,
)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Party:
    """One collector's side of one stream."""

    def __init__(
        self, server: RedisServer, stream: StreamId, lease_ms: int = LEASE_MS, topic: str = "t"
    ) -> None:
        self.streams = RedisStreams(server.url, server.port != 0, topic, uuid.uuid4().bytes, lease_ms)
        self.stream = stream

    def open(self, oldest: int, following: int) -> None:
        self.streams.open(self.stream, oldest, following)

    def claims(self, *numbered: Numbered) -> list[Claimed]:
        answers = self.streams.claim_and_wait({self.stream: list(numbered)})
        return [answers[self.stream, seq] for seq, _ in numbered]

    def claim(self, *seqs: int) -> list[Verdict]:
        return [claimed.verdict for claimed in self.claims(*((seq, of(seq)) for seq in seqs))]

    def mark(self, *seqs: int) -> None:
        self.streams.mark_and_wait({self.stream: [(seq, of(seq)) for seq in seqs]})


def of(seq: int, version: int = 0) -> bytes:
    return digest(f"{seq}/{version}".encode())


@pytest.fixture
def two(redis: RedisServer) -> Iterator[tuple[Party, Party]]:
    """Two collectors at the beginning of a new stream."""
    stream = StreamId(new_agent_id(), 1)
    one, other = Party(redis, stream), Party(redis, stream)
    one.open(1, 1)
    yield one, other
    one.streams.close()
    other.streams.close()


def test_the_first_to_claim_publishes_and_the_other_waits_for_its_mark(two: tuple[Party, Party]) -> None:
    one, other = two
    assert one.claim(1, 2, 3) == [GRANTED] * 3
    (held, _) = other.claims((2, of(2)), (4, of(4)))
    assert held.verdict is HELD
    assert 0 < held.retry_after_ms <= LEASE_MS
    one.mark(1, 2)
    assert other.claim(1, 2, 3, 4) == [DELIVERED, DELIVERED, HELD, GRANTED]
    assert one.claim(3, 4) == [GRANTED, HELD], "its own claim is renewed"


def test_a_claim_that_ran_out_is_taken_over_and_both_copies_may_be_there(redis: RedisServer) -> None:
    stream = StreamId(new_agent_id(), 1)
    one, other = Party(redis, stream, lease_ms=1), Party(redis, stream)
    one.open(1, 1)
    assert one.claim(1) == [GRANTED]
    until(lambda: other.claim(1) == [UNVERIFIED])
    assert one.claim(1) == [HELD]
    assert other.claim(1) == [UNVERIFIED], "that it is renewed makes it no better"
    other.mark(1)
    assert one.claim(1) == [DELIVERED]
    for party in (one, other):
        party.streams.close()


def test_another_digest_is_a_conflict_before_the_mark_after_it_and_behind_the_watermark(
    two: tuple[Party, Party],
) -> None:
    one, other = two
    one.claim(1, 2, 4)
    one.mark(1, 4)
    for seq in (1, 2, 4):
        (claimed,) = other.claims((seq, of(seq, 1)))
        assert claimed.verdict is CONFLICT
        assert of(seq).startswith(claimed.known)
        assert len(claimed.known) == 16
    one.mark(*range(5, RING + 5))
    assert [c.verdict for c in other.claims((4, of(4, 1)))] == [CONFLICT], "the watermark stands at 1"
    one.mark(2, 3)
    assert [c.verdict for c in other.claims((3, of(3, 1)))] == [DELIVERED], "its digest is not kept any more"


def test_the_same_identity_in_another_topic_is_another_batch(redis: RedisServer) -> None:
    stream = StreamId(new_agent_id(), 1)
    one, other = Party(redis, stream), Party(redis, stream, topic="u")
    for party in (one, other):
        party.open(1, 1)
        assert party.claim(1) == [GRANTED]
        party.mark(1)
        party.streams.close()


def test_a_redis_that_forgot_grants_unverified_what_an_agent_may_have_had_under_way(
    redis: RedisServer, two: tuple[Party, Party]
) -> None:
    one, other = two
    one.claim(*range(1, 101))
    one.mark(*range(1, 101))
    redis.command("FLUSHALL")
    assert other.claim(101) == [UNVERIFIED]
    assert other.claim(99, 100, 101 + WINDOW, 102 + WINDOW) == [UNVERIFIED] * 3 + [GRANTED]
    # An agent that says where it stands makes it exact again.
    redis.command("FLUSHALL")
    other.open(99, 105)
    assert other.claim(98, 99, 104, 105) == [UNVERIFIED] * 3 + [GRANTED]


def test_a_redis_that_comes_back_from_a_snapshot_may_have_forgotten_the_last_of_it(tmp_path: Path) -> None:
    stream = StreamId(new_agent_id(), 1)
    with RedisServer(tmp_path) as server:
        one, other = Party(server, stream), Party(server, stream)
        one.open(1, 1)
        one.claim(*range(1, 11))
        one.mark(*range(1, 11))
        server.command("SAVE")
        one.claim(*range(11, 21))
        one.mark(*range(11, 21))
        server.kill()
        server.start()
        until(lambda: other.streams.claim_and_wait({stream: [(5, of(5))]}))
        assert other.claim(10, 11, 20) == [DELIVERED, UNVERIFIED, UNVERIFIED]
        for party in (one, other):
            party.streams.close()


def test_a_stream_stays_small_and_a_gap_does_not_stop_it(
    redis: RedisServer, two: tuple[Party, Party]
) -> None:
    one, _ = two
    key = f"weighbridge:dedup:t:{{{one.stream.agent_id}:1}}"
    for first in range(1, 2_000, 50):
        assert one.claim(*range(first, first + 50)) == [GRANTED] * 50
        one.mark(*range(first, first + 50))
    assert int(redis.command("HGET", key, "w")) == 2_000
    assert int(redis.command("HLEN", key)) == RING + 4
    assert int(redis.command("MEMORY", "USAGE", key)) < 3_000
    assert int(redis.command("PTTL", key)) > 0
    for first in range(2_002, 6_000, 50):  # 2001 never comes
        one.claim(*range(first, first + 50))
        one.mark(*range(first, first + 50))
        assert int(redis.command("HLEN", key)) <= LIMIT + RING + 4
    assert one.claim(2_001) == [UNVERIFIED], "not known, and never called delivered"


def test_without_redis_nobody_waits_and_marks_are_told_when_it_is_back(tmp_path: Path) -> None:
    stream = StreamId(new_agent_id(), 1)
    with RedisServer(tmp_path) as server:
        one, other = Party(server, stream), Party(server, stream)
        one.open(1, 1)
        assert one.claim(1, 2) == [GRANTED] * 2
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        assert one.streams.claim_and_wait({stream: [(3, of(3))]}) == {}
        assert "Timeout" in one.streams.trouble
        one.mark(1, 2)
        assert one.streams.owed == 2
        told = threading.Event()
        one.streams.claim({stream: [(4, of(4))]}, lambda answers: told.set() if not answers else None)
        assert told.is_set(), "answered at once"
        server.process.send_signal(signal.SIGCONT)
        until(lambda: not one.streams.trouble)
        assert one.streams.owed == 0
        assert other.claim(1, 2) == [DELIVERED] * 2
        server.kill()
        server.start()
        until(lambda: other.streams.claim_and_wait({stream: [(3, of(3))]}))
        for party in (one, other):
            party.streams.close()


def test_a_server_that_takes_no_writes_is_as_good_as_away(
    redis: RedisServer, two: tuple[Party, Party]
) -> None:
    one, _ = two
    redis.command("CONFIG", "SET", "maxmemory", "1")
    try:
        assert one.streams.claim_and_wait({one.stream: [(1, of(1))]}) == {}
        assert "OOM" in one.streams.trouble or "OutOfMemory" in one.streams.trouble
    finally:
        redis.command("CONFIG", "SET", "maxmemory", "0")
    until(lambda: not one.streams.trouble)
    assert one.claim(1) == [GRANTED]


def test_the_script_is_loaded_again_where_it_is_not_known(
    redis: RedisServer, two: tuple[Party, Party]
) -> None:
    one, _ = two
    assert one.claim(1) == [GRANTED]
    redis.command("SCRIPT", "FLUSH")
    assert one.claim(2) == [GRANTED]
    assert not one.streams.trouble


def test_many_streams_go_in_one_round_trip_each_by_itself(
    redis: RedisServer, two: tuple[Party, Party]
) -> None:
    one, _ = two
    some = {StreamId(one.stream.agent_id, epoch): [(1, of(1)), (2, of(2))] for epoch in range(10, 40)}
    for stream in some:
        one.streams.open(stream, 1, 1)
    answers = one.streams.claim_and_wait(some)
    assert len(answers) == 60
    assert {claimed.verdict for claimed in answers.values()} == {GRANTED}


def test_a_cluster_spreads_the_streams(tmp_path: Path) -> None:
    with RedisServer(tmp_path, cluster=True) as server:
        parties = [Party(server, StreamId(new_agent_id(), 1)) for _ in range(4)]
        for party in parties:
            party.open(1, 1)
            assert party.claim(1, 2) == [GRANTED] * 2
            party.mark(1)
            assert party.claim(1, 2) == [DELIVERED, GRANTED]
            party.streams.close()
        slots = {
            server.command("CLUSTER", "KEYSLOT", key) for key in server.command("KEYS", "*dedup*").split()
        }
        assert len(slots) > 1


def test_an_address_that_is_none_names_its_setting() -> None:
    with pytest.raises(CollectorError, match=r"shared\.redis"):
        RedisStreams("http://example.org", False, "t", bytes(16), LEASE_MS)


def test_a_collector_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "collector.id"
    assert owner_of(path) == owner_of(path)
    assert len(owner_of(path)) == 16
    path.write_text("nobody\n")
    with pytest.raises(CollectorError, match="move it away"):
        owner_of(path)
