"""Parity: what we read is what the kernel's own files say, bracketed between two direct reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.meter.identity import role
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from bench.cgroups import Cgroup, burner, v2_root
from tests.agent.test_cgroupfs import counter, dumped, unit


@pytest.mark.root
def test_counters_lie_between_two_direct_reads_of_the_same_files(ours: Cgroup) -> None:
    """Parity on real cgroups: a rising counter read by us is bracketed by plain reads before and after."""
    facts = host.probe(Path("/sys/fs/cgroup"), Path("/proc"))
    r = CgroupReader(plan.make(facts), role)
    busy = [ours.child(f"busy-{n}.scope") for n in range(3)]
    processes = [cgroup.run(burner(0.3)) for cgroup in busy]

    def direct() -> dict[str, int]:
        out = {cgroup.name: cgroup.cpu_usage_ns() for cgroup in busy}
        if r._plan.root_cpuacct is not None:
            out["/"] = int((r._plan.root_cpuacct / "cpuacct.usage").read_text())
        return out

    try:
        compared = rose = 0
        last: dict[str, int] = {}
        for _ in range(30):
            time.sleep(0.05)
            before = direct()
            snapshot = r.read()
            after = direct()
            for path, low in before.items():
                found = snapshot.root if path == "/" else unit(snapshot, path)
                value = counter(found, "cpu_usage_ns")
                assert value is not None
                assert low <= value <= after[path]
                compared += 1
                rose += value > last.get(path, value)
                last[path] = value
    finally:
        for process in processes:
            process.kill()
            process.wait()
        r.close()
    assert compared >= 90
    assert rose >= 45, "the counters stood still: nothing was bracketed"


def test_read_agrees_with_the_real_tree() -> None:
    root = v2_root()
    assert root is not None
    lines = dumped(Path("/sys/fs/cgroup"))
    directories = {"/" + str(p.relative_to(root)) if p != root else "/" for p in [root, *root.glob("*/")]}
    assert directories <= set(lines)
    assert lines["/"]["cpu_usage_ns"] is not None
