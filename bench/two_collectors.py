"""`./dev bench two_collectors`: two collectors, one Kafka broker, one Redis, fifty agents, and everything that can go wrong.

Collectors, broker and Redis are killed and stopped in mid-flight; Redis forgets all; connections are cut in mid-batch
and agents come back to either collector; what was acknowledged is sent again in floods. When all is well again:

lost              batches that an agent made and the topic does not have
unknown           batches in the topic that nobody made, or with other bytes than were made
plain_twice       batches of which the topic has two copies, none of them with the header dedup=unverified
duplicates        copies beyond the first; each has its like in bytes
unverified        copies with that header, first ones among them
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from confluent_kafka import Consumer, TopicPartition

from bench.fleet import SimulatedAgent, Stream, enrol
from bench.kafka_broker import KafkaBroker
from bench.redis_server import RedisServer
from bench.site import Site
from collector.door.ca import CertificateAuthority
from wire.identity import digest
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub

AGENTS = 50
DELIVERY_TIMEOUT_SECONDS = 2
LEASE_SECONDS = 12.0
"""That is what follows from the delivery timeout."""
ANSWER_SECONDS = 6.0
REDIS_SHARE = 0.4
"""Of the time, at its end, in which Redis suffers as well."""
START_SECONDS = 180.0
"""A process that was killed comes back within this time, also on a machine that has much else to do."""
MOST_SPOOLED = 200
RECENT = 300
SLOW_TENANT = "slow"
"""Its plan is too small for it: it is parked, and released."""

Identity = tuple[str, int, int]


class _Cut(Exception):
    """The connection has ended."""


@dataclass
class Agent:
    """Makes batches and delivers them, to whichever collector it comes to."""

    simulated: SimulatedAgent
    sites: list[Site]
    rng: random.Random
    tenant: str
    per_second: float
    answers: Counter[str]
    more: bool = True
    made: dict[int, bytes] = field(default_factory=dict)
    """seq -> digest."""
    spool: dict[int, pb.Item] = field(default_factory=dict)
    recent: deque[pb.Item] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Acknowledged ones, for floods."""
    call: Any = None

    def __post_init__(self) -> None:
        self._stream = Stream(self.simulated.agent_id, 1, rows=3, tenant=self.tenant)
        self._begun = time.monotonic()
        self._cut = False

    async def run(self) -> None:
        while self.more or self.spool:
            site = self.rng.choice(self.sites)
            address = f"127.0.0.1:{site.ports['ingest']}"
            async with grpc.aio.secure_channel(
                address, self.simulated.credentials, CHANNEL_OPTIONS
            ) as channel:
                # Killed, stopped, cut: what was not answered is in the spool.
                with contextlib.suppress(grpc.RpcError, TimeoutError, asyncio.InvalidStateError, _Cut):
                    await self._converse(channel)
            await asyncio.sleep(self.rng.uniform(0.05, 0.5))

    def cut(self) -> None:
        if self.call is not None:
            self._cut = True
            self.call.cancel()

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        self._cut = False
        self.call = IngestStub(channel).Deliver()
        oldest = min(self.spool, default=self._stream.seq + 1)
        await self._exchange(self._stream.hello(oldest))
        until = time.monotonic() + self.rng.expovariate(1 / 8)
        while time.monotonic() < until and (self.more or self.spool):
            self._make()
            items = list(self.spool.values())[: self.rng.randint(1, 60)]
            if self.recent and self.rng.random() < 0.05:
                items += self.rng.sample(self.recent, min(50, len(self.recent)))
            if items:
                delivery = pb.DeliverRequest(delivery=pb.Delivery(items=items))
                if self.rng.random() < 0.03:
                    # In mid-batch: sent, and gone before the answer.
                    await asyncio.wait_for(self.call.write(delivery), ANSWER_SECONDS)
                    await asyncio.sleep(self.rng.uniform(0, 0.05))
                    break
                wait_ms = self._take((await self._exchange(delivery)).answers.answers)
                await asyncio.sleep(wait_ms / 1_000)
            await asyncio.sleep(self.rng.uniform(0.1, 0.5))
        self.cut()

    async def _exchange(self, request: pb.DeliverRequest) -> pb.DeliverResponse:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.call.write(request)
                response = await self.call.read()
        except asyncio.CancelledError:
            if self._cut:
                raise _Cut from None
            raise
        if isinstance(response, pb.DeliverResponse):
            return response
        raise _Cut

    def _make(self) -> None:
        due = (time.monotonic() - self._begun) * self.per_second
        while self.more and len(self.made) < due and len(self.spool) < MOST_SPOOLED:
            item = self._stream.next()
            self.made[item.seq] = item.digest
            self.spool[item.seq] = item

    def _take(self, answers: Iterable[pb.Answer]) -> int:
        """Milliseconds to wait."""
        wait_ms = 0
        for answer in answers:
            self.answers[Status.Name(answer.status).removeprefix("STATUS_").lower()] += 1
            assert answer.status != Status.STATUS_REJECTED, answer
            if answer.status == Status.STATUS_RETRY:
                wait_ms = max(wait_ms, answer.retry_after_ms)
            elif (item := self.spool.pop(answer.seq, None)) is not None:
                self.recent.append(item)
        return wait_ms


