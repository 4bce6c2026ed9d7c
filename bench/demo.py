"""`./dev demo`: the main job on this host, for real, and the difference to what the kernel counted.

A throw-away CA and enrolment, a collector, an agent and a ledger as processes, three workloads in cgroups of their
own, and everything else on the host beside them. With the kernel probes, also containers too short to sample.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from bench import short_lives
from bench.cgroups import Cgroup, burner, holder, slice_of_our_own, spawner
from bench.probe_set import LOADER, ProbeSet, directory_for_pins
from bench.site import Site
from collector.handoff.log import HANDED_ON, Record, scan
from collector.log_commands import verify
from wire.containers import table_of
from wire.v1 import usage_pb2 as pb

WORKLOADS = (
    ("wb-demo-burner.scope", "burns 30 % of a CPU", burner(0.3)),
    ("wb-demo-holder.scope", "holds 64 MiB", holder(64)),
    ("wb-demo-spawner.scope", "starts short jobs", spawner(0.05)),
)
SHORT_LIVES = 200
BOOKING_SECONDS = 30.0
FOREVER_NS = 1 << 62
OWNERS = {
    "host": "host",
    "rules": [
        {"path": "/weighbridge-demo-*/wb-demo-burner.scope", "tenant": "acme"},
        {"path": "/weighbridge-demo-*/**", "tenant": "globex"},
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to meter (default 15)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    with contextlib.ExitStack() as closing:
        directory = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="weighbridge-demo-")))
        ours, workloads, why_not = _workloads(closing)
        probes = _probes(closing, directory)
        site = closing.enter_context(Site(directory))
        say("a throw-away CA, one join token, one enrolment")
        site.prepare(agent={"owners": OWNERS, "read": {"probes_dir": str(probes.directory)}})
        site.start_collector()
        site.start_ledger()
        agent_id = site.enroll()
        say(f"collector listens on 127.0.0.1:{site.ports['ingest']}; agent is {agent_id}")
        site.start_agent()
        site.wait_metering()
        status = site.ask("agent", "status")
        say(f"reading {status['sources']}")
        for sentence in (*why_not, *status["unseen"]):
            say(f"cannot see: {sentence}")
        started = [(cgroup, cgroup.run(command)) for cgroup, command in workloads]
        short = _start_short_lives(directory, ours, probes)
        watch(site, args.seconds)
        short_ns = short_lives.usage_ns(short) if short is not None else {}
        for cgroup, process in started:
            for pid in cgroup.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.wait()
            cgroup.wait_empty()
        kernel = {cgroup.cgroup_id: (cgroup.name, cgroup.cpu_usage_ns()) for cgroup, _ in started}
        # The kernel releases a cgroup some time after its removal.
        time.sleep(1.0 if short_ns else 0.0)
        # SIGTERM makes the agent take its last reading, which the workloads no longer outrun.
        site.stop("agent")
        made = _batches_made(directory)
        site.stop("collector")
        log = directory / "collector" / "log"
        result = _result(log, kernel, short_ns, made, _booked(site, log))
    _print(result)
    if args.json:
        print(json.dumps(result["summary"]))
    return 0 if result["exact"] else 1


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _workloads(
    closing: contextlib.ExitStack,
) -> tuple[Cgroup | None, list[tuple[Cgroup, list[str]]], list[str]]:
    try:
        ours = closing.enter_context(slice_of_our_own("weighbridge-demo"))
    except OSError as error:
        why_not = f"making a cgroup needs root and a writable cgroup v2 hierarchy ({error.strerror})"
        return None, [], [f"workloads of our own: {why_not}; only what runs anyway is metered"]
    return ours, [(ours.child(name), command) for name, _, command in WORKLOADS], []


def _probes(closing: contextlib.ExitStack, directory: Path) -> ProbeSet:
    """A place for the kernel probes, loaded into it if this user and this kernel let us."""
    probes = closing.enter_context(directory_for_pins(directory))
    if not LOADER.exists():
        say(
            "cannot see: ends of short containers and network traffic; the kernel probes are not built (./dev setup)"
        )
        return probes
    for line in probes.run("load").stderr.splitlines():
        say(line.removeprefix("weighbridge-probes: "))
    return probes


def _start_short_lives(
    directory: Path, ours: Cgroup | None, probes: ProbeSet
) -> subprocess.Popen[str] | None:
    if ours is None or not LOADER.exists() or not probes.status().get("lifecycle"):
        return None
    say(f"{SHORT_LIVES} containers of a few milliseconds, each removed at once")
    return short_lives.start(short_lives.build(directory), ours, 0, SHORT_LIVES, workers=8)


def watch(site: Site, seconds: float) -> None:
    """The live table, once a second."""
    live = sys.stdout.isatty()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(1.0, left))
        top = site.ask("agent", "top", limit=12)
        tenants = site.ask("collector", "status")["tenants"]
        lines = [
            f"{left:5.0f} s left   {top['units']} units   delivered: "
            + ", ".join(f"{tenant} {t['rows']} rows" for tenant, t in tenants.items()),
            f"{'CPUS':>7} {'MEMORY MiB':>11}  {'TENANT':14} UNIT",
        ]
        for row in top["rows"]:
            memory = "?" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.1f}"
            lines.append(f"{row['cpu_cores'] or 0:7.3f} {memory:>11}  {row['tenant'][:14]:14} {row['path']}")
        if live:
            sys.stdout.write("\x1b[H\x1b[2J")
        print("\n".join(lines) if live else lines[0], flush=True)


def _batches_made(directory: Path) -> int:
    """Batches the agent numbered in its one epoch."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(directory / "agent" / "spool.db")) as db:
        return int(db.execute("SELECT value FROM meta WHERE key = 'next_seq'").fetchone()[0]) - 1


