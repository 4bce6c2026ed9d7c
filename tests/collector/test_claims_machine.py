"""Collectors that share a real Redis, and die, stand still and lose it at any step: what the topic then holds.

The script judges claims and `Sharing` decides what is published; agents, logs, the producer and Kafka are a model, whose
every step may be the last before a crash. The bounds of the script are small, so that all of them are reached.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis as client
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.redis_server import RedisServer, installed
from collector.decide.claims import Batches, Claimed, Fate, StreamId, Verdict, lease_ms, pack, read_reply
from collector.handoff.kafka.sharing import Fated, Sharing
from collector.handoff.log import UNVERIFIED, Kind, Record
from collector.state.redis_streams import script
from wire.identity import AgentId, digest

pytestmark = pytest.mark.skipif(not installed(), reason="needs redis-server; ./dev setup installs it")

RING, LIMIT, WINDOW = 3, 8, 4
TIMEOUT_SECONDS = 10.0
KEY = "stream"
STREAM = StreamId(AgentId("agent"), 1)


class Away(Exception):
    """Redis does not answer."""


class Shared:
    """A real server that can be away, forget all, or come back from a snapshot under another name."""

    def __init__(self, server: RedisServer) -> None:
        self.redis: Any = client.Redis.from_url(server.url)
        self.redis.delete(KEY)
        self._sha = self.redis.script_load(script(RING, LIMIT, WINDOW))
        self.away = False
        self.run = 1
        self.snapshot: bytes | None = None
        self.now_ms = 1_000_000

    def call(self, act: str, *words: Any) -> Any:
        if self.away:
            raise Away
        return self.redis.evalsha(self._sha, 1, KEY, act, self.now_ms, f"run-{self.run}", *words)

    def come_back(self) -> None:
        self.run += 1
        self.redis.delete(KEY)
        if self.snapshot is not None:
            self.redis.restore(KEY, 0, self.snapshot)


@dataclass
class Message:
    seq: int
    unverified: bool
    produced_ms: int
    arrived: bool = False


@dataclass
class Collector:
    """Its log, and of the rest what dies with it."""

    shared: Shared
    owner: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    log: list[Record] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    cursor: int = 0
    inbox: deque[list[int]] = field(default_factory=deque)
    decided: list[Fated] = field(default_factory=list)
    sent_end: int = 0
    in_flight: deque[tuple[int, Message | None]] = field(default_factory=deque)
    """(end of the record, its message if it was published)."""
    marked: int = 0
    """How many at its head are marked and not yet behind the cursor."""
    owed: list[int] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.sharing = Sharing(self, 0)

    def claim_and_wait(self, batches: Batches) -> dict[tuple[StreamId, int], Claimed]:
        numbered = batches[STREAM]
        try:
            reply = self.shared.call("claim", self.owner, lease_ms(TIMEOUT_SECONDS), pack(numbered))
        except Away:
            return {}
        answers = read_reply(numbered, reply)
        return {(STREAM, seq): claimed for (seq, _), claimed in zip(numbered, answers, strict=True)}

    def mark_and_wait(self, batches: Batches) -> None:
        try:
            self.shared.call("mark", pack(batches[STREAM]))
        except Away:
            self.owed += [seq for seq, _ in batches[STREAM]]

    def session_breaks(self) -> None:
        """The producer is thrown away; what it had not sent never arrives, what it had is on its way."""
        self.sharing.handed_over_end = max(self.sharing.handed_over_end, self.sent_end)
        self.in_flight.clear()
        self.decided.clear()
        self.marked = 0
        self.sent_end = self.cursor


def body(seq: int) -> bytes:
    return b"batch %d" % seq


class World:
    """Two collectors and one agent."""

    def __init__(self, server: RedisServer, snapshots: bool) -> None:
        """`snapshots`: whether a Redis that restarts has an old state, or none."""
        self.shared = Shared(server)
        self.snapshots = snapshots
        self.collectors = [Collector(self.shared) for _ in range(2)]
        self.topic: list[tuple[int, bool]] = []
        self.on_their_way: list[Message] = []
        """Of producers that are gone: they arrive in time or never."""
        self.made = 0
        self.answered: set[int] = set()
        self.agent_at = 0
        self.connect(0)

    @property
    def oldest(self) -> int:
        return next(seq for seq in range(1, self.made + 2) if seq not in self.answered)

    def up(self, at: int) -> Collector | None:
        collector = self.collectors[at]
        return None if collector.stopped else collector

    def a_batch_goes_some_of_its_way(self, at: int, steps: int, more: int, most: int) -> None:
        """To the collector the agent is connected to, or, of what it had sent there before, to the other."""
        at = self.agent_at if at == 0 else 1 - self.agent_at
        way: list[Callable[[], None]] = [
            lambda: self.send(more, 0) if at == self.agent_at else None,
            lambda: self.take_in(at),
            lambda: self.decide(at, most),
            lambda: self.produce(at),
            lambda: self.arrive(at, most),
            lambda: self.mark(at),
            lambda: self.confirm(at, answer=False),
            lambda: self.confirm(at, answer=True),
        ]
        for step in way[:steps]:
            step()

    def the_agent_changes(self, at: int) -> None:
        self.connect(at)

    def a_collector_suffers(self, at: int, what: str) -> None:
        {"kill": self.kill, "stop": self.stop, "go_on": self.go_on}[what](at)

    def redis_suffers(self, what: str) -> None:
        if what in ("save", "restart") and not self.snapshots:
            what = "forget"
        {
            "away": lambda: self.redis_away(True),
            "back": lambda: self.redis_away(False),
            "forget": self.redis_forgets_all,
            "save": self.redis_saves,
            "restart": self.redis_restarts,
        }[what]()

    # The agent

    def connect(self, at: int) -> None:
        collector = self.up(at)
        if collector is None:
            return
        self.agent_at = at
        with contextlib.suppress(Away):
            self.shared.call("open", self.oldest, self.made + 1)

    def send(self, more: int, skip: int) -> None:
        """What is unanswered, and something new, within the agent's window; it lies in the socket until it is read."""
        self.made = min(self.made + more, self.oldest + WINDOW - 1)
        batches = [seq for seq in range(self.oldest, self.made + 1) if seq not in self.answered]
        if batches[skip:]:
            self.collectors[self.agent_at].inbox.append(batches[skip:])

    # A collector, step by step

    def take_in(self, at: int) -> None:
        collector = self.up(at)
        if collector is None or not collector.inbox:
            return
        received_ms = self.shared.now_ms
        new = [seq for seq in collector.inbox.popleft() if seq not in collector.known]
        if not new:
            return
        answers = collector.claim_and_wait({STREAM: [(seq, digest(body(seq))) for seq in new]})
        for seq in new:
            claimed = answers.get((STREAM, seq), Claimed(Verdict.AWAY))
            assert claimed.verdict is not Verdict.CONFLICT
            if claimed.verdict is Verdict.DELIVERED:
                assert seq in self.seqs(), "a duplicate of nothing"
                collector.known.add(seq)
            elif claimed.verdict is not Verdict.HELD:
                flags = 0 if claimed.verdict is Verdict.GRANTED else UNVERIFIED
                self.log(collector, seq, received_ms, flags)

    def log(self, collector: Collector, seq: int, received_ms: int, flags: int) -> None:
        offset = collector.log[-1].end if collector.log else 0
        content = body(seq)
        collector.log.append(
            Record(
                offset,
                Kind.ACCEPTED,
                received_ms * 1_000_000,
                STREAM.agent_id,
                STREAM.epoch,
                seq,
                digest(content),
                b"",
                content,
                flags,
            )
        )
        collector.known.add(seq)

    def decide(self, at: int, most: int) -> None:
        collector = self.up(at)
        if collector is None or collector.decided:
            return
        records = [r for r in collector.log if r.offset >= max(collector.sent_end, collector.cursor)][:most]
        if records:
            collector.decided = collector.sharing.fates(records, self.shared.now_ms * 1_000_000)

    def produce(self, at: int) -> None:
        collector = self.up(at)
        if collector is None:
            return
        for record, fate, _ in collector.decided:
            message = None
            if fate is not Fate.SKIP:
                assert fate in (Fate.PUBLISH, Fate.UNVERIFIED)
                message = Message(record.seq, fate is Fate.UNVERIFIED, self.shared.now_ms)
            else:
                assert record.seq in self.seqs(), "skipped, and nobody has delivered it"
            collector.in_flight.append((record.end, message))
            collector.sent_end = record.end
        collector.decided = []

    def arrive(self, at: int, most: int) -> None:
        """The brokers take the next messages, also of a collector that stands still: the kernel sends what it has."""
        pending = [m for _, m in self.collectors[at].in_flight if m is not None and not m.arrived]
        for message in pending[:most]:
            if self.shared.now_ms <= message.produced_ms + TIMEOUT_SECONDS * 1_000:
                message.arrived = True
                self.topic.append((message.seq, message.unverified))

    def arrive_late(self, index: int) -> None:
        """What a producer that is gone had given to the network."""
        if index < len(self.on_their_way):
            message = self.on_their_way.pop(index)
            if self.shared.now_ms <= message.produced_ms + TIMEOUT_SECONDS * 1_000:
                self.topic.append((message.seq, message.unverified))

    def mark(self, at: int) -> None:
        collector = self.up(at)
        if collector is None:
            return
        confirmed = []
        for _, message in list(collector.in_flight)[collector.marked :]:
            if message is not None and not message.arrived:
                break
            collector.marked += 1
            if message is not None:
                confirmed.append((message.seq, digest(body(message.seq))))
        if confirmed:
            collector.sharing.delivered({STREAM: confirmed})

    def confirm(self, at: int, answer: bool) -> None:
        """The cursor moves; then agents are answered, or the connection is cut just before."""
        collector = self.up(at)
        if collector is None:
            return
        while collector.marked:
            collector.cursor, _ = collector.in_flight.popleft()
            collector.marked -= 1
        if answer and collector.cursor == (collector.log[-1].end if collector.log else 0):
            self.answered |= {seq for seq in collector.known if seq <= self.made}

    # Faults

    def time_passes(self, seconds: int) -> None:
        self.shared.now_ms += seconds * 1_000
        for collector in self.collectors:
            if not collector.stopped:
                self.time_out(collector)

    def time_out(self, collector: Collector) -> None:
        limit_ms = self.shared.now_ms - TIMEOUT_SECONDS * 1_000
        if any(m is not None and not m.arrived and m.produced_ms < limit_ms for _, m in collector.in_flight):
            self.lose_producer(collector)

    def lose_producer(self, collector: Collector) -> None:
        self.on_their_way += [m for _, m in collector.in_flight if m is not None and not m.arrived]
        collector.session_breaks()

    def kill(self, at: int) -> None:
        collector = self.collectors[at]
        collector.stopped = False
        self.lose_producer(collector)
        collector.sharing = Sharing(collector, collector.log[-1].end if collector.log else 0)
        collector.inbox.clear()
        collector.owed.clear()

    def stop(self, at: int) -> None:
        self.collectors[at].stopped = True

    def go_on(self, at: int) -> None:
        collector = self.collectors[at]
        if collector.stopped:
            collector.stopped = False
            self.time_out(collector)

    def redis_away(self, away: bool) -> None:
        self.shared.away = away
        if not away:
            for collector in self.collectors:
                if collector.owed and not collector.stopped:
                    self.shared.call("mark", pack((seq, digest(body(seq))) for seq in collector.owed))
                    collector.owed.clear()

    def redis_forgets_all(self) -> None:
        self.shared.redis.delete(KEY)

    def redis_saves(self) -> None:
        self.shared.snapshot = self.shared.redis.dump(KEY)

    def redis_restarts(self) -> None:
        self.shared.come_back()

    # What must hold

    def seqs(self) -> set[int]:
        return {seq for seq, _ in self.topic}

    def check(self) -> None:
        assert self.answered <= self.seqs(), "answered, and not delivered"
        plain = Counter(seq for seq, unverified in self.topic if not unverified)
        assert all(count == 1 for count in plain.values()), "two copies, and neither says so"
        assert self.shared.redis.hlen(KEY) <= 4 + RING + LIMIT, "Redis grows"

    def settle(self) -> None:
        """When all is well again everything comes, however it was left."""
        self.redis_away(False)
        for at in (0, 1):
            self.go_on(at)
        for _ in range(60):
            if self.oldest > self.made:
                break
            self.connect(1 - self.agent_at)
            self.send(0, 0)
            for at in (0, 1):
                self.take_in(at)
                for _ in range(3):
                    self.decide(at, 4)
                    self.produce(at)
                    self.arrive(at, 3)
                    self.arrive(at, 3)
                    self.mark(at)
                    self.confirm(at, answer=True)
            self.time_passes(4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


EVENTS = st.one_of(
    *[
        st.builds(
            lambda *words: lambda world: world.a_batch_goes_some_of_its_way(*words),
            st.sampled_from((0, 0, 0, 1)),
            st.integers(1, 8) | st.just(8),
            st.integers(0, 3),
            st.integers(1, 4),
        )
    ]
    * 6,
    st.sampled_from((0, 1)).map(lambda at: lambda world: world.connect(at)),
    st.tuples(st.integers(0, 1), st.sampled_from(("kill", "stop", "go_on", "go_on", "go_on"))).map(
        lambda words: lambda world: world.a_collector_suffers(*words)
    ),
    st.sampled_from(("away", "back", "back", "forget", "save", "restart")).map(
        lambda what: lambda world: world.redis_suffers(what)
    ),
    st.sampled_from((1, 6, 11, 25)).map(lambda seconds: lambda world: world.time_passes(seconds)),
    st.integers(0, 3).map(lambda index: lambda world: world.arrive_late(index)),
)


@settings(max_examples=100, deadline=None)
@given(snapshots=st.booleans(), events=st.lists(EVENTS, min_size=40, max_size=80))
def test_whatever_dies_stands_still_or_forgets_the_topic_tells_its_copies_apart(
    server: RedisServer, snapshots: bool, events: list[Callable[[World], None]]
) -> None:
    world = World(server, snapshots)
    for event in events:
        event(world)
        world.check()
    world.settle()
    world.check()
    assert world.answered == set(range(1, world.made + 1)), "everything comes in the end"
    assert world.seqs() == world.answered, "and nothing that nobody made"
