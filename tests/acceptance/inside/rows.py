"""rows.py CGROUP: its row of the snapshot, and the numbers of its files before and after, when these are the same.

Run as the agent's user, with the agent's own readers for the row. Files are parsed here by other means.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from agent.read.probes import as_files
from agent.read.probes.reader import Probes
from agent.read.probes.records import Knows, Row

PINS = Path("/run/weighbridge/bpf")
TREE = Path("/sys/fs/cgroup")
FILES = (
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.events",
    "pids.current",
    "pids.peak",
    "cpu.stat",
)
PRESSURES = ("cpu", "memory", "io")
ATTEMPTS, PAUSE_SECONDS = 100, 0.1


def numbers(cgroup: Path) -> dict[str, int]:
    """file, or file:key -> number. Of pressure the totals: averages fade while nothing happens."""
    found = {}
    for name in FILES:
        for line in (cgroup / name).read_text().splitlines():
            *key, value = line.split()
            found[":".join((name, *key))] = int(value)
    for resource in PRESSURES:
        for line in (cgroup / f"{resource}.pressure").read_text().splitlines():
            kind, *_, total = line.split()
            found[f"{resource}.pressure:{kind}"] = int(total.removeprefix("total="))
    return found


def main(path: str) -> None:
    probes = Probes(PINS)
    probes.look()
    cgroup = TREE / path.lstrip("/")
    for _ in range(ATTEMPTS):
        before, rows, after = numbers(cgroup), probes.rows(), numbers(cgroup)
        # The agent may be at its own walk: one at a time has it made.
        if rows is not None and before == after:
            break
        time.sleep(PAUSE_SECONDS)
    else:
        raise SystemExit(f"{path} is never quiet, or no walk was made: {probes.standing}")
    row = rows[cgroup.stat().st_ino]
    print(
        json.dumps(
            {
                "uid": os.geteuid(),
                "walk": probes.walk,
                "files": after,
                "knows": sorted(bit.name or "" for bit in Knows(Row._make(row).flags)),
                "counters": as_files.counters(row),
                "memory": as_files.memory(row),
                "pids": as_files.pids(row),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
