"""Pins as they are found: the real ones, other people's, and those that vanish while they are read."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.read.probes import records
from agent.read.probes.bpf import BpfError, Map, possible_cpus
from agent.read.probes.pins import ProbeSet, Refusal, State, adopt
from agent.read.probes.reader import Probes
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet as LoadedProbes
from bench.probe_set import directory_for_pins
from tests.probes.maps import ARRAY, HASH, PERCPU_HASH, bpffs, make, put

pytestmark = pytest.mark.root

GROUP = 54_321
NOBODY = 65_534


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Path]:
    with bpffs(tmp_path / "bpffs") as directory:
        yield directory


@pytest.fixture
def loaded() -> Iterator[LoadedProbes]:
    """In a place that other users may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-test-") as directory:
        Path(directory).chmod(0o755)
        with directory_for_pins(Path(directory)) as probes:
            probes.group = str(GROUP)
            probes.load()
            yield probes


def as_nobody(code: str, *arguments: object, groups: str = str(GROUP)) -> dict[str, object]:
    """Run Python as a user without any capability; the JSON it prints."""
    who = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={groups}", "--bounding-set=-all"]
    command = [*who, "--inh-caps=-all", "--no-new-privs", sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_hash_is_read_whole_in_chunks_however_it_is_spread(fs: Path) -> None:
    count = 5_000
    fd = make(fs / "m", HASH, 8, 600, count)
    for cgroup_id in range(count):
        put(fd, records.key(cgroup_id), struct.pack("=Q", cgroup_id * 3) + bytes(592))
    found = Map(fs / "m")
    seen = {}
    chunks = 0
    for keys, values in found.chunks():
        chunks += 1
        for index, cgroup_id in enumerate(keys.cast("Q")):
            seen[cgroup_id] = struct.unpack_from("=Q", values, index * 600)[0]
    assert chunks > 1
    assert seen == {cgroup_id: cgroup_id * 3 for cgroup_id in range(count)}
    assert found.lookup(records.key(7))[:8] == struct.pack("=Q", 21)  # type: ignore[index]
    assert found.lookup(records.key(count)) is None
    with pytest.raises(BpfError):
        found.delete([records.key(7)])
    fs.joinpath("m").chmod(0o600)
    assert Map(fs / "m", writable=True).delete([records.key(7), records.key(7), records.key(8)]) == 2
    assert len(found.lookup(records.key(9)) or b"") == 600
    os.close(fd)
    found.close()


def test_an_empty_map_and_a_map_per_cpu(fs: Path) -> None:
    fd = make(fs / "m", PERCPU_HASH, 8, 144)
    found = Map(fs / "m")
    assert list(found.chunks()) == []
    one_cpu = struct.pack("=18Q", *range(18))
    put(fd, records.key(9), one_cpu * possible_cpus())
    ((keys, values),) = found.chunks()
    ((cgroup_id, counters),) = records.network(keys, values, possible_cpus())
    assert cgroup_id == 9
    assert counters == tuple(slot * possible_cpus() for slot in records._NETWORK_SLOTS)
    os.close(fd)
    found.close()


def test_where_nothing_is_loaded_the_way_to_load_it_is_named(tmp_path: Path) -> None:
    for base in (tmp_path, tmp_path / "missing"):
        found = adopt(base)
        assert isinstance(found, Refusal)
        assert found.state is State.ABSENT
        assert "weighbridge-probes load" in found.text


def test_what_the_loader_pinned_is_adopted(loaded: LoadedProbes) -> None:
    found = adopt(loaded.directory)
    assert isinstance(found, ProbeSet)
    assert found.refresh() is State.ATTACHED
    assert found.has == records.Has.LIFECYCLE | records.Has.NETWORK | records.Has.SNAPSHOT
    assert found.about.version
    found.close()


def test_pins_of_something_else_are_named_and_never_read(fs: Path) -> None:
    (fs / "v1").mkdir()
    key, value = records.SIZES["about"]
    about = make(fs / "v1" / "about", ARRAY, key, value, 1)
    put(about, records.FIRST, records._ABOUT.pack(records.LAYOUT, 1, 7, 1, 5, 5, b"1"))
    missing = adopt(fs)
    assert isinstance(missing, Refusal)
    assert missing.state is State.FOREIGN
    make(fs / "v1" / "overflow", ARRAY, 4, 8, 1)
    wrong = adopt(fs)
    assert isinstance(wrong, Refusal)
    assert wrong.state is State.FOREIGN
    assert "overflow" in wrong.text
    (fs / "v1" / "overflow").unlink()
    (fs / "v1" / "about").unlink()
    (fs / "v1" / "about").mkdir()
    assert adopt(fs)[0] is State.FOREIGN  # type: ignore[index]


def test_another_layout_is_named_with_what_to_install(fs: Path) -> None:
    (fs / "v2").mkdir()
    make(fs / "v2" / "about", ARRAY, 4, 100, 1)
    newer = adopt(fs)
    assert isinstance(newer, Refusal)
    assert newer.state is State.WRONG_LAYOUT
    (fs / "v1").mkdir()
    key, value = records.SIZES["about"]
    put(
        make(fs / "v1" / "about", ARRAY, key, value, 1),
        records.FIRST,
        records._ABOUT.pack(9, 1, 7, 1, 5, 5, b""),
    )
    odd = adopt(fs)
    assert isinstance(odd, Refusal)
    assert odd.state is State.WRONG_LAYOUT
    assert "upgrade" in odd.text


READ_ALL = """
import json, sys
from pathlib import Path
from agent.read.probes.reader import Probes
probes = Probes(Path(sys.argv[1]))
probes.look()
rows = probes.rows()
ends = [t.cgroup_id for _, t in probes.tombstones()]
birth = probes.birth(int(sys.argv[2])) if len(sys.argv) > 2 else None
forgotten = probes.forget(ends)
caps = [line for line in open("/proc/self/status") if line.startswith("CapEff")][0].split()[1]
print(json.dumps({
    "state": probes.standing.state.value, "text": probes.standing.text, "caps": int(caps, 16),
    "rows": None if rows is None else sorted(rows), "ends": ends, "forgotten": forgotten,
    "birth": birth and birth.path, "networks": len(probes.networks()),
}))
"""


def wait_released(loaded: LoadedProbes, cgroup_id: int) -> None:
    probes = Probes(loaded.directory)
    probes.look()
    deadline = time.monotonic() + 20
    while (found := probes.tombstone(cgroup_id)) is None or not found.released_boottime_ns:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    probes.close()


def test_a_user_without_any_capability_reads_and_empties_what_its_group_owns(
    loaded: LoadedProbes, ours: Cgroup
) -> None:
    living, dead = ours.child("living"), ours.child("dead")
    dead.remove()
    wait_released(loaded, dead.cgroup_id)
    answer = as_nobody(READ_ALL, loaded.directory, living.cgroup_id)
    assert answer["caps"] == 0
    assert answer["state"] == "attached"
    assert living.cgroup_id in answer["rows"]  # type: ignore[operator]
    assert answer["birth"] == living.name
    assert dead.cgroup_id in answer["ends"]  # type: ignore[operator]
    assert answer["forgotten"] == len(answer["ends"])  # type: ignore[arg-type]
    assert dead.cgroup_id not in as_nobody(READ_ALL, loaded.directory)["ends"]  # type: ignore[operator]


def test_a_user_of_another_group_is_told_which_group_it_needs(loaded: LoadedProbes) -> None:
    answer = as_nobody(READ_ALL, loaded.directory, groups=str(GROUP + 1))
    assert answer["state"] == "unreadable"
    assert answer["rows"] is None
    assert answer["networks"] == 0


def test_a_group_that_may_only_read_is_told_that_the_maps_fill(loaded: LoadedProbes) -> None:
    for name in ("tombstones", "network"):
        (loaded.directory / "v1" / name).chmod(0o440)
    answer = as_nobody(READ_ALL, loaded.directory)
    assert answer["state"] == "read_only"
    assert answer["forgotten"] == 0
    assert answer["networks"] == 1


def test_a_link_that_somebody_removed_is_noticed(loaded: LoadedProbes) -> None:
    probes = Probes(loaded.directory)
    probes.look()
    assert probes.watches_ends
    (loaded.directory / "v1" / "link_on_rmdir").unlink()
    probes.look()
    assert probes.standing.state is State.DETACHED
    assert not probes.watches_ends
    mark, _ = probes.marks()
    assert mark is not None
    assert not mark.exits
    assert not mark.network
    probes.close()


def test_a_set_unloaded_under_the_agent_is_read_out_once_more(loaded: LoadedProbes, ours: Cgroup) -> None:
    probes = Probes(loaded.directory)
    probes.look()
    before, _ = probes.marks()
    dead = ours.child("dead")
    dead.remove()
    wait_released(loaded, dead.cgroup_id)
    loaded.run("unload")
    probes.look()
    assert probes.standing.state is State.ABSENT
    assert dead.cgroup_id in [t.cgroup_id for _, t in probes.tombstones()]
    assert [counted.unloaded for counted in probes.networks()] == [True]
    now, unloaded = probes.marks()
    assert now is None
    assert [mark.load_id for mark in unloaded] == [before.load_id if before else 0]
    probes.settle()
    assert list(probes.tombstones()) == []
    loaded.load()
    probes.look()
    after, unloaded = probes.marks()
    assert after is not None
    assert after.load_id != (before.load_id if before else 0)
    assert unloaded == []
    probes.close()


def test_an_upgrade_is_taken_up_without_losing_the_set(loaded: LoadedProbes) -> None:
    probes = Probes(loaded.directory)
    probes.look()
    before = probes.about
    loaded.run("upgrade")
    probes.look()
    assert probes.standing.state is State.ATTACHED
    assert before is not None
    assert probes.about is not None
    assert probes.about.load_id == before.load_id
    assert probes.about.programs_boottime_ns > before.programs_boottime_ns
    assert probes.rows() is not None
    probes.close()


def test_two_readers_of_the_snapshot_do_not_spoil_it_for_one_another(loaded: LoadedProbes) -> None:
    first = adopt(loaded.directory)
    assert isinstance(first, ProbeSet)
    with first._alone():
        second = adopt(loaded.directory)
        assert isinstance(second, ProbeSet)
        assert second.rows() is None
    assert second.rows() is not None
    first.close()
    second.close()


def test_the_traffic_of_a_cgroup_is_what_its_sockets_sent(loaded: LoadedProbes, ours: Cgroup) -> None:
    talker = ours.child("talker.scope")
    code = (
        "import socket\n"
        "a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in 'ab')\n"
        "b.bind(('127.0.0.1', 0))\n"
        "[a.sendto(bytes(100), b.getsockname()) for _ in range(50)]\n"
        "[b.recv(200) for _ in range(50)]\n"
    )
    assert talker.run([sys.executable, "-S", "-c", code]).wait(30) == 0
    probes = Probes(loaded.directory)
    probes.look()
    (counted,) = probes.networks()
    counters = dict(counted.entries)[talker.cgroup_id]
    each = 100 + 8 + 20
    assert counters[:2] == (50 * each, 50 * each)
    assert counters[6:8] == (50, 50)
    assert counters[2:6] == (0, 0, 0, 0)
    probes.close()


def test_a_place_that_is_no_directory_is_a_state_too(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    found = adopt(place)
    assert isinstance(found, Refusal)
    with socket.socket(socket.AF_UNIX) as listening:
        (tmp_path / "v1").mkdir()
        listening.bind(str(tmp_path / "v1" / "about"))
        odd = adopt(tmp_path)
    assert isinstance(odd, Refusal)
    assert odd.state is not State.ATTACHED
