"""`./dev bench collector`: what the collector can take, as a real process with mTLS, deduplication and durable log.

batches_per_cpu_s_10rows   batches of 10 rows made durable and acknowledged, per second of the collector's CPU
rows_per_cpu_s_100rows     rows, in batches of 100
p99_ack_ms                 time from send to acknowledgement, at half the throughput of the first figure
rss_mib_10000_streams      resident memory once it knows 10,000 streams (100 agents with 100 epochs each)
ratio_to_bare_producer     collector / producer, batches of 10 rows per CPU-second; null with `--handoff log`
ratio_to_otel              collector / OpenTelemetry Collector, likewise; null, too, where that cannot be built
..._100rows                both again, of batches of 100 rows

`--handoff kafka` and `--store redis` are a real broker and a real redis-server on this machine. All three send to that
broker with acks=all, idempotence and lz4, in turns, and a user's and the kernel's time of all threads of each process
counts. What they do for it:

collector        mTLS and gRPC in, 50 batches a message. Each batch parsed, digested, validated, checked for duplicates,
                 admitted; synced to the disk; published as a message of its own with key and headers, confirmed,
                 acknowledged
bare producer    confluent-kafka alone: the same batches, keys and headers as ready messages, with the collector's settings
                 and in groups of its size. The floor: no network in, no check, no disk
OpenTelemetry    mTLS and gRPC in, the same rows as OTLP metrics, a resource per container with 13 sums; as many batches a
                 request as make messages of about a megabyte (otlp.proto says more about the same). No validation, no
                 duplicates, no tenants, no disk; a request is one message, and is acknowledged when it is confirmed
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import kafka_broker, redis_server
from bench.agent import cpu_ns, rss_mib
from bench.connection import Connection, p99
from bench.fleet import SimulatedAgent, Stream, deliveries, enrol
from bench.kafka_broker import KafkaBroker
from bench.peers import otel
from bench.peers.bare_producer import BareProducer
from bench.peers.otel import OtelCollector
from bench.redis_server import RedisServer
from bench.site import Site
from collector.door.ca import CertificateAuthority
from wire.delimited import delimit
from wire.statuses import Status
from wire.v1 import ingest_pb2 as pb

AGENTS = 8
ITEMS = 50
IN_FLIGHT = {10: 5, 100: 2}
"""Rows -> Deliveries of each agent that wait for answers; all together stay below `handoff.kafka.in_flight`."""
TOPIC = "usage-metering"
BATCHES = {10: 2_000, 100: 400}
"""Rows -> batches of each agent, in a turn."""
OTLP_BATCHES = {10: 50, 100: 5}
"""Rows -> batches in an OTLP request."""
Ready = list[tuple[SimulatedAgent, pb.DeliverRequest, list[pb.DeliverRequest]]]
"""Hello and Deliveries of each agent, made before anything is measured."""
Work = Callable[[], int]
"""Does some work; how many batches were confirmed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench collector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--handoff", choices=("log", "kafka"), default="log")
    parser.add_argument("--store", choices=("memory", "redis"), default="memory")
    parser.add_argument("--quick", action="store_true", help="one turn instead of five: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weighbridge-bench-")))
        settings: dict[str, Any] = {
            "journal_level": "error",
            # An agent of the 10,000 streams opens the next as soon as it has ended one.
            "limits": {"streams_per_agent": 1_000},
        }
        broker = None
        if args.handoff == "kafka":
            if why := kafka_broker.missing():
                sys.exit(why)
            broker = stack.enter_context(KafkaBroker(directory / "kafka"))
            settings["handoff"] = {"kafka": {"brokers": [broker.plain], "topic": TOPIC}}
        if args.store == "redis":
            if not redis_server.installed():
                sys.exit("needs redis-server; ./dev setup installs it")
            redis = stack.enter_context(RedisServer(directory / "redis"))
            settings["shared"] = {"redis": redis.url}
        site = stack.enter_context(Site(directory / "site"))
        site.prepare(collector=settings)
        result = _measure(site, broker, 1 if args.quick else 5, stack, args.json)
    print(json.dumps(result))
    return 0


