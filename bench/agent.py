"""`./dev bench agent`: what the agent costs, as a real process over real cgroups.

us_per_container_N   CPU time of the metering thread (read, meter, encode, spool) per container and interval, at N
                     cgroups of which each used some CPU in each interval; median over the intervals. The kernel
                     probes are loaded, for this agent alone
us_per_container_1000_without_probes  the same with `read.probes: off`: every file read
us_per_container_1000_with_shipping   the whole process: gRPC, TLS and event loop too
ratio_to_plain       us_per_container_1000 divided by what plain open + read + parse of the same files costs
rss_mib              resident memory at the largest N
idle_core_percent_20 CPU time of the whole process by wall clock, at the default intervals, over 20 cgroups in which
                     nothing happens
first_reading_s      from exec of the command to the first durable reading, at the largest N; median of three starts
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from agent.config import Meter
from agent.daemon import METERING_THREAD
from bench.cgroups import Cgroup, slice_of_our_own
from bench.probe_set import loaded
from bench.site import Site

STARTS = 3
FILES = ("cpu.stat", "cpu.pressure", "memory.pressure", "io.pressure")
"""What the agent reads of a cgroup on a host whose v2 hierarchy has no memory and io controllers."""

_MOVER = """
import os, sys, time
pid = str(os.getpid()).encode()
fds = [os.open(line.strip() + "/cgroup.procs", os.O_WRONLY) for line in sys.stdin]
while True:
    begun = time.monotonic()
    for fd in fds:
        os.write(fd, pid)
        end = time.perf_counter() + 20e-6
        while time.perf_counter() < end: pass
    time.sleep(max(0.05, 0.9 - (time.monotonic() - begun)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench agent", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer intervals: noisier")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    intervals = 8 if args.quick else 30
    result: dict[str, Any] = {"idle_core_percent_20": idle_core_percent(20, 3 if args.quick else 12)}
    files_only = measure(1_000, intervals, probes=False)
    result["us_per_container_1000_without_probes"] = files_only["us"]
    for count in (100, 1_000):
        measured = measure(count, intervals)
        result[f"us_per_container_{count}"] = measured["us"]
        result["us_per_container_1000_with_shipping"] = measured["us_process"]
        result["ratio_to_plain"] = measured["ratio"]
        result["rss_mib"] = measured["rss_mib"]
        result["first_reading_s"] = measured["first_reading_s"]
        if not args.json:
            print(
                f"{count:5} cgroups: {measured['us']:6.1f} us per container and interval,"
                f" {measured['us_process']:.1f} with shipping"
                f" (plain reading alone {measured['plain_us']:.1f} us), {measured['rss_mib']:.1f} MiB,"
                f" first reading after {measured['first_reading_s']:.2f} s, {measured['rows']} rows delivered"
            )
    if args.json:
        print(json.dumps(result))
    else:
        print(f"   20 idle cgroups: {result['idle_core_percent_20']} % of a core")
        print(
            f"on {platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}: {json.dumps(result)}"
        )
    return 0


@contextlib.contextmanager
def _host(count: int, probes: bool = True, **settings: Any) -> Iterator[tuple[Site, list[Cgroup]]]:
    """`count` cgroups, a collector, and an agent that is enrolled and does not run yet."""
    with (
        tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as directory,
        slice_of_our_own("weighbridge-bench") as ours,
        Site(Path(directory)) as site,
        loaded(Path(directory)) if probes else contextlib.nullcontext() as probe_set,
    ):
        groups = [ours.child(f"docker-{index:064x}.scope") for index in range(count)]
        rules = [
            {"path": f"**/docker-*{digit}.scope", "tenant": f"tenant-{digit}"} for digit in "0123456789abcdef"
        ]
        read = {"probes_dir": str(probe_set.directory)} if probe_set is not None else {"probes": "off"}
        site.prepare(agent={"owners": {"rules": rules}, "read": read, **settings})
        site.start_collector()
        site.enroll()
        yield site, groups


def idle_core_percent(count: int, intervals: int) -> float:
    """Of the whole process, at the default intervals, over cgroups in each of which a process sleeps."""
    defaults = Meter()
    meter = {"interval": f"{defaults.interval:g}s", "memory_sample": f"{defaults.memory_sample:g}s"}
    with _host(count, meter=meter) as (site, groups):
        for group in groups:
            group.run(["sleep", "1d"])
        site.start_agent()
        site.wait_metering()
        assert site.agent is not None
        time.sleep(1.5 * defaults.interval)  # the start's own work is done
        before, begun = cpu_ns(site.agent.pid), time.monotonic_ns()
        time.sleep(intervals * defaults.interval)
        used, passed = cpu_ns(site.agent.pid) - before, time.monotonic_ns() - begun
        containers = site.ask("agent", "status")["units"]
        assert containers >= count
        return round(100 * used / passed, 3)


def measure(count: int, intervals: int, probes: bool = True) -> dict[str, float]:
    """One agent over `count` cgroups for that many one-second intervals."""
    with _host(count, probes) as (site, groups):
        first = statistics.median(_first_reading_s(site) for _ in range(STARTS))
        assert site.agent is not None
        pid = site.agent.pid
        mover = _keep_busy(groups)
        try:
            time.sleep(2.5)
            # From the middle of one interval to the middle of the next: one tick each.
            time.sleep(1.5 - time.time() % 1)
            process, metering = [], []
            for _ in range(intervals):
                before = cpu_ns(pid), cpu_ns(pid, METERING_THREAD)
                time.sleep(1.5 - time.time() % 1)
                process.append(cpu_ns(pid) - before[0])
                metering.append(cpu_ns(pid, METERING_THREAD) - before[1])
            assert 0 < min(metering) < min(process)
            rss = rss_mib(pid)
            assert (site.ask("agent", "status")["probes"] == "attached") is probes
            tenants = site.ask("collector", "status")["tenants"]
            delivered = sum(t["rows"] for t in tenants.values())
            assert delivered >= count * intervals, f"only {delivered} rows arrived"
            assert sum(t["cpu_usage_ns"] for t in tenants.values()) > 0
        finally:
            mover.kill()
            mover.wait()
        plain = _plain_us(groups)
        per_container = statistics.median(metering) / 1_000 / count
        site.stop("agent", signal.SIGTERM)
        return {
            "us": round(per_container, 2),
            "us_process": round(statistics.median(process) / 1_000 / count, 2),
            "plain_us": round(plain, 2),
            "ratio": round(per_container / plain, 3),
            "rss_mib": round(rss, 1),
            "first_reading_s": round(first, 3),
            "rows": delivered,
        }


def _first_reading_s(site: Site) -> float:
    """Start the agent with nothing but its identity, and leave it running."""
    site.stop("agent", signal.SIGKILL)
    for file in (site.directory / "agent").glob("spool*"):
        file.unlink()
    (site.directory / "agent.journal").unlink(missing_ok=True)
    begun = time.time()
    site.start_agent()
    site.wait_metering()
    return _event_time(site.journal("agent"), "metering_begun") - begun


def _keep_busy(groups: list[Cgroup]) -> subprocess.Popen[bytes]:
    """One process that visits every cgroup about once a second and burns a little in each."""
    mover = subprocess.Popen([sys.executable, "-S", "-c", _MOVER], stdin=subprocess.PIPE)
    assert mover.stdin is not None
    mover.stdin.write("".join(f"{group.path}\n" for group in groups).encode())
    mover.stdin.close()
    return mover


def _plain_us(groups: list[Cgroup]) -> float:
    """CPU microseconds per cgroup of the straightforward way: open, read, split, int."""

    def once() -> int:
        seen = 0
        for group in groups:
            for name in FILES:
                values = {}
                for line in (group.path / name).read_text().splitlines():
                    key, _, rest = line.partition(" ")
                    values[key] = int(rest) if rest.isdigit() else dict(w.split("=") for w in rest.split())
                seen += len(values)
        return seen

    assert once() > 4 * len(groups)
    rounds = 5
    begun = time.process_time_ns()
    for _ in range(rounds):
        once()
    return (time.process_time_ns() - begun) / 1_000 / rounds / len(groups)


def cpu_ns(pid: int, thread: str = "") -> int:
    """CPU time of all threads, or of those with that name, in nanoseconds (first field of schedstat)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if thread in (task / "comm").read_text():
            total += int((task / "schedstat").read_text().split()[0])
    return total


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def _event_time(journal: str, event: str) -> float:
    for line in journal.splitlines():
        entry = json.loads(line)
        if entry["event"] == event:
            return datetime.fromisoformat(entry["ts"]).timestamp()
    raise KeyError(event)


if __name__ == "__main__":
    sys.exit(main())
