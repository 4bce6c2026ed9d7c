"""`./dev bench churn`: a day's worth of births and deaths leaves nothing behind.

A million cgroups are made and removed in ten minutes, under a running agent with the probes loaded.

cgroups             how many were born and died; per_second
left_behind         what the kernel's maps hold in the end that they did not in the beginning: births, tombstones, network
pins                [before, after]
rss_mib             [before, after] of the agent
not_stored          what the probes had no room for (wakes are a hint and cost nothing)
delivered           of the cgroups that used CPU (every `BUSY_EVERY`th), those with a last row at the collector
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.agent import rss_mib
from bench.cgroups import Cgroup, slice_of_our_own
from bench.probe_set import ProbeSet, loaded
from bench.site import Site
from collector.handoff.log import Kind, Record, scan
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

WORKERS = 2
PER_SECOND = 1_700
"""A million in ten minutes. The kernel's maps hold what ends in half a minute at this rate; readings come every ten seconds."""
WARM_SECONDS = 25.0
"""More than two intervals: what a reading takes for its moment depends on the rate, not on the time."""
BUSY_EVERY = 500
KEPT = ("births", "tombstones", "network")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench churn", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 seconds instead of 10 minutes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(20 if args.quick else 600)
    print(json.dumps(result))
    return 0


def measure(seconds: float) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory,
        loaded(Path(directory)) as probes,
        slice_of_our_own("weighbridge-bench") as ours,
        Site(Path(directory) / "site") as site,
    ):
        site.prepare(agent={"read": {"probes_dir": str(probes.directory)}})
        site.start_collector()
        site.enroll()
        site.start_agent()
        site.wait_metering()
        assert site.agent is not None
        # What a first wave leaves in caches and pools is not growth.
        _churn(ours, WARM_SECONDS, "warm")
        _settle(probes)
        before = _standing(probes, site.agent.pid)
        begun = time.monotonic()
        more, busy = _churn(ours, seconds, "docker")
        took = time.monotonic() - begun
        _settle(probes)
        after = _standing(probes, site.agent.pid)
        overflow = probes.status()["overflow"]
        assert site.stop("agent") == 0
        assert site.stop("collector") == 0
        last = _last_rows(site)
    return {
        "cgroups": more,
        "per_second": round(more / took),
        "left_behind": {name: after[name] - before[name] for name in KEPT},
        "pins": [before["pins"], after["pins"]],
        "rss_mib": [before["rss_mib"], after["rss_mib"]],
        "not_stored": {kind: count for kind, count in overflow.items() if count and kind != "wakes"},
        "delivered": [len(busy & last), len(busy)],
    }


def _churn(ours: Cgroup, seconds: float, name: str) -> tuple[int, set[int]]:
    """(cgroups that were born and died, ids of those that used CPU)."""
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        parts = pool.starmap(
            _live_and_die, [(ours.path, seconds, f"{name}{worker}") for worker in range(WORKERS)]
        )
    return sum(count for count, _ in parts), set().union(*(busy for _, busy in parts))


def _live_and_die(parent: Path, seconds: float, name: str) -> tuple[int, set[int]]:
    count, busy = 0, set()
    begun = time.monotonic()
    while (now := time.monotonic()) < begun + seconds:
        ahead = begun + count * WORKERS / PER_SECOND - now
        if ahead > 0:
            time.sleep(ahead)
        path = parent / f"{name}-{count:064x}.scope"
        path.mkdir()
        if count % BUSY_EVERY == 0:
            busy.add(path.stat().st_ino)
            _use_some_cpu(path)
        _remove(path)
        count += 1
    return count, busy


def _use_some_cpu(path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        (path / "cgroup.procs").write_text("0")
        while time.process_time() < 0.002:
            pass
        os._exit(0)
    os.waitpid(pid, 0)


def _remove(path: Path) -> None:
    while True:
        try:
            path.rmdir()
        except OSError:
            # The last task is still on its way out.
            time.sleep(0.0005)
        else:
            return


def _settle(probes: ProbeSet) -> None:
    """Until the agent, which reads every ten seconds, has emptied the maps, or does not get any further."""
    last, still = -1, 0
    while still < 15:
        time.sleep(1.0)
        now = probes.status()["maps"]["tombstones"]["elements"]
        still = still + 1 if now >= last >= 0 else 0
        last = now


def _standing(probes: ProbeSet, agent_pid: int) -> dict[str, Any]:
    maps = probes.status()["maps"]
    return {
        **{name: maps[name]["elements"] for name in KEPT},
        "pins": sum(1 for _ in probes.pins.iterdir()),
        "rss_mib": round(rss_mib(agent_pid), 1),
    }


def _last_rows(site: Site) -> set[int]:
    last: set[int] = set()
    for record in scan(site.directory / "collector" / "log"):
        if isinstance(record, Record) and record.kind is Kind.ACCEPTED:
            batch = pb.UsageBatch.FromString(record.body)
            for row, cgroup_id in enumerate(table_of(batch).cgroup_id):
                if batch.row_flags[row] & pb.ROW_FLAG_FINAL:
                    last.add(cgroup_id)
    return last


if __name__ == "__main__":
    sys.exit(main())