class Rig:
    """The processes, and what happens to them."""

    def __init__(self, directory: Path, rng: random.Random, agents: int, per_second: float) -> None:
        self.rng = rng
        self.broker = KafkaBroker(directory / "kafka")
        self.redis = RedisServer(directory / "redis")
        self.sites = [Site(directory / "one"), Site(directory / "two")]
        self.topic = f"usage-{uuid.uuid4().hex[:8]}"
        self.answers: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.agents: list[Agent] = []
        self._count, self._per_second = agents, per_second
        self._suffering: set[str] = set()

    def start(self) -> None:
        self.broker.start(START_SECONDS)
        self.redis.start()
        kafka = {"brokers": [self.broker.plain], "topic": self.topic, "partitions": 3}
        settings = {
            "handoff": {"kafka": {**kafka, "delivery_timeout": f"{DELIVERY_TIMEOUT_SECONDS}s"}},
            "shared": {"redis": self.redis.url},
            "admission": {"tenants": {SLOW_TENANT: {"rate": 1, "burst": 62}}},
        }
        for site in self.sites:
            site.prepare(collector=settings)
        first, second = (site.directory / "collector/ca" for site in self.sites)
        authority = CertificateAuthority(first)
        for number in range(self._count):
            tenant = SLOW_TENANT if number % 10 == 0 else f"tenant-{number % 7}"
            rng = random.Random(self.rng.random())
            agent = Agent(enrol(authority), self.sites, rng, tenant, self._per_second, self.answers)
            self.agents.append(agent)
        # Behind one name they show one certificate authority.
        shutil.rmtree(second)
        shutil.copytree(first, second)
        for site in self.sites:
            site.start_collector(START_SECONDS)

    def close(self) -> None:
        for site in self.sites:
            site.close()
        self.redis.kill()
        self.broker.kill()

    async def run(self, seconds: float) -> float:
        """Seconds from the end of all faults to the last acknowledgement."""
        running = asyncio.gather(*(agent.run() for agent in self.agents))
        faults = [self._kill_collector, self._stop_collector, self._stop_broker, self._cut, self._kill_broker]
        of_redis = [self._stop_redis, self._kill_redis, self._flush_redis]
        until = time.monotonic() + seconds
        suffering: list[asyncio.Task[None]] = []
        order: list[Callable[[], Coroutine[None, None, None]]] = []
        await asyncio.sleep(2)
        while time.monotonic() < until:
            if not order:
                # As long as Redis is well hardly anything is unverified, and what is plain is put to the test.
                shaken = time.monotonic() > until - seconds * REDIS_SHARE
                order = self.rng.sample(faults + of_redis * shaken, len(faults) + len(of_redis) * shaken)
            suffering.append(asyncio.create_task(order.pop()()))
            await asyncio.sleep(self.rng.uniform(0.5, max(1.0, min(6.0, seconds / 12))))
        await asyncio.gather(*suffering)
        for agent in self.agents:
            agent.more = False
        for site in self.sites:
            await asyncio.to_thread(
                site.command, "collector", "plan", "set", SLOW_TENANT, "--rate", "unlimited"
            )
        well = time.monotonic()
        async with asyncio.timeout(180):
            await running
        settled = time.monotonic() - well
        while any(self._left(site) for site in self.sites):
            assert time.monotonic() < well + 240, "what is logged or parked does not come out"
            await asyncio.sleep(0.2)
        return settled

    def _left(self, site: Site) -> float:
        """Bytes not confirmed, batches parked, marks owed."""
        metrics = self.metrics(site)
        names = (
            "kafka_unconfirmed_bytes",
            "shared_owed_marks",
            f'tenant_parked_batches{{tenant="{SLOW_TENANT}"}}',
        )
        return sum(metrics.get(name, 0) for name in names)

    def metrics(self, site: Site) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{site.ports['local']}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("weighbridge_collector_"): float(value) for name, _, value in pairs}

    # Faults. Each brings back what it took away; one thing suffers one at a time.

    async def _on(
        self, what: str, name: str, seconds: float, down: Callable[[], None], up: Callable[[], None]
    ) -> None:
        if what in self._suffering:
            return
        self._suffering.add(what)
        self.faults[name] += 1
        await asyncio.to_thread(down)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(up)
        self._suffering.discard(what)

    async def _kill_collector(self) -> None:
        number = self.rng.randrange(2)
        site = self.sites[number]
        # Back at once, as a service manager does it; or when its claims have run out.
        seconds = self.rng.choice((0.0, 0.5, 2.0, LEASE_SECONDS + 2))
        await self._on(
            f"collector {number}",
            "collector killed",
            seconds,
            lambda: void(site.stop("collector", signal.SIGKILL)),
            lambda: site.start_collector(START_SECONDS),
        )

    async def _stop_collector(self) -> None:
        number = self.rng.randrange(2)
        site = self.sites[number]

        def signalled(how: signal.Signals) -> None:
            assert site.collector is not None
            site.collector.send_signal(how)

        await self._on(
            f"collector {number}",
            "collector stopped",
            self.rng.choice((0.5, 3.0, LEASE_SECONDS + 2)),
            lambda: signalled(signal.SIGSTOP),
            lambda: signalled(signal.SIGCONT),
        )

    async def _kill_broker(self) -> None:
        await self._on(
            "broker", "broker killed", 0.5, self.broker.kill, lambda: self.broker.start(START_SECONDS)
        )

    async def _stop_broker(self) -> None:
        seconds = self.rng.choice((0.5, 1.5, DELIVERY_TIMEOUT_SECONDS + 2.0))
        await self._on("broker", "broker stopped", seconds, self.broker.pause, self.broker.resume)

    async def _kill_redis(self) -> None:
        await self._on("redis", "redis killed", self.rng.uniform(0, 3), self.redis.kill, self.redis.start)

    async def _stop_redis(self) -> None:
        def signalled(number: int) -> None:
            assert self.redis.process is not None
            self.redis.process.send_signal(number)

        await self._on(
            "redis",
            "redis stopped",
            self.rng.choice((0.5, 3.0)),
            lambda: signalled(signal.SIGSTOP),
            lambda: signalled(signal.SIGCONT),
        )

    async def _flush_redis(self) -> None:
        def flush() -> None:
            self.redis.command("FLUSHALL")

        await self._on("redis", "redis flushed", 0, flush, lambda: None)

    async def _cut(self) -> None:
        self.faults["connections cut"] += 1
        for agent in self.rng.sample(self.agents, len(self.agents) // 2):
            agent.cut()


def void(_: object) -> None:
    """Of what a fault does only the effect is wanted."""


def copies(broker: KafkaBroker, topic: str) -> dict[Identity, list[tuple[bytes, bool]]]:
    """(digest of the bytes, whether it says unverified) of every copy in a topic."""
    found: dict[Identity, list[tuple[bytes, bool]]] = defaultdict(list)
    settings = {"bootstrap.servers": broker.plain, "group.id": uuid.uuid4().hex, "enable.auto.commit": False}
    consumer = Consumer(settings)
    try:
        partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
        places = [TopicPartition(topic, number, 0) for number in partitions]
        left = sum(consumer.get_watermark_offsets(place, timeout=20)[1] for place in places)
        consumer.assign(places)
        deadline = time.monotonic() + 120
        while left > 0:
            assert time.monotonic() < deadline, f"{left} messages are still to come"
            for message in consumer.consume(10_000, timeout=1):
                assert message.error() is None, message.error()
                headers: dict[str, Any] = dict(message.headers() or [])
                identity = headers["agent_id"].decode(), int(headers["epoch"]), int(headers["seq"])
                found[identity].append(
                    (digest(message.value() or b""), headers.get("dedup") == b"unverified")
                )
                left -= 1
    finally:
        consumer.close()
    return found


def measure(
    directory: Path, seconds: float, seed: int, agents: int = AGENTS, per_second: float = 5.0
) -> dict[str, Any]:
    rig = Rig(directory, random.Random(seed), agents, per_second)
    try:
        rig.start()
        settled = asyncio.run(rig.run(seconds))
        for site in rig.sites:
            assert site.stop("collector") == 0, site.journal("collector")[-2_000:]
        found = copies(rig.broker, rig.topic)
    finally:
        rig.close()
    made: dict[tuple[str, int, int], bytes] = {
        (a.simulated.agent_id, 1, seq): d for a in rig.agents for seq, d in a.made.items()
    }
    other_bytes = [i for i, some in found.items() if {d for d, _ in some} != {made.get(i)}]
    plain = Counter(identity for identity, some in found.items() for _, unverified in some if not unverified)
    return {
        "seconds": seconds,
        "seed": seed,
        "agents": agents,
        "faults": dict(sorted(rig.faults.items())),
        "answers": dict(sorted(rig.answers.items())),
        "made": len(made),
        "in_topic": sum(map(len, found.values())),
        "lost": len(made.keys() - found.keys()),
        "unknown": len(other_bytes),
        "plain_twice": sum(count > 1 for count in plain.values()),
        "duplicates": sum(len(some) - 1 for some in found.values()),
        "unverified": sum(unverified for some in found.values() for _, unverified in some),
        "settled_seconds": round(settled, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench two_collectors", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300, help="of faults; settling comes after them")
    parser.add_argument("--quick", action="store_const", const=20.0, dest="seconds", help="20 of them")
    parser.add_argument("--per-second", type=float, default=5, help="batches of one agent")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory:
        figures = measure(Path(directory), args.seconds, seed, per_second=args.per_second)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value}")
    return 1 if figures["lost"] or figures["unknown"] or figures["plain_twice"] else 0


if __name__ == "__main__":
    sys.exit(main())
