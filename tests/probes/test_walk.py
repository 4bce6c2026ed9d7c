"""The snapshot against the files of the same cgroups."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.read.probes.pins import ProbeSet as Adopted
from agent.read.probes.pins import adopt
from agent.read.probes.records import Row
from bench.cgroups import Cgroup, burner, v2_root
from bench.probe_set import ProbeSet
from tests.probes.conftest import until
from tests.probes.holding import overflow

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

ALL_WALKS = pytest.mark.parametrize("walk", ["css", "iterator", "table"])


def rows_of(pins: ProbeSet) -> dict[int, Row]:
    found = adopt(pins.directory)
    assert isinstance(found, Adopted), found
    try:
        rows = found.rows()
        assert rows is not None
        return {cgroup_id: Row._make(row) for cgroup_id, row in rows.items()}
    finally:
        found.close()


@pytest.mark.parametrize("walk", ["css", "iterator"])
def test_rows_say_what_cpu_stat_says(pins: ProbeSet, ours: Cgroup, walk: str) -> None:
    outer = ours.child("docker-" + "a" * 64 + ".scope")
    inner = outer.child("inner")
    for cgroup in (outer, inner):
        _burn(cgroup)
    pins.load("--walk", walk)
    rows = rows_of(pins)
    for cgroup, parent_id in ((outer, ours.cgroup_id), (inner, outer.cgroup_id), (ours, 1)):
        row = rows[cgroup.cgroup_id]
        assert row.cpu_usage_ns // 1_000 == cgroup.cpu_usage_ns() // 1_000 > 0
        assert row.parent_id == parent_id
    assert rows[outer.cgroup_id].cpu_usage_ns > rows[inner.cgroup_id].cpu_usage_ns, (
        "what lies below is included"
    )
    assert rows[inner.cgroup_id].level == 3


def test_the_own_table_knows_cgroups_in_use_and_new_ones_once_the_kernel_flushed(
    pins: ProbeSet, ours: Cgroup
) -> None:
    old = ours.child("docker-" + "a" * 64 + ".scope")
    running = old.run(["sleep", "60"])
    try:
        pins.load("--walk", "table")
        new = old.child("new")
        _burn(new)
        # Reading cpu.stat has the kernel flush, which this walk cannot.
        usage = {cgroup.cgroup_id: cgroup.cpu_usage_ns() // 1_000 for cgroup in (ours, old, new)}
        rows = rows_of(pins)
        assert {i: rows[i].cpu_usage_ns // 1_000 for i in usage} == usage
        assert rows[new.cgroup_id].parent_id == old.cgroup_id
    finally:
        running.kill()
        running.wait()
    new.path.rmdir()
    until(lambda: new.cgroup_id not in rows_of(pins))


@ALL_WALKS
def test_counters_of_busy_cgroups_never_go_back_and_follow_cpu_stat(
    pins: ProbeSet, ours: Cgroup, walk: str
) -> None:
    busy = [ours.child(f"docker-{number:064x}.scope") for number in range(3)]
    running = [cgroup.run(burner(0.3)) for cgroup in busy]
    try:
        pins.load("--walk", walk)
        last = dict.fromkeys((c.cgroup_id for c in busy), 0)
        for _ in range(200):
            before = {c.cgroup_id: c.cpu_usage_ns() for c in busy}
            rows = rows_of(pins)
            after = {c.cgroup_id: c.cpu_usage_ns() for c in busy}
            for cgroup_id, value in last.items():
                usage = rows[cgroup_id].cpu_usage_ns // 1_000 * 1_000
                assert value <= usage
                assert before[cgroup_id] <= usage <= after[cgroup_id]
                last[cgroup_id] = usage
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert min(last.values()) > 0


@pytest.mark.parametrize("walk", ["css", "iterator"])
def test_every_cgroup_below_the_root_has_one_row(pins: ProbeSet, ours: Cgroup, walk: str) -> None:
    for number in range(300):
        ours.child(f"docker-{number:064x}.scope")
    pins.load("--walk", walk)
    root = v2_root()
    assert root is not None
    before = _cgroups_below(root)
    rows = rows_of(pins)
    # Others of the machine may come and go meanwhile.
    throughout = before & _cgroups_below(root)
    assert len(throughout) > 300
    assert throughout <= set(rows)


def test_a_snapshot_without_room_for_all_counts_the_others_and_is_not_taken_for_whole(
    pins: ProbeSet, ours: Cgroup
) -> None:
    for number in range(40):
        ours.child(f"docker-{number:064x}.scope")
    pins.load("--max-cgroups", "20")
    found = adopt(pins.directory)
    assert isinstance(found, Adopted), found
    assert found.rows() is None
    found.close()
    # Rows come by the dozen, so there is room for 24.
    assert overflow(pins).snapshot_rows >= 40 - 24


def test_two_readers_at_once_never_get_torn_rows(probes: ProbeSet, ours: Cgroup) -> None:
    for number in range(200):
        ours.child(f"docker-{number:064x}.scope")
    mine = {path.stat().st_ino for path in ours.path.iterdir() if path.is_dir()}
    failures: list[str] = []
    ends = time.monotonic() + 60

    def read() -> None:
        found = adopt(probes.directory)
        assert isinstance(found, Adopted)
        whole = 0
        # When one is done the other is alone, so all it takes is time.
        while whole < 25 and time.monotonic() < ends:
            rows = found.rows()
            if rows is not None:
                whole += 1
                if not mine <= set(rows):
                    failures.append(f"{len(mine - set(rows))} rows are missing")
        if whole < 25:
            failures.append(f"{whole} whole ones in a minute")
        found.close()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert not failures


def _cgroups_below(root: Path) -> set[int]:
    found: set[int] = set()
    places = [str(root)]
    while places:
        try:
            with os.scandir(places.pop()) as entries:
                below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            continue
        found.update(entry.inode() for entry in below)
        places += [entry.path for entry in below]
    return found


def _burn(cgroup: Cgroup) -> None:
    code = "import time\nwhile time.process_time() < 0.03: pass"
    assert cgroup.run([sys.executable, "-S", "-c", code]).wait() == 0
    cgroup.wait_empty()
