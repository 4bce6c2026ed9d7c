"""`./dev bench admission`: does a tenant at 100 times its rate slow the others down?

Eight agents of eight tenants deliver at a steady pace, alone and beside two agents of a ninth tenant that send
100 times what its plan allows, and what they are told to keep at once again. Both in turn, several times over, so
that what else the machine does falls on both alike. In the end the plan is lifted, and every batch must be there.

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
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.connection import Connection, p99
from bench.fleet import SimulatedAgent, Stream, deliveries, enrol
from bench.site import Site
from collector.decide.admission import weight
from collector.decide.bucket import MICRO
from collector.door.ca import CertificateAuthority
from wire.statuses import Status
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
    calm = [Client(site, enrol(authority), f"tenant-{number}") for number in range(CALM)]
    noisy = [Client(site, enrol(authority), "noisy") for _ in range(NOISY)]
    for client in (*calm, *noisy):
        await client.connection.open()
    round_deliveries = round(ROUND_SECONDS * CALM_DELIVERIES_PER_SECOND)
    calm_pace = 1 / CALM_DELIVERIES_PER_SECOND
    sample = Stream(noisy[0].agent.agent_id, 1, ROWS, "noisy").next()
    tokens = NOISY_ITEMS * weight(len(sample.batch), ROWS) / MICRO
    noisy_pace = tokens / (NOISY_RATE_TOKENS * TIMES_ITS_RATE / NOISY)
    for client in noisy:
        # What the queue can take, and what may be under way behind it.
        client.store(NOISY_QUEUE_BATCHES + 1_000)
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    for rounds_of_its_kind, flooding in itertools.chain(
        [([], False)], [(alone, False), (beside, True)] * rounds
    ):
        into: list[float] = []
        rounds_of_its_kind.append(into)
        work = [client.prepared(round_deliveries, CALM_ITEMS) for client in calm]
        begun = asyncio.get_running_loop().time() + 0.05
        tasks = [
            client.connection.send(part, into, begun + number * calm_pace / CALM, calm_pace)
            for number, (client, part) in enumerate(zip(calm, work, strict=True))
        ]
        if flooding:
            tasks += [client.flood(begun, noisy_pace, ROUND_SECONDS) for client in noisy]
        await asyncio.gather(*tasks)
    answers = sum((client.connection.answers for client in noisy), Counter[int]())
    site.ask("collector", "plan_set", tenant="noisy", plan={"rate": "unlimited"})
    begun = time.monotonic()
    waiting = sum(view["batches"] for view in site.ask("collector", "parked")["tenants"])
    while site.ask("collector", "parked")["tenants"]:
        await asyncio.sleep(0.02)
    drained = time.monotonic() - begun
    for client in noisy:
        while client.refused():
            await client.flood(asyncio.get_running_loop().time(), 0.0, 0.5)
    for client in (*calm, *noisy):
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
    return result, sum(client.connection.delivered for client in (*calm, *noisy))


class Client:
    """One agent with one open stream."""

    def __init__(self, site: Site, agent: SimulatedAgent, tenant: str) -> None:
        self.agent = agent
        self._stream = Stream(agent.agent_id, 1, ROWS, tenant)
        self._spool: list[pb.Item] = []
        self._sent_up_to = 0
        self.connection = Connection(site.ports["ingest"], agent, self._stream.hello())

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
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        index = 0
        while loop.time() < ends and self._spool:
            await asyncio.sleep(max(0.0, begin + index * pace - loop.time()))
            index += 1
            items = self._spool[:NOISY_ITEMS]
            self._sent_up_to = max(self._sent_up_to, items[-1].seq)
            settled = await self.connection.exchange(pb.DeliverRequest(delivery=pb.Delivery(items=items)))
            self._spool = [item for item in items if item.seq not in settled] + self._spool[NOISY_ITEMS:]


if __name__ == "__main__":
    sys.exit(main())
