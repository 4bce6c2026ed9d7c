"""Engine bcc on the real kernel: the same maps as engine core's, bar what a tracepoint does not say."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.meter.identity import role
from agent.read import host, plan
from agent.read.cgroupfs import CgroupReader
from agent.read.probes.pins import State
from agent.read.probes.reader import Probes
from agent.read.probes.records import Knows
from bench import bcc
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet
from tests.probes.conftest import needs_bcc, until
from tests.probes.holding import births, network, overflow, tombstones
from tests.probes.links import links_of, living_links

pytestmark = [pytest.mark.root, pytest.mark.timeout(300), needs_bcc]

CONTAINER = "docker-" + "ab" * 32 + ".scope"
HELD = "--for-tests-only-hold-tracepoints"
NOBODY = 65_534
TALK = (
    "import socket\n"
    "a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in 'ab')\n"
    "b.bind(('127.0.0.1', 0))\n"
    "[a.sendto(bytes(72), b.getsockname()) for _ in range(10)]\n"
)
TALKED = 10 * (72 + 8 + 20)


def talk(cgroup: Cgroup) -> None:
    assert cgroup.run([sys.executable, "-S", "-c", TALK]).wait(30) == 0


def talked(pins: ProbeSet, cgroup: Cgroup) -> int:
    """Bytes in both directions; the same in each, or the test fails."""
    traffic = network(pins)[cgroup.cgroup_id]
    sent, received = (traffic[direction, "loopback"].bytes for direction in ("tx", "rx"))
    assert sent == received
    return sent


def is_released(pins: ProbeSet, cgroup_id: int) -> bool:
    found = tombstones(pins).get(cgroup_id)
    return found is not None and found.released_boottime_ns != 0


def test_a_life_is_recorded_from_its_tracepoints_alone(pins: ProbeSet, ours: Cgroup) -> None:
    with bcc.helper(pins):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        outer = ours.child(CONTAINER)
        inner = outer.child("inner")
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        born = births(pins)
        # The slice is older than the helper, which found it in the tree.
        assert ours.cgroup_id not in born
        for cgroup, parent, level in ((outer, ours, 2), (inner, outer, 3)):
            birth = born[cgroup.cgroup_id]
            assert (birth.path, birth.parent_id, birth.level) == (cgroup.name, parent.cgroup_id, level)
            assert before < birth.born_boottime_ns < after
        assert inner.run(["true"]).wait() == 0
        inner.wait_empty()
        for cgroup in (inner, outer):
            cgroup.path.rmdir()
            assert tombstones(pins)[cgroup.cgroup_id].removed_boottime_ns > after
        until(lambda: is_released(pins, inner.cgroup_id) and is_released(pins, outer.cgroup_id))
        ended = tombstones(pins)
        for cgroup, parent in ((outer, ours), (inner, outer)):
            tombstone = ended[cgroup.cgroup_id]
            assert (tombstone.path, tombstone.parent_id) == (cgroup.name, parent.cgroup_id)
            assert tombstone.born_boottime_ns == born[cgroup.cgroup_id].born_boottime_ns
            assert tombstone.removed_boottime_ns < tombstone.released_boottime_ns
            assert Knows(tombstone.flags) == Knows(0), "neither CPU nor memory: no struct is read"
            assert tombstone.cpu_usage_ns == tombstone.memory_peak_bytes == 0
            assert cgroup.cgroup_id not in births(pins)


def test_a_cgroup_older_than_the_helper_leaves_a_tombstone_without_a_birth(
    pins: ProbeSet, ours: Cgroup
) -> None:
    old = ours.child(CONTAINER)
    with bcc.helper(pins):
        old.path.rmdir()
        until(lambda: is_released(pins, old.cgroup_id))
        tombstone = tombstones(pins)[old.cgroup_id]
        assert tombstone.born_boottime_ns == 0
        assert (tombstone.path, tombstone.parent_id) == (old.name, ours.cgroup_id)


def test_every_short_life_leaves_one_released_tombstone(
    pins: ProbeSet, ours: Cgroup, short_lives: Path
) -> None:
    with bcc.helper(pins):
        words = [str(short_lives), str(ours.path), "0", "400", "8"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        lived = {int(line.split()[0]) for line in done.stdout.splitlines()}
        assert len(lived) == 400
        until(lambda: all(is_released(pins, cgroup_id) for cgroup_id in lived))
        assert all(tombstones(pins)[cgroup_id].parent_id == ours.cgroup_id for cgroup_id in lived)
        assert not lived & set(births(pins))
        counted = overflow(pins)
        assert (counted.births, counted.tombstones) == (0, 0)


def test_a_path_made_again_names_the_parent_that_lives_now(pins: ProbeSet, ours: Cgroup) -> None:
    with bcc.helper(pins):
        first = ours.child(CONTAINER)
        first.path.rmdir()
        again = ours.child(CONTAINER)
        assert again.cgroup_id != first.cgroup_id
        inner = again.child("inner")
        assert births(pins)[inner.cgroup_id].parent_id == again.cgroup_id


def test_the_parent_of_a_path_longer_than_the_record_is_unknown_and_never_another(
    pins: ProbeSet, ours: Cgroup
) -> None:
    with bcc.helper(pins):
        made = [ours]
        while len(made[-1].name) < 1_000:
            made.append(made[-1].child("x" * 150))
        born = births(pins)
        for parent, cgroup in itertools.pairwise(made):
            birth = born[cgroup.cgroup_id]
            assert birth.parent_id == (parent.cgroup_id if len(parent.name) < 360 else 0)
            cut = len(cgroup.name) >= 360
            assert (Knows.PATH_CUT in Knows(birth.flags & 0xFFFFFFFF)) == cut
            assert birth.path == cgroup.name[:359]
        assert overflow(pins).paths_cut >= sum(len(cgroup.name) >= 360 for cgroup in made)


def test_a_full_map_counts_what_it_could_not_store(pins: ProbeSet, ours: Cgroup) -> None:
    with bcc.helper(pins, "--max-cgroups", "4", "--max-ended", "2"):
        # Whoever else makes cgroups on this host takes room too.
        made = [ours.child(f"docker-{number:064x}.scope") for number in range(10)]
        assert len(births(pins)) == 4
        assert overflow(pins).births >= 6
        for cgroup in made:
            cgroup.path.rmdir()
        until(lambda: overflow(pins).tombstones >= 2 * 8)
        assert len(tombstones(pins)) == 2


def test_an_agent_takes_from_it_what_is_known_and_the_rest_from_the_files(
    pins: ProbeSet, ours: Cgroup
) -> None:
    with bcc.helper(pins):
        facts = host.probe(Path("/sys/fs/cgroup"), Path("/proc"))
        reader = CgroupReader(plan.make(facts, "v2"), role, probes=Probes(pins.directory))
        try:
            unit = ours.child(CONTAINER)
            talk(unit)
            unit.wait_empty()
            (living,) = [u for u in reader.read().units if u.cgroup_id == unit.cgroup_id]
            assert living.counters[0] is not None, "CPU, from cpu.stat"
            known = frozenset({unit.cgroup_id})
            unit.path.rmdir()
            until(lambda: is_released(pins, unit.cgroup_id))
            snapshot = reader.read(known)
            (end,) = [end for end in snapshot.ends if end.reading.cgroup_id == unit.cgroup_id]
            assert end.released
            assert end.reading.counters[0] is None, "unknown, and not 0"
            assert any(
                owner == unit.cgroup_id and TALKED in counters
                for counted in snapshot.networks
                for _, owner, counters in counted.entries
            )
        finally:
            reader.close()
            reader.probes.close()


def test_an_agent_goes_on_with_engine_core_when_that_takes_over(pins: ProbeSet, ours: Cgroup) -> None:
    unit = ours.child(CONTAINER)
    with bcc.helper(pins, HELD) as helper:
        probes = Probes(pins.directory)
        try:
            probes.look()
            assert (probes.standing.state, probes.rows()) == (State.ATTACHED, None)
            load_id = probes.about.load_id if probes.about else None
            assert helper.end() == 0
            probes.look()
            assert not probes.watches_ends
            pins.load()
            probes.look()
            assert (probes.standing.state, probes.watches_ends) == (State.ATTACHED, True)
            assert unit.cgroup_id in (probes.rows() or {})
            assert probes.about is not None
            assert probes.about.load_id == load_id, "counters go on"
        finally:
            probes.close()


def test_a_kernel_that_does_not_describe_its_types_is_what_it_is_for(pins: ProbeSet, ours: Cgroup) -> None:
    hide = ["sh", "-c", 'mount -t tmpfs tmpfs /sys/kernel/btf && exec "$@"', "sh"]
    with bcc.helper(pins, prefix=hide):
        talk(ours.child(CONTAINER))
        assert (pins.status()["lifecycle"], pins.status()["network"]) == (True, True)


def test_it_says_ready_when_it_counts_and_ends_when_told(pins: ProbeSet, ours: Cgroup) -> None:
    with bcc.helper(pins) as helper:
        assert helper.notified[0] == "READY=1"
        assert helper.notified[1].endswith("lifecycle yes, network yes, walk none")
        assert pins.status() | {"maps": None, "overflow": None, "version": ""} == {
            "loaded": True,
            "version": "",
            "engine": "bcc",
            "lifecycle": True,
            "network": True,
            "walk": "none",
            "maps": None,
            "overflow": None,
        }
        resident = next(
            int(line.split()[1])
            for line in Path(f"/proc/{helper.process.pid}/status").read_text().splitlines()
            if line.startswith("VmRSS:")
        )
        assert resident < 40_000, "the compiler is not in it"
        assert helper.end() == 0
        assert pins.status()["lifecycle"], "what is pinned goes on"


def test_a_member_of_the_group_reads_it_and_nobody_else_does(pins: ProbeSet, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(0o755)
    pins.group = str(NOBODY)
    with bcc.helper(pins):
        modes = {p.name: (p.stat().st_mode & 0o777, p.stat().st_gid) for p in pins.pins.iterdir()}
        readable = {name for name, (mode, group) in modes.items() if mode & 0o040 and group == NOBODY}
        assert readable == {"births", "tombstones", "wake", "network", "classes", "overflow", "about"}
        assert {n for n in readable if modes[n][0] == 0o660} == {"tombstones", "wake", "network"}
        assert not {mode for name, (mode, _) in modes.items() if name not in readable} - {0o600}
        for group, code in ((NOBODY, 0), (12_345, 1)):
            seen = subprocess.run(
                [
                    *(
                        "setpriv",
                        "--reuid",
                        "12345",
                        "--regid",
                        str(group),
                        "--clear-groups",
                        "--inh-caps=-all",
                    ),
                    *(str(bcc.LOADER), "status", "--directory", str(pins.directory)),
                ],
                capture_output=True,
                text=True,
            )
            assert seen.returncode == code, seen.stderr
            assert ("engine bcc" in seen.stdout) == (code == 0)


def test_unload_leaves_nothing_behind(pins: ProbeSet) -> None:
    with bcc.helper(pins) as helper:
        links = links_of(pins)
        assert len(links) == 5
        done = pins.run("unload")
        assert (done.returncode, done.stderr) == (0, "")
        assert helper.process.poll() == 0 or helper.process.wait(1) == 0
        assert not pins.pins.exists()
    until(lambda: not links & living_links())


def test_what_is_pinned_goes_on_counting_over_a_kill_and_is_taken_up_again(
    pins: ProbeSet, ours: Cgroup
) -> None:
    unit = ours.child(CONTAINER)
    with bcc.helper(pins) as first:
        talk(unit)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        talk(unit)
        meanwhile = ours.child("wb-meanwhile.scope")
        gone = ours.child("wb-gone.scope")
        gone.path.rmdir()
        until(lambda: is_released(pins, gone.cgroup_id))
        assert meanwhile.cgroup_id in births(pins)
        assert talked(pins, unit) == 2 * TALKED
    with bcc.helper(pins) as second:
        assert "ended while nobody listened" not in second.said
        talk(unit)
        assert talked(pins, unit) == 3 * TALKED
        inner = meanwhile.child("inner")
        assert births(pins)[inner.cgroup_id].parent_id == meanwhile.cgroup_id
        assert len(list(pins.pins.glob("link_*"))) == 5


def test_before_5_15_ends_that_nobody_saw_are_written_down_at_the_next_start(
    pins: ProbeSet, ours: Cgroup
) -> None:
    talker = ours.child(CONTAINER)
    with bcc.helper(pins, HELD) as first:
        assert "as long as this process runs" in first.notified[1]
        assert {p.name for p in pins.pins.glob("link_*")} == {"link_on_ingress", "link_on_egress"}
        unseen, lives, half = (ours.child(f"wb-{name}.scope") for name in ("unseen", "lives", "half"))
        # A socket keeps its cgroup from being released.
        kept = socket_made_in(half)
        half.path.rmdir()
        first.end(signal.SIGKILL)
    unseen.path.rmdir()
    kept.close()
    never_seen = ours.child("wb-never-seen.scope")
    never_seen.path.rmdir()
    talk(talker)
    assert talked(pins, talker) == TALKED, "the network programs are pinned on every kernel"
    time.sleep(0.5)
    assert unseen.cgroup_id not in tombstones(pins)
    begun = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with bcc.helper(pins, HELD) as second:
        assert "cgroups ended while nobody listened" in second.said
        late = tombstones(pins)[unseen.cgroup_id]
        assert (late.path, late.parent_id) == (unseen.name, ours.cgroup_id)
        assert late.removed_boottime_ns == late.released_boottime_ns > begun
        assert not late.removal_seen
        assert 0 < late.born_boottime_ns < begun
        halfway = tombstones(pins)[half.cgroup_id]
        assert halfway.removed_boottime_ns < begun < halfway.released_boottime_ns
        assert {unseen.cgroup_id, half.cgroup_id} & set(births(pins)) == set()
        assert lives.cgroup_id in births(pins)
        assert never_seen.cgroup_id not in tombstones(pins)
        lives.path.rmdir()
        until(lambda: is_released(pins, lives.cgroup_id))
        assert tombstones(pins)[lives.cgroup_id].removal_seen
        assert second.end() == 0
    assert not pins.status()["lifecycle"], "coverage says so while nobody listens"
    assert pins.status()["network"]


def socket_made_in(cgroup: Cgroup) -> socket.socket:
    """Made by a process of the cgroup, which has ended; handed over to us."""
    here, there = socket.socketpair()
    code = (
        "import socket, sys\n"
        "to = socket.socket(fileno=int(sys.argv[1]))\n"
        "made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "socket.send_fds(to, [b'x'], [made.fileno()])\n"
    )
    enter = f'echo $$ > "{cgroup.path}/cgroup.procs" && exec "$@"'
    words = ["/bin/sh", "-c", enter, "sh", sys.executable, "-c", code, str(there.fileno())]
    with here, there:
        process = subprocess.Popen(words, pass_fds=[there.fileno()])
        _, descriptors, _, _ = socket.recv_fds(here, 1, 1)
        assert process.wait() == 0
    cgroup.wait_empty()
    return socket.socket(fileno=descriptors[0])


def test_engine_core_is_replaced_only_when_told_and_either_takes_over_what_the_other_counted(
    probes: ProbeSet, ours: Cgroup
) -> None:
    unit = ours.child(CONTAINER)
    ended = ours.child("wb-ended.scope")
    talk(ended)
    ended.wait_empty()
    ended.path.rmdir()
    until(lambda: is_released(probes, ended.cgroup_id))
    talk(unit)
    core = tombstones(probes)[ended.cgroup_id]
    assert Knows.CPU in Knows(core.flags)
    refused = subprocess.run(bcc.command(probes), capture_output=True, text=True)
    assert refused.returncode == 1
    assert "engine core is loaded" in refused.stderr
    assert "upgrade --engine bcc" in refused.stderr
    assert probes.status()["engine"] == "core"
    with bcc.helper(probes, do="upgrade") as helper:
        assert (probes.status()["engine"], probes.status()["walk"]) == ("bcc", "none")
        assert tombstones(probes)[ended.cgroup_id] == core
        talk(unit)
        assert talked(probes, unit) == 2 * TALKED
        inner = unit.child("inner")
        assert births(probes)[inner.cgroup_id].parent_id == unit.cgroup_id
        probes.load()
        assert helper.process.wait(10) == 0
    assert (probes.status()["engine"], probes.status()["walk"]) != ("bcc", "none")
    talk(unit)
    assert talked(probes, unit) == 3 * TALKED
    probes.walk()
    assert not (probes.pins / "paths").exists()


def test_what_the_kernel_kept_from_the_programs_is_counted_beside_what_they_count(pins: ProbeSet) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(bcc.HELPER)!r})
import compiler, engine, missed, pins
from pathlib import Path
held = pins.Pins(Path({str(pins.pins)!r}))
loaded = compiler.load(engine.LIFECYCLE, held.maps, verbose=False)
counting = missed.Missed(*loaded.programs)
counting.count(births=3, ends=2)
counting.count(births=0, ends=1)
assert counting.look() == 0
"""
    with bcc.helper(pins):
        before = bcc.headers_in_place()
        words = bcc.command(pins, before=before)
        words[words.index("sh", 6) + 1 :] = ["/usr/bin/python3", "-IB", "-c", code]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counted = overflow(pins)
        assert (counted.births, counted.tombstones) == (3, 3)
