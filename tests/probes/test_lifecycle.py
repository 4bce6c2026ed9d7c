"""Births and ends of real cgroups, as the probes recorded them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.read.probes.bpf import Map
from agent.read.probes.records import Knows, key
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet
from bench.short_lives import start, usage_ns
from tests.probes.conftest import until
from tests.probes.holding import births, overflow, tombstones

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


def test_every_short_life_leaves_a_tombstone_with_the_cpu_time_that_cpu_stat_said_last(
    probes: ProbeSet, ours: Cgroup, short_lives: Path
) -> None:
    usage = usage_ns(start(short_lives, ours, 0, 800, workers=16))
    assert len(usage) == 800
    until(lambda: all(tombstones(probes)[cgroup_id].released_boottime_ns for cgroup_id in usage))
    found = tombstones(probes)
    assert {cgroup_id: found[cgroup_id].cpu_usage_ns // 1_000 * 1_000 for cgroup_id in usage} == usage
    for cgroup_id in usage:
        tombstone = found[cgroup_id]
        assert tombstone.parent_id == ours.cgroup_id
        assert tombstone.path.startswith(f"{ours.name}/")
        assert tombstone.born_boottime_ns < tombstone.removed_boottime_ns < tombstone.released_boottime_ns
        assert Knows.CPU in Knows(tombstone.flags)
    assert not set(usage) & set(births(probes)), "what was released is no longer alive"
    assert not any(overflow(probes)._replace(wakes=0, paths_cut=0))


def test_a_birth_is_on_record_while_the_cgroup_lives(probes: ProbeSet, ours: Cgroup) -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    made = ours.child("docker-" + "b" * 64 + ".scope")
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    birth = births(probes)[made.cgroup_id]
    assert birth.path == made.name
    assert birth.parent_id == ours.cgroup_id
    assert birth.level == 2
    assert before < birth.born_boottime_ns < after


def test_a_cgroup_older_than_the_probes_leaves_a_tombstone_without_a_birth(
    pins: ProbeSet, ours: Cgroup
) -> None:
    old = ours.child("docker-" + "c" * 64 + ".scope")
    pins.load()
    usage_us = _burn(old, 0.02)
    old.path.rmdir()
    until(lambda: bool(tombstones(pins)[old.cgroup_id].released_boottime_ns))
    tombstone = tombstones(pins)[old.cgroup_id]
    assert tombstone.born_boottime_ns == 0
    assert tombstone.cpu_usage_ns // 1_000 == usage_us


def test_what_lay_below_counts_in_the_tombstone_of_what_was_around_it(probes: ProbeSet, ours: Cgroup) -> None:
    outer = ours.child("docker-" + "d" * 64 + ".scope")
    inner_us = 0
    for number in range(3):
        inner = outer.child(f"inner{number}")
        inner_us += _burn(inner, 0.01)
        inner.path.rmdir()
    usage_us = _burn(outer, 0.01)
    assert usage_us > inner_us > 0
    outer.path.rmdir()
    until(lambda: bool(tombstones(probes)[outer.cgroup_id].released_boottime_ns))
    assert tombstones(probes)[outer.cgroup_id].cpu_usage_ns // 1_000 == usage_us


def test_rmdir_is_on_record_at_once_and_release_when_nothing_refers_to_the_cgroup(
    probes: ProbeSet, ours: Cgroup
) -> None:
    made = ours.child("docker-" + "e" * 64 + ".scope")
    # A socket keeps the cgroup it was made in, and can be handed to somebody who lives on.
    here, there = socket.socketpair()
    code = (
        "import socket, sys\n"
        "to = socket.socket(fileno=int(sys.argv[1]))\n"
        "made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "socket.send_fds(to, [b'x'], [made.fileno()])\n"
    )
    procs = made.path / "cgroup.procs"
    process = subprocess.Popen(
        [
            "/bin/sh",
            "-c",
            f'echo $$ > "{procs}" && exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
            str(there.fileno()),
        ],
        pass_fds=[there.fileno()],
    )
    _, descriptors, _, _ = socket.recv_fds(here, 1, 1)
    assert process.wait() == 0
    here.close()
    there.close()
    try:
        made.wait_empty()
        made.path.rmdir()
        tombstone = tombstones(probes)[made.cgroup_id]
        assert tombstone.removed_boottime_ns > 0
        time.sleep(0.5)
        assert tombstones(probes)[made.cgroup_id].released_boottime_ns == 0
        assert made.cgroup_id not in births(probes), "what lives on for long keeps no room from the newborn"
    finally:
        os.close(descriptors[0])
    until(lambda: bool(tombstones(probes)[made.cgroup_id].released_boottime_ns))
    after = tombstones(probes)[made.cgroup_id]
    assert after.removed_boottime_ns == tombstone.removed_boottime_ns
    assert after.born_boottime_ns == tombstone.born_boottime_ns > 0
    assert made.cgroup_id not in births(probes)


def test_a_full_map_counts_what_it_could_not_store_and_stores_again_once_emptied(
    pins: ProbeSet, ours: Cgroup, short_lives: Path
) -> None:
    pins.load("--max-ended", "10", "--max-cgroups", "64")
    usage = usage_ns(start(short_lives, ours, 0, 30, workers=4))
    # Each of the others could be written neither at its rmdir nor at its release.
    until(lambda: overflow(pins).tombstones == 2 * 20)
    kept = tombstones(pins)
    assert len(kept) == 10
    lost_ns = sum(ns for cgroup_id, ns in usage.items() if cgroup_id not in kept)
    assert lost_ns <= overflow(pins).tombstones_cpu_ns < lost_ns + 20_000
    writable = Map(pins.pins / "tombstones", writable=True)
    assert writable.delete([key(cgroup_id) for cgroup_id in kept]) == 10
    writable.close()
    usage = usage_ns(start(short_lives, ours, 30, 5))
    until(lambda: sum(1 for t in tombstones(pins).values() if t.released_boottime_ns) == 5)
    assert set(tombstones(pins)) == set(usage)


def test_more_births_than_there_is_room_for_are_counted_and_their_ends_still_recorded(
    pins: ProbeSet, ours: Cgroup
) -> None:
    pins.load("--max-cgroups", "4")
    made = [ours.child(f"docker-{number:064x}.scope") for number in range(10)]
    known = births(pins)
    assert len(known) == 4
    assert overflow(pins).births == 6
    for cgroup in made:
        cgroup.path.rmdir()
    until(lambda: all(t.released_boottime_ns for t in tombstones(pins).values()))
    found = tombstones(pins)
    assert {c.cgroup_id for c in made} == set(found)
    assert {bool(t.born_boottime_ns) for i, t in found.items() if i in known} == {True}


def test_a_path_longer_than_the_record_is_cut_and_says_so(probes: ProbeSet, ours: Cgroup) -> None:
    deepest, made = ours, []
    while len(deepest.name) < 1_500:
        deepest = deepest.child("x" * 200)
        made.append(deepest)
    record = births(probes)[deepest.cgroup_id]
    assert Knows.PATH_CUT in Knows(record.flags & 0xFFFFFFFF)
    assert len(record.path) == 359
    assert made[1].name in record.path or record.path in deepest.name
    assert births(probes)[made[0].cgroup_id].path == made[0].name
    assert overflow(probes).paths_cut >= len(made) - 2
    usage_us = _burn(deepest, 0.01)
    for cgroup in reversed(made):
        cgroup.path.rmdir()
    # All of them: a release that comes later cuts a path in what the next test has loaded.
    until(
        lambda: (
            {c.cgroup_id for c in made}
            <= {i for i, tombstone in tombstones(probes).items() if tombstone.released_boottime_ns}
        )
    )
    assert tombstones(probes)[deepest.cgroup_id].cpu_usage_ns // 1_000 == usage_us


def test_a_ring_buffer_that_nobody_reads_costs_wakes_and_nothing_else(probes: ProbeSet, ours: Cgroup) -> None:
    # 64 KiB of 16 bytes each.
    for number in range(4_500):
        path = ours.path / f"docker-{number:064x}.scope"
        path.mkdir()
        path.rmdir()

    def released() -> int:
        found = tombstones(probes).values()
        return sum(1 for t in found if t.parent_id == ours.cgroup_id and t.released_boottime_ns)

    until(lambda: released() == 4_500)
    counted = overflow(probes)
    assert counted.wakes >= 400
    # The programs see the whole host: others may have long paths.
    assert counted._replace(wakes=0, paths_cut=0) == (0,) * len(counted)


def _burn(cgroup: Cgroup, seconds: float) -> int:
    """Use CPU in it until nothing runs there any more; usage_usec then."""
    code = f"import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"
    assert cgroup.run([sys.executable, "-S", "-c", code]).wait() == 0
    cgroup.wait_empty()
    return cgroup.cpu_usage_ns() // 1_000
