"""`./dev bench floods`: what an attack on the collector's doors costs it, and costs the agents beside it.

Each attack runs for seconds from another process, at whatever rate it is let through, against a collector that is
sized for 1,000 agents, its files in memory where that can be. Collector and agents have priority over the attacker where this
user may give it. Eight agents deliver at a steady pace, before and during it; before it a process does nothing but take as
much of this machine's CPU as the attacker's own does, which in earnest is another's. By attack:

rss_added_mib    most resident memory during it, above what it was before
p99_ratio        99th percentile of the time to an acknowledgement, during it by that before it
p50_ratio        likewise the median: on a busy machine it says more
p99_before_ms, p99_ms    both 99th percentiles
cpu_per_s        seconds of CPU time the collector used a second, all agents included
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.admission import Client
from bench.agent import cpu_ns, rss_mib
from bench.attacks import ATTACKS, Target
from bench.fleet import SimulatedAgent, Stream, enrol
from bench.site import Site
from collector.door.ca import CertificateAuthority

MEMORY = Path("/dev/shm")
"""Where the collector's files are: no attack writes, and the stalls of a shared disk would decide about each 99th percentile."""
AGENTS = 8
ITEMS = 5
PACE_SECONDS = 0.05
MARGIN_SECONDS = 1.0
"""The attack begins so long before the measuring."""
LIMITS: dict[str, dict[str, Any]] = {
    "too_many_connections": {"connections": {"most": 200}, "limits": {"streams": 190}},
}
SIZED = {"connections": {"most": 1_050}, "limits": {"streams": 1_000}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench floods", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 s of each attack instead of 15: noisier")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=sorted(ATTACKS), action="append", help="repeatable")
    args = parser.parse_args()
    seconds = 5.0 if args.quick else 15.0
    with contextlib.suppress(PermissionError):
        # Before whatever else runs here, the attacker among it: an attack is to cost what it makes the collector do.
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    result = {}
    for name in args.only or ATTACKS:
        with (
            tempfile.TemporaryDirectory(
                prefix="weighbridge-bench-", dir=MEMORY if MEMORY.is_dir() else None
            ) as directory,
            Site(Path(directory)) as site,
        ):
            result[name] = asyncio.run(_attacked(site, name, seconds))
        if not args.json:
            print(name, json.dumps(result[name]), flush=True)
    if not args.json:
        print(f"on {platform.release()}, {os.cpu_count()} CPUs shared with agents and attacker")
    print(json.dumps(result))
    return 0


def target_of(site: Site, agent: SimulatedAgent) -> Target:
    """An attacker who has got hold of an agent's certificate."""
    files = {
        "agent": agent.key_pem + agent.certificate_pem,
        "hello": Stream(agent.agent_id, 1).hello().SerializeToString(),
    }
    for name, content in files.items():
        (site.directory / f"attacker.{name}").write_bytes(content)
    return Target(
        site.ports["ingest"],
        site.ports["enrolment"],
        str(site.directory / "collector" / "ca" / "ca.crt"),
        str(site.directory / "attacker.agent"),
        str(site.directory / "attacker.hello"),
    )


@contextlib.asynccontextmanager
async def _beside(name: str, target: Target, seconds: float) -> AsyncIterator[dict[str, int]]:
    """The attack, in a process of its own that begins before the body and ends behind it; then what it did."""
    whole = str(seconds + 2 * MARGIN_SECONDS)
    command = [sys.executable, "-m", "bench.attacks", name, json.dumps(asdict(target)), whole]
    attack = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    done: dict[str, int] = {}
    try:
        await asyncio.sleep(MARGIN_SECONDS)
        yield done
        done.update(json.loads((await asyncio.to_thread(attack.communicate))[0]))
    finally:
        if attack.poll() is None:
            attack.kill()
        attack.wait()


async def _attacked(site: Site, name: str, seconds: float) -> dict[str, Any]:
    site.prepare(collector={"journal_level": "error", **LIMITS.get(name, SIZED)})
    authority = CertificateAuthority(site.directory / "collector" / "ca")
    agents, attacker = [enrol(authority) for _ in range(AGENTS)], enrol(authority)
    site.start_collector()
    assert site.collector is not None
    pid = site.collector.pid
    clients = [Client(site.ports["ingest"], agent, f"tenant-{number}") for number, agent in enumerate(agents)]
    for client in clients:
        await client.connection.open()
    await _round(clients, 2.0)  # connections, caches, branch predictors
    target = target_of(site, attacker)
    async with _beside("nothing", target, seconds):
        before = await _round(clients, seconds)
    rss_before = rss_mib(pid)
    async with _beside(name, target, seconds) as done:
        watched = asyncio.create_task(_most_rss_mib(pid))
        cpu, begun = cpu_ns(pid), time.monotonic()
        during = await _round(clients, seconds)
        cpu_per_second = (cpu_ns(pid) - cpu) / 1e9 / (time.monotonic() - begun)
    watched.cancel()
    most = await watched
    for client in clients:
        await client.connection.close()
    assert site.collector.poll() is None, site.journal("collector")
    return {
        "rss_added_mib": round(most - rss_before, 1),
        "p99_ratio": round(_percentile(during, 0.99) / _percentile(before, 0.99), 2),
        "p50_ratio": round(_percentile(during, 0.5) / _percentile(before, 0.5), 2),
        "p99_before_ms": round(_percentile(before, 0.99) * 1e3, 1),
        "p99_ms": round(_percentile(during, 0.99) * 1e3, 1),
        "cpu_per_s": round(cpu_per_second, 2),
        "did": done,
    }


async def _round(clients: list[Client], seconds: float) -> list[float]:
    """Every client delivers at its pace, evenly between the others; how long each delivery took."""
    count = int(seconds / PACE_SECONDS)
    prepared = [client.prepared(count, ITEMS) for client in clients]
    begin, latencies = asyncio.get_running_loop().time() + 0.1, list[float]()
    await asyncio.gather(
        *(
            client.connection.send(
                requests, latencies, begin + index * PACE_SECONDS / len(clients), PACE_SECONDS
            )
            for index, (client, requests) in enumerate(zip(clients, prepared, strict=True))
        )
    )
    assert len(latencies) == count * len(clients)
    return latencies


async def _most_rss_mib(pid: int) -> float:
    """Until cancelled."""
    most = 0.0
    try:
        while True:
            most = max(most, rss_mib(pid))
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return most


def _percentile(latencies: list[float], part: float) -> float:
    return sorted(latencies)[int(len(latencies) * part)]


if __name__ == "__main__":
    sys.exit(main())
