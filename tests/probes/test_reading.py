"""Snapshots with the kernel probes loaded, on real cgroups: the same numbers as the files, and what files cannot tell."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.meter import usage
from agent.meter.identity import role
from agent.meter.model import COUNTERS, Reading, Snapshot
from agent.meter.network import NETWORK_BITS
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.probes import as_files, records
from agent.read.probes.reader import Probes
from agent.read.probes.units import UnitPaths
from bench import probe_set
from bench.cgroups import Cgroup, burner
from bench.probe_set import ProbeSet
from tests.agent.fakehost import FakeHost
from tests.agent.readings import CADENCE, everybody
from wire.v1 import usage_pb2 as pb

CONTAINER = "docker-" + "ab" * 32 + ".scope"
TALK = (
    "import socket\n"
    "a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in 'ab')\n"
    "b.bind(('127.0.0.1', 0))\n"
    "[a.sendto(bytes(72), b.getsockname()) for _ in range(10)]\n"
)
TALKED = 10 * (72 + 8 + 20)


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[ProbeSet]:
    with probe_set.loaded(tmp_path) as probes:
        yield probes


@pytest.fixture
def new_reader() -> Iterator[Callable[[Path | None], CgroupReader]]:
    made: list[CgroupReader] = []

    def new(base: Path | None) -> CgroupReader:
        facts = host.probe(Path("/sys/fs/cgroup"), Path("/proc"))
        made.append(CgroupReader(plan.make(facts, "v2"), role, probes=Probes(base)))
        return made[-1]

    yield new
    for reader in made:
        reader.close()
        reader.probes.close()


def mine(snapshot: Snapshot, ours: Cgroup) -> dict[int, Reading]:
    return {unit.cgroup_id: unit for unit in snapshot.units if unit.path.startswith(ours.name)}


def run_inside(cgroup: Cgroup, code: str) -> None:
    assert cgroup.run([sys.executable, "-S", "-c", code]).wait(30) == 0
    cgroup.wait_empty()


def wait_released(reader: CgroupReader, cgroup_id: int) -> None:
    """The kernel lets go of a cgroup some time after its removal."""
    deadline = time.monotonic() + 30
    while (found := reader.probes.tombstone(cgroup_id)) is None or not found.released_boottime_ns:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_released(reader: CgroupReader, known: frozenset[int], cgroup_id: int) -> Snapshot:
    wait_released(reader, cgroup_id)
    return reader.read(known)


@pytest.mark.root
@pytest.mark.parametrize("walk", ["css", "iterator", "table"])
def test_a_row_says_what_the_files_say(
    walk: str, ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    loaded.run("unload")
    loaded.load("--walk", walk)
    groups = [ours.child(f"wb-{share}.scope") for share in range(3)]
    running = [group.run(burner(0.3)) for group in groups]
    try:
        by_rows, by_files = new_reader(loaded.directory), new_reader(None)
        time.sleep(1)
        assert mine(by_rows.read(), ours)
        assert walk in by_rows.probes.walk
        rows = by_rows.probes.rows()
        assert rows is not None
        assert {g.cgroup_id for g in groups} <= rows.keys()
        compared = 0
        for _ in range(5):
            before, told, after = (mine(r.read(), ours) for r in (by_files, by_rows, by_files))
            assert before.keys() == told.keys() == after.keys() == {g.cgroup_id for g in groups}
            for cgroup_id, reading in told.items():
                for slot, name in enumerate(COUNTERS):
                    low, value, high = (r[cgroup_id].counters[slot] for r in (before, told, after))
                    assert (low is None) == (value is None) == (high is None), name
                    if low is None or name in ("cpu_user_ns", "cpu_system_ns"):
                        continue
                    assert value % 1_000 == 0
                    if not name.startswith("psi_"):
                        # Pressure is as of the kernel's last averaging; a file has it averaged anew.
                        assert low <= value
                    assert value <= high, name
                    compared += 1
                usage_ns, user, system = reading.counters[:3]
                assert abs(usage_ns - user - system) <= 1_000
        assert compared > 50
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.root
def test_units_that_come_and_go_are_followed_as_the_directories_show_them(
    ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    reader, walker = new_reader(loaded.directory), new_reader(None)
    reader.read()
    pod = ours.child("shelf")
    service = pod.child("a.service")
    nested = service.child(CONTAINER)
    inside = nested.child("inside").child("deeper.service")
    for step in range(3):
        snapshot = reader.read()
        directories = mine(walker.read(), ours)
        assert {i: u.path for i, u in mine(snapshot, ours).items()} == {
            i: u.path for i, u in directories.items()
        }
        assert {i: u.enclosing_id for i, u in mine(snapshot, ours).items()} == {
            i: u.enclosing_id for i, u in directories.items()
        }
        assert inside.cgroup_id not in directories
        assert (nested.cgroup_id in directories) == (step < 2)
        if step == 1:
            nested.remove()
        else:
            pod.child(f"b{step}.scope")


@pytest.mark.root
def test_the_end_and_the_traffic_of_what_is_nested_belong_to_the_container(
    ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    container = ours.child(CONTAINER)
    reader = new_reader(loaded.directory)
    baseline = usage.begin(reader.read(), "", everybody, [])
    gone, stays = container.child("gone"), container.child("stays")
    run_inside(gone, TALK)
    run_inside(stays, TALK)
    gone.remove()
    wait_released(reader, gone.cgroup_id)
    outcome = usage.step(baseline, reader.read(frozenset(baseline.units)), everybody, CADENCE)
    (found,) = [u for u in outcome.usages if u.cgroup_id == container.cgroup_id]
    assert found.values[NETWORK_BITS[0]] == found.values[NETWORK_BITS[1]] - 0 == 2 * TALKED
    assert not {gone.cgroup_id, stays.cgroup_id} & {u.cgroup_id for u in outcome.usages}
    # Deleted from the kernel, and not counted again.
    assert reader.forget_ends(outcome.baseline.closed) >= 1
    again = usage.step(outcome.baseline, reader.read(frozenset(outcome.baseline.units)), everybody, CADENCE)
    (found,) = [u for u in again.usages if u.cgroup_id == container.cgroup_id]
    assert found.values[NETWORK_BITS[0]] == 0
    assert again.baseline.network is not None
    assert gone.cgroup_id not in again.baseline.network.entries
    assert stays.cgroup_id in again.baseline.network.entries


@pytest.mark.root
def test_a_unit_that_ends_takes_its_traffic_and_its_last_microsecond_with_it(
    ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    reader = new_reader(loaded.directory)
    baseline = usage.begin(reader.read(), "", everybody, [])
    short = ours.child(CONTAINER)
    run_inside(short, TALK)
    time.sleep(0.05)
    used = short.cpu_usage_ns()
    short.remove()
    snapshot = until_released(reader, frozenset(baseline.units), short.cgroup_id)
    outcome = usage.step(baseline, snapshot, everybody, CADENCE)
    (found,) = [u for u in outcome.usages if u.cgroup_id == short.cgroup_id]
    assert abs(found.values[0] - used) <= 1_000
    assert found.values[NETWORK_BITS[0]] == TALKED
    assert found.flags & pb.ROW_FLAG_FINAL
    assert not found.flags & pb.ROW_FLAG_TAIL_UNSEEN
    assert short.cgroup_id in outcome.baseline.closed


@pytest.mark.root
def test_more_cgroups_than_the_snapshot_holds_are_read_from_their_files(
    ours: Cgroup, tmp_path: Path, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    with probe_set.loaded(tmp_path, "--max-cgroups", "3") as small:
        reader = new_reader(small.directory)
        units = [ours.child(f"wb-{number}.scope") for number in range(30)]
        for _ in range(2):
            found = mine(reader.read(), ours)
            assert found.keys() == {unit.cgroup_id for unit in units}
            assert all(reading.counters[0] == 0 for reading in found.values())
        assert reader.probes.rows() is None
        assert reader.probes.overflow.snapshot_rows > 0
        assert reader.probes.overflow.births > 0


@pytest.mark.root
def test_sources_may_change_under_a_unit_without_a_reset(
    ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    unit = ours.child("wb-busy.scope")
    process = unit.run(burner(0.5))
    try:
        reader = new_reader(loaded.directory)
        baseline = usage.begin(reader.read(), "", everybody, [])
        billed = 0
        start = baseline.units[unit.cgroup_id].reading.counters[0]
        for round_ in range(6):
            time.sleep(0.2)
            if round_ == 1:
                loaded.run("unload")
            if round_ == 4:
                loaded.load()
            outcome = usage.step(baseline, reader.read(frozenset(baseline.units)), everybody, CADENCE)
            (found,) = [u for u in outcome.usages if u.cgroup_id == unit.cgroup_id]
            assert not found.flags & pb.ROW_FLAG_COUNTER_RESET
            billed += found.values[0]
            baseline = outcome.baseline
        assert billed + (start or 0) == baseline.units[unit.cgroup_id].reading.counters[0]
        assert billed > 100_000_000
    finally:
        process.kill()
        process.wait()


@pytest.mark.root
def test_a_full_map_of_ends_is_counted_and_the_unit_ends_unseen(
    ours: Cgroup, tmp_path: Path, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    with probe_set.loaded(tmp_path, "--max-ended", "1") as small:
        first, second = ours.child("wb-first.scope"), ours.child("wb-second.scope")
        reader = new_reader(small.directory)
        baseline = usage.begin(reader.read(), "", everybody, [])
        first.remove()
        second.remove()
        gaps, coverage, last = [], [], None
        deadline = time.monotonic() + 20
        while last is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            outcome = usage.step(baseline, reader.read(frozenset(baseline.units)), everybody, CADENCE)
            gaps += [gap.reason for gap in outcome.gaps]
            coverage.append(outcome.stretches[-1].coverage & pb.COVERAGE_EXITS)
            ends = [u for u in outcome.usages if u.flags & pb.ROW_FLAG_FINAL]
            last = next((u for u in ends if u.cgroup_id == second.cgroup_id), None)
            baseline = outcome.baseline
        assert last.flags & pb.ROW_FLAG_TAIL_UNSEEN
        assert set(gaps) == {int(pb.GAP_REASON_KERNEL_OVERFLOW)}
        assert 0 in coverage


@pytest.mark.root
def test_what_has_a_longer_path_than_a_record_holds_is_counted_with_what_it_lies_in(
    ours: Cgroup, loaded: ProbeSet, new_reader: Callable[[Path | None], CgroupReader]
) -> None:
    service = ours.child("wb-deep.service")
    reader = new_reader(loaded.directory)
    baseline = usage.begin(reader.read(), "", everybody, [])
    inner = service
    for _ in range(15):
        inner = inner.child("x" * 240)
    short = inner.child(CONTAINER)
    assert len(short.name) > 3_600
    run_inside(short, TALK)
    short.remove()
    time.sleep(0.3)
    snapshot = reader.read(frozenset(baseline.units))
    outcome = usage.step(baseline, snapshot, everybody, CADENCE)
    (found,) = [u for u in outcome.usages if u.cgroup_id == service.cgroup_id]
    assert found.values[0] > 1_000_000
    assert found.values[NETWORK_BITS[0]] == TALKED
    assert short.cgroup_id not in [u.cgroup_id for u in outcome.usages]
    assert {u.path for u in snapshot.units if u.path.startswith(ours.name)} == {service.name}


_NAMES = st.sampled_from(("a.slice", "b.service", "x", "docker", "init.scope", CONTAINER, "kubepods", "pod1"))


@settings(max_examples=60)
@given(st.lists(st.lists(_NAMES, min_size=1, max_size=5), min_size=1, max_size=12))
def test_a_path_alone_tells_what_the_walk_over_directories_finds(paths: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fake = FakeHost(Path(directory))
        for names in paths:
            fake.cpu("/" + "/".join(names), 1)
        facts = host.probe(fake.cgroup_root, fake.proc_root)
        reader = CgroupReader(plan.make(facts), role)
        snapshot = reader.read()
        reader.close()
        found = {unit.path: unit for unit in snapshot.units}
        by_id = {unit.cgroup_id: unit.path for unit in snapshot.units}
        told = UnitPaths(role)
        every = {"/" + "/".join(names[:n]) for names in paths for n in range(1, len(names) + 1)}
        assert {path for path in every if told.is_unit(path)} == found.keys()
        for path, unit in found.items():
            assert told.around(path) == by_id.get(unit.enclosing_id, "")


def test_user_and_system_are_scaled_to_the_usage_as_the_kernel_does() -> None:
    assert as_files.cpu_time(10_000_500, 0, 0) == (10_000_000, 10_000_000, 0)
    assert as_files.cpu_time(9_000_000, 4_000_000, 8_000_000) == (9_000_000, 3_000_000, 6_000_000)
    assert as_files.cpu_time(0, 0, 0) == (0, 0, 0)


def test_what_a_row_does_not_know_is_none() -> None:
    nothing = as_files.counters(records.Row(*range(1, 21), 0, 3))
    assert nothing == (None,) * len(COUNTERS)
    row = records.Row(*(1_500 * n for n in range(1, 21)), int(records.Knows.PRESSURE), 3)
    psi = row.psi_cpu_some_ns, row.psi_cpu_full_ns, row.psi_memory_some_ns, row.psi_memory_full_ns
    whole = [ns - ns % 1_000 for ns in (*psi, row.psi_io_some_ns, row.psi_io_full_ns)]
    assert as_files.counters(row) == (None,) * 7 + tuple(whole)
    unlimited = records.Row(*[0] * 10, 0x7FFF_FFFF_FFFF_F000, *[0] * 9, int(records.Knows.MEMORY), 1)
    assert as_files.memory(unlimited) == (0, None, None)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        probes = Probes(tmp_path)
        probes.look()
        probes.close()
    assert len(os.listdir("/proc/self/fd")) == before