class Booked(NamedTuple):
    """What the ledger has of it all."""

    batches: int
    cpu_usage_ns: dict[int, int]
    """By cgroup."""
    intervals: int
    """In which the rows were compared with the host's own counter."""
    sound: bool


def _booked(site: Site, log: Path) -> Booked:
    """As soon as everything in the log is booked."""
    there = sum(1 for record in scan(log) if isinstance(record, Record) and record.kind in HANDED_ON)
    site.wait_booking()
    deadline = time.monotonic() + BOOKING_SECONDS
    while True:
        hops = site.ask("ledger", "reconcile")
        batches = sum(hop["booked"] for hop in hops["hops"])
        if batches >= there or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    used: dict[int, int] = defaultdict(int)
    answer = site.ask("ledger", "usage", start_unix_ns=0, end_unix_ns=FOREVER_NS, by="unit")
    for line in answer["rows"]:
        used[line["cgroup_id"]] += int(line["cpu_usage_ns"] or 0)
    return Booked(batches, used, hops["intervals_compared"], hops["ok"] and not answer["more"])


class Delivered:
    """What the collector's log has of it all."""

    def __init__(self, log: Path) -> None:
        self.tenants: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        """Rows, and their CPU time in ns."""
        self.cpu_usage_ns: dict[int, int] = defaultdict(int)
        """By cgroup."""
        self.ends: dict[int, int] = defaultdict(int)
        """Last rows by cgroup."""
        self.units: set[tuple[str, int]] = set()
        self.batches = 0
        self.host_kernel_ns = self.deficit_ns = 0
        """The host's own counter, and what of it units are ahead."""
        for record in scan(log):
            if isinstance(record, Record) and record.kind in HANDED_ON:
                self._add(pb.UsageBatch.FromString(record.body))

    def _add(self, batch: pb.UsageBatch) -> None:
        self.batches += 1
        rows, table = self.tenants[batch.tenant], table_of(batch)
        rows[0] += len(table.cgroup_id)
        rows[1] += sum(batch.cpu_usage_ns)
        if batch.HasField("host_totals"):
            self.host_kernel_ns += batch.host_totals.cpu_usage_ns
            self.deficit_ns = batch.host_totals.cpu_deficit_ns
        for row, cgroup_id in enumerate(table.cgroup_id):
            self.cpu_usage_ns[cgroup_id] += batch.cpu_usage_ns[row] if batch.cpu_usage_ns else 0
            self.ends[cgroup_id] += bool(batch.row_flags[row] & pb.ROW_FLAG_FINAL)
            if table.kind[row] != pb.UNIT_KIND_HOST:
                self.units.add((batch.boot_id, cgroup_id))