def _measure(
    site: Site, broker: KafkaBroker | None, turns: int, stack: contextlib.ExitStack, quiet: bool
) -> dict[str, float | None]:
    authority = CertificateAuthority(site.directory / "collector" / "ca")
    agents = [enrol(authority) for _ in range(AGENTS)]
    site.start_collector()
    while site.ask("collector", "status")["ready"]:
        time.sleep(0.1)
    load = Load(site, agents)
    peers = {} if broker is None else _peers(site, agents, broker, stack)
    load.run(10, 400)()  # connections, caches, branch predictors
    figures: dict[tuple[str, int], _Figure] = {}
    for _ in range(turns):
        for rows, batches in BATCHES.items():
            for name, pid, work in (
                ("collector", load.pid, load.run(rows, batches)),
                *((name, pid, works[rows]) for name, (pid, works) in peers.items()),
            ):
                figures.setdefault((name, rows), _Figure()).add(pid, work)
    half = figures["collector", 10].per_cpu_second / 2
    latencies = load.paced(10, 1_500 * turns, half)
    _check(site, load, broker)
    result: dict[str, float | None] = {
        "batches_per_cpu_s_10rows": round(figures["collector", 10].per_cpu_second),
        "rows_per_cpu_s_100rows": round(figures["collector", 100].per_cpu_second * 100),
        "p99_ack_ms": round(p99(latencies) * 1e3, 1),
        "rss_mib_10000_streams": round(load.many_streams(100, 100), 1),
    }
    for key, name in (("ratio_to_bare_producer", "producer"), ("ratio_to_otel", "otel")):
        for rows, end in ((10, ""), (100, "_100rows")):
            peer = figures.get((name, rows))
            if peer is None:
                result[key + end] = None
                continue
            result[key + end] = round(figures["collector", rows].per_cpu_second / peer.per_cpu_second, 3)
    if not quiet:
        for (name, rows), figure in figures.items():
            print(
                f"{name:9} {rows:3} rows: {figure.per_cpu_second:8.0f} batches per CPU-second"
                f" ({1e6 / figure.per_cpu_second:.0f} us each), {figure.per_second:.0f} a second"
            )
        print(
            f"paced at {half:.0f}/s: median {sorted(latencies)[len(latencies) // 2] * 1e3:.1f} ms;"
            f" on {platform.release()}, {os.cpu_count()} CPUs shared with the load, Python {platform.python_version()}"
        )
    return result


class _Figure:
    """Work of one process, over all turns."""

    def __init__(self) -> None:
        self.batches = 0
        self.seconds = self.cpu_seconds = 0.0

    def add(self, pid: int, work: Work) -> None:
        cpu, begun = cpu_ns(pid), time.monotonic()
        self.batches += work()
        self.seconds += time.monotonic() - begun
        self.cpu_seconds += (cpu_ns(pid) - cpu) / 1e9

    @property
    def per_cpu_second(self) -> float:
        return self.batches / self.cpu_seconds

    @property
    def per_second(self) -> float:
        return self.batches / self.seconds


def _peers(
    site: Site, agents: list[SimulatedAgent], broker: KafkaBroker, stack: contextlib.ExitStack
) -> dict[str, tuple[int, dict[int, Work]]]:
    """Name -> (pid, rows -> its work in a turn) of those that run here."""
    files = {}
    streams = {rows: [Stream(agent.agent_id, 1, rows) for agent in agents] for rows in BATCHES}
    for rows, batches in BATCHES.items():
        files[rows] = site.directory / f"{rows}.batches"
        with files[rows].open("wb") as out:
            for _ in range(batches):
                out.writelines(delimit(stream.next().batch) for stream in streams[rows])
    broker.make_topic("bare", 12, {"max.message.bytes": "2000000"})
    producer = stack.enter_context(BareProducer(broker.plain, "bare", list(files.values())))

    def produced(number: int) -> Work:
        return lambda: producer.send(number)

    peers = {"producer": (producer.process.pid, {rows: produced(n) for n, rows in enumerate(files)})}
    if why := otel.missing():
        print(f"no comparison with an OpenTelemetry Collector: {why}", file=sys.stderr)
        return peers
    broker.make_topic("otlp", 12, {"max.message.bytes": str(otel.MAX_EXPORT_MIB << 20)})
    ca_directory = site.directory / "collector" / "ca"
    collector = stack.enter_context(
        OtelCollector(site.directory / "otelcol", ca_directory, broker.plain, "otlp")
    )
    assert collector.process is not None

    def exported(rows: int) -> Work:
        size = OTLP_BATCHES[rows]
        request = otel.request_of([streams[rows][0].message() for _ in range(size)])
        each = BATCHES[rows] // size

        def work() -> int:
            collector.deliver(agents, request, each, IN_FLIGHT[rows])
            return each * size * len(agents)

        return work

    peers["otel"] = (collector.process.pid, {rows: exported(rows) for rows in BATCHES})
    for work in peers["otel"][1].values():
        work()
    return peers


