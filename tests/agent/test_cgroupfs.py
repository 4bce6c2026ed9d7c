"""cgroupfs -> snapshot, on trees of files and on this machine's real cgroups."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.meter.identity import role
from agent.meter.model import COUNTERS, Reading, Snapshot
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.dump import dump_tree
from agent.read.host import HostError, Mode
from agent.read.kept_files import RETRY_MISSING_EVERY
from bench.cgroups import Cgroup, v2_root
from tests.agent.fakehost import BOOT, CONTAINER, FakeHost


def reader(fake: FakeHost, **options: int) -> CgroupReader:
    facts = host.probe(fake.cgroup_root, fake.proc_root)
    return CgroupReader(plan.make(facts), role, **options)


def counter(reading: Reading, name: str) -> int | None:
    return reading.counters[COUNTERS.index(name)]


def unit(snapshot: Snapshot, path: str) -> Reading:
    (found,) = [u for u in snapshot.units if u.path == path]
    return found


def test_every_field_of_a_v2_cgroup_is_read(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu("/", 9_000)
    fake.cpu(CONTAINER, 5, nr_periods=4, nr_throttled=3, throttled_usec=2)
    fake.memory(CONTAINER, 1_000, 300)
    for name, text in (
        ("memory.peak", "2000\n"),
        ("memory.max", "max\n"),
        ("memory.events", "low 0\noom 2\noom_kill 1\n"),
        ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n"),
        ("pids.current", "7\n"),
        ("pids.peak", "9\n"),
        (
            "cpu.pressure",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=11\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=12\n",
        ),
    ):
        fake.write(CONTAINER, name, text)
    fake.write("/", "cpu.pressure", "some total=1\n")
    snapshot = reader(fake).read()
    found = unit(snapshot, CONTAINER)
    assert snapshot.boot_id == BOOT
    assert snapshot.complete
    expected = {
        "cpu_usage_ns": 5_000, "cpu_user_ns": 5_000, "cpu_system_ns": 0, "cpu_periods": 4,
        "cpu_throttled_periods": 3, "cpu_throttled_ns": 2_000, "oom_kills": 1,
        "psi_cpu_some_ns": 11_000, "psi_cpu_full_ns": 12_000,
    }  # fmt: skip
    for name in COUNTERS[:13]:
        assert counter(found, name) == expected.get(name), name
    assert found.io == {"8:0": (1, 2, 3, 4)}
    assert (found.memory_current_bytes, found.memory_inactive_file_bytes) == (1_000, 300)
    assert (found.memory_peak_bytes, found.memory_limit_bytes) == (2_000, None)
    assert (found.pids_current, found.pids_peak) == (7, 9)
    assert counter(snapshot.root, "cpu_usage_ns") == 9_000_000


def test_every_field_of_a_v1_cgroup_is_read(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path, v1=True)
    path = "/docker/" + "cd" * 32
    for controller, name, text in (
        ("cpuacct", "cpuacct.usage", "5000\n"),
        ("cpuacct", "cpuacct.usage_user", "3000\n"),
        ("cpuacct", "cpuacct.usage_sys", "2000\n"),
        ("cpu", "cpu.stat", "nr_periods 4\nnr_throttled 3\nthrottled_time 222\n"),
        ("memory", "memory.usage_in_bytes", "1000\n"),
        ("memory", "memory.stat", "inactive_file 1\ntotal_inactive_file 300\n"),
        ("memory", "memory.max_usage_in_bytes", "2000\n"),
        ("memory", "memory.limit_in_bytes", "9223372036854771712\n"),
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
        ("blkio", "blkio.throttle.io_service_bytes_recursive", "8:0 Read 1\n8:0 Write 2\nTotal 3\n"),
        ("blkio", "blkio.throttle.io_serviced_recursive", "8:0 Read 3\n8:0 Write 4\nTotal 7\n"),
        ("pids", "pids.current", "7\n"),
    ):
        fake.write(path, name, text, controller)
    fake.write("/", "cpuacct.usage", "9000\n", "cpuacct")
    snapshot = reader(fake).read()
    found = unit(snapshot, path)
    assert [counter(found, n) for n in COUNTERS[:7]] == [5_000, 3_000, 2_000, 4, 3, 222, 1]
    assert counter(found, "psi_cpu_some_ns") is None
    assert found.io == {"8:0": (1, 2, 3, 4)}
    assert (found.memory_current_bytes, found.memory_inactive_file_bytes) == (1_000, 300)
    assert (found.memory_peak_bytes, found.memory_limit_bytes, found.pids_current) == (2_000, None, 7)
    assert counter(snapshot.root, "cpu_usage_ns") == 9_000


@pytest.mark.parametrize("text", ["", "\n", "rubbish\n", "usage_usec\n", "usage_usec -4\nuser_usec 1\n"])
def test_what_the_kernel_does_not_say_is_unknown_and_never_zero(tmp_path: Path, text: str) -> None:
    fake = FakeHost(tmp_path)
    fake.write(CONTAINER, "cpu.stat", text)
    found = unit(reader(fake).read(), CONTAINER)
    assert counter(found, "cpu_usage_ns") is None
    assert found.memory_current_bytes is None
    assert found.io is None
    assert found.pids_current is None


def test_what_is_below_a_container_belongs_to_it_and_units_know_the_unit_around_them(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 9)
    fake.cpu(f"{CONTAINER}/init.scope", 4)
    fake.cpu("/system.slice/a.service", 3)
    fake.cpu("/system.slice/a.service/b.service", 1)
    snapshot = reader(fake).read()
    assert {u.path for u in snapshot.units} == {
        CONTAINER,
        "/system.slice/a.service",
        "/system.slice/a.service/b.service",
    }
    outer = unit(snapshot, "/system.slice/a.service")
    assert unit(snapshot, "/system.slice/a.service/b.service").enclosing_id == outer.cgroup_id
    assert outer.enclosing_id == 1


def test_throttling_is_read_where_crun_keeps_a_containers_quota(tmp_path: Path) -> None:
    """On real hosts of this kind the scope says 0 periods; its inner cgroup ends before it does."""
    fake = FakeHost(tmp_path)
    scope = "/machine.slice/libpod-" + "cd" * 32 + ".scope"
    inner = f"{scope}/container"
    quota = ("cpu_periods", "cpu_throttled_periods", "cpu_throttled_ns")
    fake.cpu(scope, 9, nr_periods=0, nr_throttled=0, throttled_usec=0)
    r = reader(fake, max_open_files=0)

    def seen() -> tuple[int | None, ...]:
        found = unit(r.read(), scope)
        assert counter(found, "cpu_usage_ns") == 9_000
        return tuple(counter(found, name) for name in quota)

    assert seen() == (0, 0, 0), "the scope is made first"
    fake.cpu(inner, 8, nr_periods=5, nr_throttled=4, throttled_usec=3)
    assert seen() == (5, 4, 3_000)
    fake.remove(inner)
    assert seen() == (None, None, None), "a counter never falls"
    fake.cpu(scope, 9, nr_periods=2, nr_throttled=1, throttled_usec=1)
    assert unit(reader(fake).read(), scope).counters[3:6] == (2, 1, 1_000), "a quota of the scope's own"


def test_a_file_that_appears_later_is_found(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 1)
    r = reader(fake)
    assert unit(r.read(), CONTAINER).memory_current_bytes is None
    fake.memory(CONTAINER, 5)
    for _ in range(RETRY_MISSING_EVERY + 1):
        snapshot = r.read()
    assert unit(snapshot, CONTAINER).memory_current_bytes == 5
    assert [s.memory_current_bytes for s in r.sample_memory()] == [5]
    fake.memory("/", 9)
    for _ in range(RETRY_MISSING_EVERY + 1):
        r.read()
    assert {s.cgroup_id: s.memory_current_bytes for s in r.sample_memory()}[1] == 9, "the host is sampled too"
    r.close()
    assert r.open_files == 0


def test_what_is_never_there_is_looked_for_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 1)
    r = reader(fake)
    missed: list[str] = []
    opened = os.open

    def counting(path: str, flags: int) -> int:
        if path.endswith("/memory.current"):
            missed.append(path)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", counting)
    looked_in = []
    for number in range(100):
        missed.clear()
        r.read()
        if any(CONTAINER in path for path in missed):
            looked_in.append(number)
    assert looked_in == [0, 1, 3, 7, 15, 31, 61, 91]
    assert looked_in[-1] - looked_in[-2] == RETRY_MISSING_EVERY
    r.close()


def test_a_unit_that_is_gone_gives_no_sample_rather_than_one_of_unknown_memory(tmp_path: Path) -> None:
    """An unknown size would take the integral and the peak from its last row."""
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 1)
    fake.memory(CONTAINER, 5)
    fake.write(CONTAINER, "pids.current", "1\n")
    r = reader(fake, max_open_files=0)
    cgroup_id = unit(r.read(), CONTAINER).cgroup_id
    assert cgroup_id in {sample.cgroup_id for sample in r.sample_memory()}
    fake.remove(CONTAINER)
    for _ in range(2):
        assert cgroup_id not in {sample.cgroup_id for sample in r.sample_memory()}
    r.close()


def test_a_unit_made_anew_under_the_same_path_is_another_unit(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 9)
    r = reader(fake)
    first = unit(r.read(), CONTAINER).cgroup_id
    os.rename(fake.cgroup_root / CONTAINER.lstrip("/"), tmp_path / "gone")
    fake.cpu(CONTAINER, 2)
    second = unit(r.read(), CONTAINER)
    assert second.cgroup_id != first
    assert counter(second, "cpu_usage_ns") == 2_000


def test_descriptors_are_bounded_and_nothing_is_missed_without_them(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    for n in range(40):
        fake.cpu(f"/system.slice/s{n}.service", n)
    r = reader(fake, max_open_files=10)
    for _ in range(3):
        snapshot = r.read()
        assert r.open_files <= 10
        assert sorted(counter(u, "cpu_usage_ns") or 0 for u in snapshot.units) == [
            n * 1_000 for n in range(40)
        ]
    r.close()


def test_a_low_limit_of_open_files_is_raised_or_lived_with() -> None:
    script = (
        "import resource; from agent.read.host import files_to_keep_open as keep;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}));"
        "print(keep(5_000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def kept(hard: int) -> str:
        command = [sys.executable, "-c", script.format(hard=hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert kept(20_000) == "5000 5256"
    assert kept(1_000) == "744 1000"
    assert kept(100) == "0 100"


def test_no_hierarchy_at_all_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="--cgroup-root"):
        host.probe(tmp_path, tmp_path)
    fake = FakeHost(tmp_path)
    with pytest.raises(HostError, match="hierarchy"):
        plan.make(host.probe(fake.cgroup_root, fake.proc_root), "v1")


@pytest.mark.root
def test_cgroups_that_come_and_go_while_they_are_read_never_trouble_a_reading(ours: Cgroup) -> None:
    facts = host.probe(Path("/sys/fs/cgroup"), Path("/proc"))
    r = CgroupReader(plan.make(facts), role)
    stop = threading.Event()

    def churn() -> None:
        n = 0
        while not stop.is_set():
            made = [ours.child(f"churn-{n}-{k}.scope") for k in range(20)]
            for cgroup in made:
                cgroup.path.rmdir()
            n += 1

    steady = ours.child("steady.scope")
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        end = time.monotonic() + 2
        readings = 0
        while time.monotonic() < end:
            snapshot = r.read()
            assert snapshot.complete
            assert unit(snapshot, steady.name).cgroup_id == steady.cgroup_id
            readings += 1
    finally:
        stop.set()
        thread.join()
    assert readings > 10
    of_ours = [u for u in r.read().units if u.path.startswith(f"/{ours.path.name}/")]
    assert len(of_ours) <= 3
    before = r.open_files
    r.close()
    assert before > 0
    assert r.open_files == 0


def test_this_hosts_own_facts_are_what_its_files_say() -> None:
    facts = host.probe(Path("/sys/fs/cgroup"), Path("/proc"))
    assert facts.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts.cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert (facts.v2 is not None) == (v2_root() is not None)
    state, error_ns = host.clock_state()
    assert state.value in ("synchronised", "unsynchronised")
    assert error_ns is not None
    assert error_ns >= 0


# `weighbridge-agent read`


def dumped(root: Path) -> dict[str, dict[str, object]]:
    out = io.StringIO()
    dump_tree(root, out, as_json=True)
    return {line["path"]: line for line in map(json.loads, out.getvalue().splitlines())}


def test_read_prints_every_cgroup_with_null_for_what_is_not_said(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path)
    fake.cpu(CONTAINER, 5)
    fake.write(CONTAINER, "io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n8:16 rbytes=9\n")
    fake.write(CONTAINER, "memory.max", "4096\n")
    lines = dumped(fake.cgroup_root)
    assert set(lines) == {"/", "/system.slice", CONTAINER}
    line = lines[CONTAINER]
    assert line["mode"] == "v2"
    assert line["cpu_usage_ns"] == 5_000
    assert line["cpu_periods"] is None
    assert line["memory_current_bytes"] is None
    assert line["memory_limit_bytes"] == 4_096
    assert line["io"] == {
        "8:0": {"read_bytes": 1, "write_bytes": 2, "read_ops": 3, "write_ops": 4},
        "8:16": {"read_bytes": 9, "write_bytes": None, "read_ops": None, "write_ops": None},
    }
    assert line["psi"] == {r: {"some_ns": None, "full_ns": None} for r in ("cpu", "memory", "io")}
    assert lines["/system.slice"]["cpu_usage_ns"] is None


def test_read_takes_a_part_of_a_tree_that_came_without_its_controllers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cpu.stat").write_text("usage_usec 7\n")
    assert dumped(tmp_path)["/a"]["cpu_usage_ns"] == 7_000
    with pytest.raises(HostError):
        dumped(tmp_path / "a" / "nothing")


def test_read_of_v1_falls_back_to_older_names(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path, v1=True)
    fake.write("/x", "memory.stat", "inactive_file 5\n", "memory")
    fake.write("/x", "cpuacct.stat", "user 3\nsystem 2\n", "cpuacct")
    fake.write("/x", "blkio.bfq.io_service_bytes", "8:0 Read 1\n", "blkio")
    line = dumped(fake.cgroup_root)["/x"]
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert (line["memory_inactive_file_bytes"], line["cpu_user_ns"], line["cpu_system_ns"]) == (
        5,
        3 * tick,
        2 * tick,
    )
    assert line["cpu_usage_ns"] is None
    assert line["io"] == {"8:0": {"read_bytes": 1, "write_bytes": None, "read_ops": None, "write_ops": None}}


def test_read_of_a_hybrid_host_is_the_union_of_its_hierarchies(tmp_path: Path) -> None:
    fake = FakeHost(tmp_path, v1=True)
    fake.write("/", "cgroup.procs", "", "unified")
    fake.write("/", "cgroup.controllers", "", "unified")
    fake.write("/only-v1", "memory.usage_in_bytes", "7\n", "memory")
    fake.write("/both", "cpu.stat", "usage_usec 3\n", "unified")
    fake.write("/both", "memory.usage_in_bytes", "8\n", "memory")
    lines = dumped(fake.cgroup_root)
    assert {line["mode"] for line in lines.values()} == {str(Mode.HYBRID)}
    assert lines["/only-v1"]["memory_current_bytes"] == 7
    assert (lines["/both"]["cpu_usage_ns"], lines["/both"]["memory_current_bytes"]) == (3_000, 8)