class Line(NamedTuple):
    """CPU time of the same thing at three places, in ns."""

    name: str
    kernel: int
    delivered: int
    booked: int


def _result(
    log: Path, kernel: dict[int, tuple[str, int]], short_ns: dict[int, int], made: int, booked: Booked
) -> dict[str, Any]:
    """What the log and the ledger have against what the kernel said."""
    delivered, verdict = Delivered(log), verify(log)
    short_exact = sum(
        delivered.cpu_usage_ns[i] == ns and delivered.ends[i] == 1 for i, ns in short_ns.items()
    )

    def line(name: str, kernel_ns: int, cgroup_ids: Collection[int]) -> Line:
        have = (delivered.cpu_usage_ns, booked.cpu_usage_ns)
        return Line(name, kernel_ns, *(sum(of[i] for i in cgroup_ids) for of in have))

    lines = [line(name, ns, [cgroup_id]) for cgroup_id, (name, ns) in sorted(kernel.items())]
    if short_ns:
        words = f"{len(short_ns)} short ones, {short_exact} of them exact"
        lines.append(line(words, sum(short_ns.values()), short_ns))
    host_ns = delivered.host_kernel_ns + delivered.deficit_ns
    host = line("whole host (sum of all rows)", host_ns, delivered.cpu_usage_ns)
    ours = line("ours", sum(each.kernel for each in lines), [*kernel, *short_ns]) if kernel else host
    lost = made - delivered.batches + len(verdict.missing)
    return {
        "tenants": dict(delivered.tenants),
        "lines": [*lines, host],
        "deficit": delivered.deficit_ns,
        "exact": short_exact == len(short_ns)
        and verdict.sound
        and lost == 0
        and ours.kernel == ours.delivered == ours.booked
        and host.delivered == host.booked == sum(booked.cpu_usage_ns.values())
        and delivered.batches == booked.batches > 0
        and booked.sound,
        "summary": {
            "containers": len(delivered.units),
            "tenants": len(delivered.tenants),
            "batches": delivered.batches,
            "rows": verdict.rows,
            "cpu_usage_ns_kernel": ours.kernel,
            "cpu_usage_ns_delivered": ours.delivered,
            "cpu_usage_ns_ledger": ours.booked,
            "batches_booked": booked.batches,
            "intervals_compared": booked.intervals,
            "lost": lost,
            "duplicated": len(verdict.duplicates),
            "short_containers": len(short_ns),
            "short_containers_exact": short_exact,
            "host_cpu_usage_ns_kernel": host.kernel,
            "host_cpu_usage_ns_delivered": host.delivered,
            "host_cpu_usage_ns_ledger": host.booked,
        },
    }


def _print(result: dict[str, Any]) -> None:
    summary = result["summary"]
    print(f"\n{'TENANT':24} {'ROWS':>8} {'CPU SECONDS':>13}")
    for tenant, (rows, ns) in sorted(result["tenants"].items()):
        print(f"{tenant:24} {rows:8} {ns / 1e9:14.6f}")
    print(f"\n{'CONTAINER':50} {'KERNEL ns':>13} {'DELIVERED ns':>13} {'LEDGER ns':>13} {'DIFFERENCE':>10}")
    for line in result["lines"]:
        print(
            f"{line.name:50} {line.kernel:13} {line.delivered:13} {line.booked:13} {line.booked - line.kernel:10}"
        )
    if result["deficit"]:
        print(
            f"  of the host's {result['deficit']} ns were counted in units before the root; they are taken off its next rows"
        )
    print(
        f"\n{summary['batches']} batches, {summary['rows']} rows delivered;"
        f" {summary['lost']} lost, {summary['duplicated']} duplicated; {summary['batches_booked']} batches booked,"
        f" {summary['intervals_compared']} intervals compared with the host's own counter"
    )


if __name__ == "__main__":
    sys.exit(main())
