"""weighbridge-probes: load, replace, refuse, unload."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.read.probes import records
from agent.read.probes.bpf import Map
from bench.cgroups import Cgroup
from bench.probe_set import LOADER, ProbeSet
from bench.short_lives import start, usage_ns
from tests.probes.conftest import until
from tests.probes.holding import births, network, overflow, tombstones
from tests.probes.links import links_of, living_links

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

NOBODY = 65_534


def test_unload_leaves_nothing_behind(pins: ProbeSet) -> None:
    pins.load()
    links = links_of(pins)
    assert len(links) == 6
    done = pins.run("unload")
    assert (done.returncode, done.stderr) == (0, "")
    assert not pins.pins.exists()
    until(lambda: not links & living_links())
    again = pins.run("unload")
    assert (again.returncode, again.stderr) == (0, ""), "nothing to unload is no error"


def test_load_of_what_is_loaded_changes_nothing(probes: ProbeSet) -> None:
    before = {p.name: p.stat().st_ino for p in probes.pins.iterdir()}
    assert "loaded already" in probes.load()
    assert {p.name: p.stat().st_ino for p in probes.pins.iterdir()} == before


def test_pins_are_the_groups_to_read_and_only_what_the_agent_empties_to_write(pins: ProbeSet) -> None:
    pins.group = str(NOBODY)
    pins.load()
    modes = {p.name: (stat.S_IMODE(p.stat().st_mode), p.stat().st_gid) for p in pins.pins.iterdir()}
    writable = {"tombstones", "network", "wake"}
    roots = {"class_changes", *(name for name in modes if name.startswith("link_"))}
    for name, (mode, group) in modes.items():
        assert group == NOBODY
        wanted = 0o660 if name in writable else 0o600 if name in roots else 0o440 if name == "walk" else 0o640
        assert mode == wanted, name
    assert stat.S_IMODE(pins.directory.stat().st_mode) == stat.S_IMODE(pins.pins.stat().st_mode) == 0o750


def test_a_member_of_the_group_sees_the_status_and_nobody_else_does(pins: ProbeSet, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(0o755)
    pins.group = str(NOBODY)
    pins.load()
    status = [str(LOADER), "status", "--directory", str(pins.directory)]
    as_member = [
        "setpriv",
        "--reuid",
        "12345",
        "--regid",
        str(NOBODY),
        "--clear-groups",
        "--inh-caps=-all",
        *status,
    ]
    seen = subprocess.run(as_member, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    assert "lifecycle yes, network yes" in seen.stdout
    as_other = [
        "setpriv",
        "--reuid",
        "12345",
        "--regid",
        "12345",
        "--clear-groups",
        "--inh-caps=-all",
        *status,
    ]
    refused = subprocess.run(as_other, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "as a member of its group" in refused.stderr


def test_three_capabilities_are_enough_and_each_that_lacks_is_named(pins: ProbeSet) -> None:
    pins.directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(pins.directory)], check=True)
    needed = {"bpf", "perfmon", "net_admin"}
    for lacking in sorted(needed):
        refused = _with_capabilities(pins, needed - {lacking})
        assert refused.returncode == 1
        assert f"CAP_{lacking.upper()} is missing" in refused.stderr
        assert refused.stderr.count("is missing") == 1
        assert not pins.pins.exists()
    done = _with_capabilities(pins, needed)
    assert done.returncode == 0, done.stderr
    assert "lifecycle yes, network yes, walk css" in done.stderr or "walk iterator" in done.stderr


def test_without_a_bpffs_and_the_right_to_mount_one_the_command_to_run_is_named(pins: ProbeSet) -> None:
    pins.directory.mkdir()
    refused = _with_capabilities(pins, {"bpf", "perfmon", "net_admin"})
    assert refused.returncode == 1
    assert f"mount -t bpf -o mode=0750,gid=0 bpf {pins.directory}" in refused.stderr


def test_a_kernel_without_btf_is_named_with_what_can_be_done(pins: ProbeSet) -> None:
    load = f"{LOADER} load --directory {pins.directory} --group root"
    hidden = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /sys/kernel/btf && exec {load}"]
    done = subprocess.run(hidden, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no /sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF" in done.stderr
    assert "--engine bcc" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["load", "--walk", "moonwalk"], "--walk is auto, css, iterator or table, not moonwalk"),
        (["load", "--max-ended", "0"], "--max-ended needs a number from 1 to 1000000, not 0"),
        (["load", "--max-cgroups", "many"], "--max-cgroups needs a number from 1 to 1000000, not many"),
        (["load", "--directory", "here"], "--directory needs a whole path, not here"),
        (["dance"], "there is no command dance"),
        (["load", "twice"], "weighbridge-probes load"),
        ([], "weighbridge-probes load"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(words: list[str], said: str) -> None:
    done = subprocess.run([str(LOADER), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_group_that_does_not_exist_is_named(pins: ProbeSet) -> None:
    pins.group = "no-such-group"
    done = pins.run("load")
    assert done.returncode == 1
    assert "there is no group no-such-group: groupadd --system no-such-group" in done.stderr
    assert not pins.directory.exists()


def test_foreign_pins_are_named_and_not_touched_by_load(pins: ProbeSet) -> None:
    pins.load()
    ours = {p.name for p in pins.pins.iterdir()}
    (pins.pins / "births").unlink()
    subprocess.run(["bpftool", "map", "create", str(pins.pins / "births"), *_ALIEN], check=True)
    done = pins.run("load")
    assert done.returncode == 1
    assert f"{pins.pins}/births is no map of layout 1" in done.stderr
    assert "unload`, then load" in done.stderr
    assert {p.name for p in pins.pins.iterdir()} == ours
    assert pins.run("status").returncode == 1
    assert pins.run("unload").returncode == 0
    assert "loaded version" in pins.load()


_ALIEN = ["type", "hash", "key", "4", "value", "4", "entries", "1", "name", "births"]


def test_a_loader_that_was_killed_is_finished_by_the_next(pins: ProbeSet) -> None:
    rng = random.Random(20)
    killed = 0
    links: set[int] = set()
    for _ in range(25):
        words = [str(LOADER), "load", "--directory", str(pins.directory), "--group", "root"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.0, 0.12))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if killed and not (pins.pins / "about").exists():
            assert pins.run("status").returncode in (1, 3)
        pins.load()
        status = pins.status()
        assert status["lifecycle"]
        assert status["network"]
        links |= links_of(pins)
        assert len(links_of(pins)) == 6
        assert pins.run("unload").returncode == 0
    until(lambda: not links & living_links())
    assert killed >= 5, "hardly ever was it killed in the middle"


def test_two_loaders_at_once_do_not_get_in_each_others_way(pins: ProbeSet) -> None:
    pins.load()
    words = [str(LOADER), "upgrade", "--directory", str(pins.directory), "--group", "root"]
    many = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[1] for process in many]
    assert any(process.returncode == 0 for process in many)
    for process, text in zip(many, said, strict=True):
        assert process.returncode == 0 or "another weighbridge-probes is at work" in text
    assert pins.status()["lifecycle"]
    assert not list(pins.pins.glob("*_new"))


def test_upgrade_needs_something_to_replace(pins: ProbeSet) -> None:
    pins.load()
    pins.run("unload")
    done = pins.run("upgrade")
    assert done.returncode == 1
    assert "nothing is loaded that could be replaced" in done.stderr


def test_programs_are_replaced_under_load_without_a_gap_and_without_counting_twice(
    probes: ProbeSet, ours: Cgroup, short_lives: Path
) -> None:
    talker = ours.child("docker-" + "a" * 64 + ".scope")
    datagrams, size = 40_000, 100
    code = (
        "import socket, time\n"
        "to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "to.bind(('127.0.0.1', 0))\n"
        "there = to.getsockname()\n"
        f"for number in range({datagrams}):\n"
        f"    to.sendto(b'x' * {size}, there)\n"
        f"    assert len(to.recv(1000)) == {size}\n"
        "    if number % 40 == 0: time.sleep(0.001)\n"
    )
    dying = start(short_lives, ours, 0, 600, workers=8)
    talking = talker.run([sys.executable, "-c", code])
    first = links_of(probes)
    upgrades = 0
    while dying.poll() is None or talking.poll() is None:
        done = probes.run("upgrade")
        assert done.returncode == 0, done.stderr
        upgrades += 1
    assert talking.wait() == 0
    assert upgrades >= 5, "hardly an upgrade fell into the load"
    usage = usage_ns(dying)
    assert len(usage) == 600
    until(
        lambda: sum(1 for i, t in tombstones(probes).items() if i in usage and t.released_boottime_ns) == 600
    )
    found = tombstones(probes)
    assert {i: found[i].cpu_usage_ns // 1_000 * 1_000 for i in usage} == usage
    assert all(found[i].born_boottime_ns for i in usage)
    traffic = network(probes)[talker.cgroup_id]
    for direction in ("rx", "tx"):
        counted = traffic[direction, "loopback"]
        assert counted.skbs == datagrams
        assert counted.bytes == datagrams * (size + 28)
    assert not any(overflow(probes)._replace(wakes=0, paths_cut=0))
    assert len(links_of(probes) & first) == 2, "the two on the cgroup stay, with other programs"
    assert len(links_of(probes)) == 6
    until(lambda: len(first & living_links()) == 2)
    assert not list(probes.pins.glob("*_new"))


def test_what_was_counted_before_an_upgrade_is_there_after_it(probes: ProbeSet, ours: Cgroup) -> None:
    made = ours.child("docker-" + "f" * 64 + ".scope")
    load_id = _about(probes)
    made.path.rmdir()
    until(lambda: bool(tombstones(probes)[made.cgroup_id].released_boottime_ns))
    living = ours.child("docker-" + "9" * 64 + ".scope")
    assert "replaced the programs" in probes.run("upgrade").stderr
    assert made.cgroup_id in tombstones(probes)
    assert living.cgroup_id in births(probes)
    assert _about(probes) == load_id, "counters go on, so it is the same load"


def test_another_way_to_walk_can_take_the_place_of_one(probes: ProbeSet) -> None:
    assert probes.status()["walk"] == "css"
    probes.run("upgrade", "--walk", "iterator")
    assert probes.status()["walk"] == "iterator"
    probes.walk()


def _about(probes: ProbeSet) -> int:
    held = Map(probes.pins / "about")
    try:
        return records.about(held.lookup(records.FIRST) or b"").load_id
    finally:
        held.close()


def _with_capabilities(pins: ProbeSet, names: set[str]) -> subprocess.CompletedProcess[str]:
    kept = ",".join(f"+{name}" for name in sorted(names))
    words = ["setpriv", f"--bounding-set=-all,{kept}", f"--inh-caps=-all,{kept}"]
    load = [str(LOADER), "load", "--directory", str(pins.directory), "--group", "root"]
    return subprocess.run([*words, *load], capture_output=True, text=True)