def _check(site: Site, load: Load, broker: KafkaBroker | None) -> None:
    """Nothing lost, nothing twice; the collector runs again afterwards."""
    site.stop("collector")
    verdict = json.loads(site.command("collector", "log", "verify", "--json").stdout)
    assert verdict["sound"], verdict
    assert verdict["batches"] == load.accepted, (verdict["batches"], load.accepted)
    if broker is not None:
        assert broker.messages_in(TOPIC) == load.accepted
    site.start_collector()
    while site.ask("collector", "status")["ready"]:
        time.sleep(0.1)


class Load:
    """Drives the collector of a site from this process."""

    def __init__(self, site: Site, agents: list[SimulatedAgent]) -> None:
        self._site = site
        self._agents = agents
        self._epoch = 0
        self.accepted = 0

    @property
    def pid(self) -> int:
        assert self._site.collector is not None
        return self._site.collector.pid

    @property
    def _port(self) -> int:
        return self._site.ports["ingest"]

    def run(self, rows: int, batches: int) -> Work:
        """Made ready now: deliver so many batches of each agent, as fast as they are taken."""
        work = self._work(rows, batches)
        return lambda: self._deliver(work, [], 0.0, IN_FLIGHT[rows])

    def paced(self, rows: int, batches: int, per_second: float) -> list[float]:
        """Deliver so many of each agent; how long each Delivery took until it was answered, in seconds."""
        latencies: list[float] = []
        self._deliver(
            self._work(rows, batches), latencies, ITEMS * len(self._agents) / per_second, IN_FLIGHT[rows]
        )
        return latencies

    def _work(self, rows: int, batches: int) -> Ready:
        self._epoch += 1
        work = []
        for agent in self._agents:
            stream = Stream(agent.agent_id, self._epoch, rows)
            hello = stream.hello()
            work.append((agent, hello, list(deliveries([stream.next() for _ in range(batches)], ITEMS))))
        return work

    def _deliver(self, work: Ready, latencies: list[float], pace: float, in_flight: int) -> int:
        """How many batches were accepted, which all must be."""

        async def one(
            agent: SimulatedAgent, hello: pb.DeliverRequest, requests: list[pb.DeliverRequest]
        ) -> int:
            async with Connection(self._port, agent, hello) as connection:
                begin = asyncio.get_running_loop().time()
                await connection.send(requests, latencies, begin, pace, in_flight)
                assert set(connection.answers) == {Status.STATUS_ACCEPTED}, connection.answers
                return connection.delivered

        async def all_agents() -> int:
            return sum(await asyncio.gather(*(one(*job) for job in work)))

        accepted = asyncio.run(all_agents())
        self.accepted += accepted
        return accepted

    def many_streams(self, agents: int, epochs: int) -> float:
        """Open agents x epochs streams with a batch each; the collector's resident memory in MiB afterwards."""
        authority = CertificateAuthority(self._site.directory / "collector" / "ca")

        async def open_all() -> None:
            slots = asyncio.Semaphore(16)

            async def one(agent: SimulatedAgent) -> None:
                streams = [Stream(agent.agent_id, epoch) for epoch in range(1, epochs + 1)]
                async with slots, Connection(self._port, agent, streams[0].hello()) as connection:
                    for stream in streams:
                        if stream.epoch > 1:
                            await connection.open_another(stream.hello())
                        for request in deliveries([stream.next()], 1):
                            await connection.exchange(request)
                    assert set(connection.answers) == {Status.STATUS_ACCEPTED}

            await asyncio.gather(*(one(enrol(authority)) for _ in range(agents)))

        asyncio.run(open_all())
        status: dict[str, Any] = self._site.ask("collector", "status")
        assert status["streams"] >= agents * epochs, status["streams"]
        return rss_mib(self.pid)


if __name__ == "__main__":
    sys.exit(main())
