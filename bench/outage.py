"""`./dev bench outage`: the brokers are away for 20 minutes at rated load, in less time with as much waiting.

Rated are 1,000 hosts with a batch of 10 rows in 10 seconds. What they would make in 20 minutes, 120,000 batches, is made here
in `--seconds`, and kept in the agents' spools. A real broker (one node) is killed and started again.

outage_seconds        how long nobody took anything
lost                  batches that were made and are not in the topic, byte for byte
repeated              records of the topic beyond one a batch; the ledger keeps one
in_order              whether each stream's batches stand in the topic in their order
rss_peak_mib          the collector's resident memory at its highest, over all of it
rss_limit_mib         what it may have: idle, twice `handoff.kafka.in_flight`, and 48 MiB for messages on their way and malloc
waiting_batches       in the spools when the broker was back
seconds_to_drain      from then until the last one was acknowledged
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
from collections import deque
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.agent import rss_mib
from bench.fleet import SimulatedAgent, Stream, enrol
from bench.kafka_broker import KafkaBroker, missing
from bench.site import Site
from collector.config import Kafka
from collector.door.ca import CertificateAuthority
from collector.handoff.kafka.reader import TopicReader
from wire.daemon.settings import Seconds
from wire.identity import digest
from wire.statuses import Status
from wire.tls import CHANNEL_OPTIONS
from wire.v1 import ingest_pb2 as pb
from wire.v1.ingest_pb2_grpc import IngestStub

BATCHES = 1_000 * 20 * 60 // 10
ROWS = 10
AGENTS = 20
ITEMS = 100
IN_FLIGHT_MIB, SPARE_MIB = 8, 48
TOPIC = "usage-metering"
UNDISTURBED_SECONDS = 3.0
LONGEST_DRAIN_SECONDS = 1_800.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench outage", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="how long the broker is away (default 120)"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the batches, in a tenth of the time")
    parser.add_argument("--json", action="store_true", help="figures only")
    args = parser.parse_args()
    why = missing()
    if why:
        print(why, file=sys.stderr)
        return 2
    scale = 0.1 if args.quick else 1.0
    with (
        tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as name,
        KafkaBroker(_made(Path(name) / "kafka")) as broker,
        Site(Path(name) / "site") as site,
    ):
        result = asyncio.run(_measure(site, broker, args.seconds * scale, round(BATCHES * scale)))
    if not args.json:
        print(
            f"{AGENTS} agents, batches of {ROWS} rows, {BATCHES / args.seconds:.0f} a second;"
            f" on {platform.release()}, {os.cpu_count()} CPUs shared with broker and agents"
        )
    print(json.dumps(result))
    return 0 if result["lost"] == 0 and result["in_order"] else 1


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


async def _measure(site: Site, broker: KafkaBroker, seconds: float, batches: int) -> dict[str, Any]:
    kafka = {"brokers": [broker.plain], "topic": TOPIC, "partitions": 12, "in_flight": f"{IN_FLIGHT_MIB}MiB"}
    site.prepare(
        collector={"journal_level": "error", "handoff": {"kafka": kafka | {"delivery_timeout": "5s"}}}
    )
    authority = CertificateAuthority(site.directory / "collector" / "ca")
    site.start_collector()
    assert site.collector is not None
    pid = site.collector.pid
    idle = rss_mib(pid)
    address = f"127.0.0.1:{site.ports['ingest']}"
    agents = [SpoolingAgent(enrol(authority), address, f"tenant-{n}") for n in range(AGENTS)]
    per_second = batches / seconds / AGENTS
    async with asyncio.TaskGroup() as tasks:
        for agent in agents:
            tasks.create_task(agent.meter(per_second))
            tasks.create_task(agent.ship())
        await asyncio.sleep(UNDISTURBED_SECONDS)
        await asyncio.to_thread(broker.kill)
        gone = time.monotonic()
        for agent in agents:
            agent.most = len(agent.digests) + batches // AGENTS
        while any(agent.metering for agent in agents):
            await asyncio.sleep(0.1)
        await asyncio.to_thread(broker.start)
        waiting, back = sum(len(agent.spool) for agent in agents), time.monotonic()
        while any(agent.spool for agent in agents):
            assert time.monotonic() < back + LONGEST_DRAIN_SECONDS, site.journal("collector")[-2_000:]
            await asyncio.sleep(0.1)
        drained = time.monotonic() - back
    peak = _most_rss_mib(pid)
    assert site.stop("collector") == 0
    return {
        "made_batches": sum(len(agent.digests) for agent in agents),
        "outage_seconds": round(back - gone, 1),
        **await asyncio.to_thread(_compare, broker, agents),
        "rss_peak_mib": round(peak, 1),
        "rss_limit_mib": round(idle + 2 * IN_FLIGHT_MIB + SPARE_MIB, 1),
        "waiting_batches": waiting,
        "seconds_to_drain": round(drained, 1),
    }


def _most_rss_mib(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1_024


def _compare(broker: KafkaBroker, agents: list[SpoolingAgent]) -> dict[str, Any]:
    """What the topic has against what was made."""
    reader = TopicReader(Kafka(brokers=[broker.plain], delivery_timeout=Seconds(30)), (TOPIC,), None)
    by_id = {agent.agent.agent_id.encode(): agent for agent in agents}
    seen: set[tuple[bytes, int]] = set()
    last = dict.fromkeys(by_id, 0)
    wrong, in_order = 0, True
    for entry in reader.entries():
        agent_id, seq = entry.headers["agent_id"], int(entry.headers["seq"])
        wrong += digest(entry.value) != by_id[agent_id].digests[seq - 1]
        if (agent_id, seq) not in seen:
            in_order = in_order and seq > last[agent_id]
            last[agent_id] = seq
        seen.add((agent_id, seq))
    reader.close()
    assert wrong == 0, "bytes in the topic that no agent made"
    lost = sum(len(agent.digests) for agent in agents) - len(seen)
    return {"lost": lost, "repeated": reader.total - len(seen), "in_order": in_order}


class SpoolingAgent:
    """Makes batches at its rate whatever happens, and sends each until it is answered for, the oldest first."""

    def __init__(self, agent: SimulatedAgent, address: str, tenant: str) -> None:
        self.agent = agent
        self._address = address
        self._stream = Stream(agent.agent_id, 1, ROWS, tenant)
        self.spool: deque[pb.Item] = deque()
        self.digests: list[bytes] = []
        """Of each batch made, by seq - 1."""
        self.most = sys.maxsize
        """Batches it makes in all."""

    @property
    def metering(self) -> bool:
        return len(self.digests) < self.most

    async def meter(self, per_second: float) -> None:
        begun = time.monotonic()
        while self.metering:
            due = min(self.most, int((time.monotonic() - begun) * per_second))
            while len(self.digests) < due:
                item = self._stream.next()
                self.digests.append(item.digest)
                self.spool.append(item)
            await asyncio.sleep(0.1)

    async def ship(self) -> None:
        while self.metering or self.spool:
            try:
                async with grpc.aio.secure_channel(
                    self._address, self.agent.credentials, CHANNEL_OPTIONS
                ) as channel:
                    await self._stay(IngestStub(channel).Deliver())
            except (
                grpc.RpcError,
                asyncio.InvalidStateError,
            ):  # the second: a write to a stream that has ended
                await asyncio.sleep(0.5)

    async def _stay(self, call: Any) -> None:
        """Deliver over one connection, one Delivery at a time."""
        await call.write(self._stream.hello(1))
        await call.read()
        while self.metering or self.spool:
            items = [self.spool[n] for n in range(min(ITEMS, len(self.spool)))]
            if not items:
                await asyncio.sleep(0.05)
                continue
            await call.write(pb.DeliverRequest(delivery=pb.Delivery(items=items)))
            wait_ms = await self._answers(call, len(items))
            await asyncio.sleep(wait_ms / 1e3)
        await call.done_writing()

    async def _answers(self, call: Any, count: int) -> int:
        """Forget what was answered for; how long to wait before what was not is sent again."""
        wait_ms = 0
        while count:
            message = await call.read()
            if message is grpc.aio.EOF:
                await call.code()
                raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, None)
            count -= len(message.answers.answers)
            for answer in message.answers.answers:
                assert answer.status != Status.STATUS_REJECTED, answer
                if answer.status == Status.STATUS_RETRY:
                    wait_ms = max(wait_ms, answer.retry_after_ms)
                elif not wait_ms:
                    assert self.spool.popleft().seq == answer.seq
        return wait_ms


if __name__ == "__main__":
    sys.exit(main())
