"""`./dev bench collector`: what the collector can take, as a real process with mTLS, deduplication and durable log.

batches_per_cpu_s_10rows   batches of 10 rows made durable and acknowledged, per second of the collector's CPU
rows_per_cpu_s_100rows     rows, in batches of 100
p99_ack_ms                 time from send to acknowledgement, at half the throughput of the first figure
rss_mib_10000_streams      resident memory once it knows 10,000 streams (100 agents with 100 epochs each)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc.aio

from bench.agent import cpu_ns, rss_mib
from bench.fleet import SimulatedAgent, Stream, deliveries, enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub

AGENTS = 8
ITEMS = 50
IN_FLIGHT_DELIVERIES = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench collector", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the batches: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    scale = 1 if args.quick else 5
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory, Site(Path(directory)) as site:
        site.prepare(collector={"journal_level": "error"})
        authority = CertificateAuthority(site.directory / "collector" / "ca")
        agents = [enrol(authority) for _ in range(AGENTS)]
        site.start_collector()
        load = Load(site, agents)
        load.run(rows=10, batches=400, epoch=1, per_second=None)  # connections, caches, branch predictors
        ten = load.run(rows=10, batches=2_000 * scale, epoch=2, per_second=None)
        hundred = load.run(rows=100, batches=400 * scale, epoch=3, per_second=None)
        half = ten["per_cpu_second"] / 2
        paced = load.run(rows=10, batches=1_500 * scale, epoch=4, per_second=half)
        site.stop("collector")
        verdict = json.loads(site.command("collector", "log", "verify", "--json").stdout)
        assert verdict["sound"], verdict
        assert verdict["batches"] == load.accepted, (verdict["batches"], load.accepted)
        site.start_collector()
        rss = load.many_streams(100, 100)
    result = {
        "batches_per_cpu_s_10rows": round(ten["per_cpu_second"]),
        "rows_per_cpu_s_100rows": round(hundred["per_cpu_second"] * 100),
        "p99_ack_ms": round(paced["p99_ms"], 1),
        "rss_mib_10000_streams": round(rss, 1),
    }
    if not args.json:
        print(
            f"10 rows: {ten['per_second']:.0f} batches/s; 100 rows: {hundred['per_second']:.0f} batches/s;"
            f" paced at {half:.0f}/s it reached {paced['per_second']:.0f}/s, median {paced['p50_ms']:.1f} ms"
        )
        print(
            f"on {platform.release()}, {os.cpu_count()} CPUs shared with the load, Python {platform.python_version()}"
        )
    print(json.dumps(result))
    return 0


class Load:
    """Drives the collector of a site from this process."""

    def __init__(self, site: Site, agents: list[SimulatedAgent]) -> None:
        self._site = site
        self._agents = agents
        self.accepted = 0

    def run(self, rows: int, batches: int, epoch: int, per_second: float | None) -> dict[str, float]:
        """Deliver `batches` of each agent; figures over all of them."""
        work = []
        for agent in self._agents:
            stream = Stream(agent.agent_id, epoch, rows)
            hello = stream.hello()
            work.append((agent, hello, list(deliveries([stream.next() for _ in range(batches)], ITEMS))))
        assert self._site.collector is not None
        pid = self._site.collector.pid
        cpu, begun = cpu_ns(pid), time.monotonic()
        latencies: list[float] = []

        async def all_agents() -> None:
            each = None if per_second is None else per_second / len(self._agents)
            await asyncio.gather(*(self._one(*job, each, latencies) for job in work))

        asyncio.run(all_agents())
        seconds, cpu_seconds = time.monotonic() - begun, (cpu_ns(pid) - cpu) / 1e9
        total = batches * len(self._agents)
        assert len(latencies) == total // ITEMS
        self.accepted += total
        latencies.sort()
        return {
            "per_cpu_second": total / cpu_seconds,
            "per_second": total / seconds,
            "p50_ms": latencies[len(latencies) // 2] * 1e3,
            "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        }

    async def _one(
        self,
        agent: SimulatedAgent,
        hello: pb.DeliverRequest,
        requests: list[pb.DeliverRequest],
        per_second: float | None,
        latencies: list[float],
    ) -> None:
        address = f"127.0.0.1:{self._site.ports['ingest']}"
        async with grpc.aio.secure_channel(address, agent.credentials, CHANNEL_OPTIONS) as channel:
            call = IngestStub(channel).Deliver()
            await call.write(hello)
            assert (await call.read()).WhichOneof("kind") == "welcome"
            room = asyncio.Semaphore(IN_FLIGHT_DELIVERIES)
            sent: asyncio.Queue[tuple[float, int]] = asyncio.Queue()

            async def answers() -> None:
                for _ in requests:
                    at, count = await sent.get()
                    waiting = count
                    while waiting:
                        message = await call.read()
                        assert all(a.status == Status.STATUS_ACCEPTED for a in message.answers.answers)
                        waiting -= len(message.answers.answers)
                    assert waiting == 0
                    latencies.append(time.monotonic() - at)
                    room.release()

            async with asyncio.TaskGroup() as both:
                both.create_task(answers())
                begun = time.monotonic()
                for index, request in enumerate(requests):
                    if per_second is not None:
                        await asyncio.sleep(max(0.0, begun + index * ITEMS / per_second - time.monotonic()))
                    await room.acquire()
                    sent.put_nowait((time.monotonic(), len(request.delivery.items)))
                    await call.write(request)
            await call.done_writing()

    def many_streams(self, agents: int, epochs: int) -> float:
        """Open agents x epochs streams with a batch each; the collector's resident memory in MiB afterwards."""
        authority = CertificateAuthority(self._site.directory / "collector" / "ca")
        fleet = [enrol(authority) for _ in range(agents)]

        async def open_all() -> None:
            slots = asyncio.Semaphore(16)

            async def one(agent: SimulatedAgent) -> None:
                async with slots:
                    address = f"127.0.0.1:{self._site.ports['ingest']}"
                    async with grpc.aio.secure_channel(
                        address, agent.credentials, CHANNEL_OPTIONS
                    ) as channel:
                        for epoch in range(1, epochs + 1):
                            stream = Stream(agent.agent_id, epoch)
                            call = IngestStub(channel).Deliver()
                            await call.write(stream.hello())
                            await call.read()
                            for request in deliveries([stream.next()], 1):
                                await call.write(request)
                            answer = (await call.read()).answers.answers[0]
                            assert answer.status == Status.STATUS_ACCEPTED
                            await call.done_writing()

            await asyncio.gather(*(one(agent) for agent in fleet))

        asyncio.run(open_all())
        status: dict[str, Any] = self._site.ask("collector", "status")
        assert status["streams"] >= agents * epochs, status["streams"]
        assert self._site.collector is not None
        return rss_mib(self._site.collector.pid)


if __name__ == "__main__":
    sys.exit(main())
