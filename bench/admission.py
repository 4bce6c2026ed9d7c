"""`./dev bench admission`: does a tenant at 100 times its rate slow the others down?

Eight agents of eight tenants deliver at a steady pace, alone and beside two agents of a ninth tenant that send
100 times what its plan allows, and what they are told to keep at once again. Both in turn, several times over, so
that what else the machine does falls on both alike. The ninth has a process of its own: what making its noise costs
is not on the loop that times the eight. In the end the plan is lifted, and every batch must be there.

p99_ack_ms_alone, p99_ack_ms_beside   time from send to acknowledgement of the eight's deliveries: the median of the rounds' p99,
                                      since a disk that others use stands still in one round or the other
ratio                                 beside / alone
noisy_parked, noisy_retried           answers to the ninth: parked until its queue was full, then sent away
released_per_s                        batches a second out of its queue once its plan is lifted
lost                                  batches that were answered for and are not in the log
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Self

from bench.connection import Connection, p99
from bench.fleet import SimulatedAgent, Stream, deliveries, enrol
from bench.site import Site
from collector.decide.admission import weight
from collector.decide.bucket import MICRO
from collector.door.ca import CertificateAuthority
from wire.identity import AgentId
from wire.statuses import Status
from wire.tls import client_credentials
from wire.v1 import ingest_pb2 as pb

CALM, NOISY = 8, 2
CALM_DELIVERIES_PER_SECOND, CALM_ITEMS = 20, 5
NOISY_ITEMS = 50
NOISY_RATE_TOKENS, TIMES_ITS_RATE = 5.0, 100
NOISY_QUEUE_BATCHES = 10_000
ROWS = 10
ROUND_SECONDS = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench admission", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds = 3 if args.quick else 9
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory, Site(Path(directory)) as site:
        plan = {"rate": NOISY_RATE_TOKENS, "burst": 62, "park_batches": NOISY_QUEUE_BATCHES}
        site.prepare(collector={"journal_level": "error", "admission": {"tenants": {"noisy": plan}}})
        authority = CertificateAuthority(site.directory / "collector" / "ca")
        site.start_collector()
        result, delivered = asyncio.run(_measure(site, authority, rounds))
        site.stop("collector")
        verdict = json.loads(site.command("collector", "log", "verify", "--json").stdout)
        assert verdict["sound"], verdict
        result["lost"] = delivered - verdict["batches"]
        assert result["lost"] == verdict["parked"] == 0, (delivered, verdict)
    if not args.json:
        print(
            f"on {platform.release()}, {os.cpu_count()} CPUs shared with the load, Python {platform.python_version()};"
            f" {rounds} rounds of {ROUND_SECONDS:.0f} s each way"
        )
    print(json.dumps(result))
    return 0


async def _measure(site: Site, authority: CertificateAuthority, rounds: int) -> tuple[dict[str, float], int]:
    """(figures, batches delivered)."""
    calm = [Client(site.ports["ingest"], enrol(authority), f"tenant-{number}") for number in range(CALM)]
    for client in calm:
        await client.connection.open()
    round_deliveries = round(ROUND_SECONDS * CALM_DELIVERIES_PER_SECOND)
    calm_pace = 1 / CALM_DELIVERIES_PER_SECOND
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    with Noise(site.ports["ingest"], authority) as noise:
        for rounds_of_its_kind, flooding in itertools.chain(
            [([], False)], [(alone, False), (beside, True)] * rounds
        ):
            into: list[float] = []
            rounds_of_its_kind.append(into)
            work = [client.prepared(round_deliveries, CALM_ITEMS) for client in calm]
            begun = time.monotonic() + 0.05
            tasks = [
                client.connection.send(part, into, begun + number * calm_pace / CALM, calm_pace)
                for number, (client, part) in enumerate(zip(calm, work, strict=True))
            ]
            if flooding:
                tasks.append(asyncio.to_thread(noise.make, begun))
            await asyncio.gather(*tasks)
        answers = noise.answers
        site.ask("collector", "plan_set", tenant="noisy", plan={"rate": "unlimited"})
        begun = time.monotonic()
        waiting = sum(view["batches"] for view in site.ask("collector", "parked")["tenants"])
        while site.ask("collector", "parked")["tenants"]:
            await asyncio.sleep(0.02)
        drained = time.monotonic() - begun
        delivered = noise.bring_the_rest()
    for client in calm:
        await client.connection.close()
    assert all(set(client.connection.answers) == {Status.STATUS_ACCEPTED} for client in calm)
    ms_alone, ms_beside = (statistics.median(map(p99, each)) * 1e3 for each in (alone, beside))
    result: dict[str, float] = {
        "p99_ack_ms_alone": round(ms_alone, 2),
        "p99_ack_ms_beside": round(ms_beside, 2),
        "ratio": round(ms_beside / ms_alone, 2),
        "noisy_accepted": answers[Status.STATUS_ACCEPTED],
        "noisy_parked": answers[Status.STATUS_PARKED],
        "noisy_retried": answers[Status.STATUS_RETRY],
        "released_per_s": round(waiting / drained),
        "lost": 0,
    }
    return result, delivered + sum(client.connection.delivered for client in calm)


class Noise:
    """The agents of the ninth tenant, in their process."""

    def __init__(self, port: int, authority: CertificateAuthority) -> None:
        """Returns once they are connected."""
        self.answers: Counter[int] = Counter()
        """By status, so far."""
        agents = [enrol(authority) for _ in range(NOISY)]
        words = [(agent.agent_id, agent.certificate_pem, agent.key_pem) for agent in agents]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_noisy, args=(theirs, port, authority.ca_pem, words), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def make(self, begin: float) -> None:
        """A round of it, from `begin` (CLOCK_MONOTONIC) on."""
        self._pipe.send(begin)
        self.answers = self._pipe.recv()

    def bring_the_rest(self) -> int:
        """What was sent and not taken is sent until it is; how many batches were delivered in all."""
        self._pipe.send(None)
        delivered: int = self._pipe.recv()
        return delivered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _noisy(*words: Any) -> None:
    # In earnest it has a host of its own: not by its own use of the CPU is it to slow others down.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    asyncio.run(_noise(*words))


async def _noise(pipe: Pipe, port: int, ca_pem: bytes, agents: list[tuple[AgentId, bytes, bytes]]) -> None:
    clients = [
        Client(
            port, SimulatedAgent(one, client_credentials(ca_pem, certificate, key), certificate, key), "noisy"
        )
        for one, certificate, key in agents
    ]
    sample = Stream(clients[0].agent.agent_id, 1, ROWS, "noisy").next()
    tokens = NOISY_ITEMS * weight(len(sample.batch), ROWS) / MICRO
    pace = tokens / (NOISY_RATE_TOKENS * TIMES_ITS_RATE / NOISY)
    for client in clients:
        # What the queue can take, and what may be under way behind it.
        client.store(NOISY_QUEUE_BATCHES + 1_000)
        await client.connection.open()
    pipe.send(None)
    while (begin := await asyncio.to_thread(pipe.recv)) is not None:
        await asyncio.gather(*(client.flood(begin, pace, ROUND_SECONDS) for client in clients))
        pipe.send(sum((client.connection.answers for client in clients), Counter[int]()))
    for client in clients:
        while client.refused():
            await client.flood(time.monotonic(), 0.0, 0.5)
        await client.connection.close()
    pipe.send(sum(client.connection.delivered for client in clients))


class Client:
    """One agent with one open stream."""

    def __init__(self, port: int, agent: SimulatedAgent, tenant: str) -> None:
        self.agent = agent
        self._stream = Stream(agent.agent_id, 1, ROWS, tenant)
        self._spool: list[pb.Item] = []
        self._sent_up_to = 0
        self.connection = Connection(port, agent, self._stream.hello())

    def prepared(self, count: int, items: int) -> list[pb.DeliverRequest]:
        """Deliveries made beforehand: making them is no part of what is measured."""
        return list(deliveries([self._stream.next() for _ in range(count * items)], items))

    def store(self, count: int) -> None:
        """Make what `flood` sends."""
        self._spool = [self._stream.next() for _ in range(count)]

    def refused(self) -> bool:
        """Whether something was sent that nobody took."""
        return bool(self._spool) and self._spool[0].seq <= self._sent_up_to

    async def flood(self, begin: float, pace: float, seconds: float) -> None:
        """Send the oldest of the spool every `pace` seconds, whatever the answers say; what is taken leaves it."""
        ends = time.monotonic() + seconds
        index = 0
        while time.monotonic() < ends and self._spool:
            await asyncio.sleep(max(0.0, begin + index * pace - time.monotonic()))
            index += 1
            items = self._spool[:NOISY_ITEMS]
            self._sent_up_to = max(self._sent_up_to, items[-1].seq)
            settled = await self.connection.exchange(pb.DeliverRequest(delivery=pb.Delivery(items=items)))
            self._spool = [item for item in items if item.seq not in settled] + self._spool[NOISY_ITEMS:]


if __name__ == "__main__":
    sys.exit(main())
