"""The ring of births: read late, never, or by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.read.probes.bpf import BpfError, Map
from agent.read.probes.reader import Probes
from agent.read.probes.wake import RINGBUF, Ring
from bench import probe_set
from bench.cgroups import Cgroup
from bench.probe_set import ProbeSet
from tests.probes.maps import ARRAY, bpffs, make

pytestmark = pytest.mark.root


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[ProbeSet]:
    with probe_set.loaded(tmp_path) as probes:
        yield probes


@pytest.fixture
def probes(loaded: ProbeSet) -> Iterator[Probes]:
    found = Probes(loaded.directory)
    found.look()
    yield found
    found.close()


def mine(paths: list[str], ours: Cgroup) -> list[str]:
    return [path for path in paths if path.startswith(f"{ours.name}/")]


def test_who_was_born_is_told_once_while_it_lives(probes: Probes, ours: Cgroup) -> None:
    probes.newborn()
    living = [ours.child(f"born-{n}").name for n in range(5)]
    assert mine(probes.newborn(), ours) == living
    assert mine(probes.newborn(), ours) == []


def test_a_ring_that_nobody_reads_fills_up_and_costs_nothing_but_hints(
    probes: Probes, loaded: ProbeSet, ours: Cgroup
) -> None:
    probes.newborn()
    for _ in range(6_000):
        ours.child("short").remove()
    assert loaded.status()["overflow"]["wakes"] > 0
    living = ours.child("living")
    probes.newborn()
    assert probes.birth(living.cgroup_id) is not None
    later = ours.child("later")
    assert mine(probes.newborn(), ours) == [later.name]


def test_positions_go_round_the_ring(probes: Probes, ours: Cgroup) -> None:
    probes.newborn()
    for _ in range(12):
        for _ in range(500):
            ours.child("short").remove()
        probes.newborn()
    living = ours.child("living")
    assert mine(probes.newborn(), ours) == [living.name]


def test_two_readers_of_one_ring_share_its_hints(probes: Probes, loaded: ProbeSet, ours: Cgroup) -> None:
    other = Probes(loaded.directory)
    other.look()
    probes.newborn()
    living = ours.child("living").name
    assert mine(other.newborn() + probes.newborn(), ours) == [living]
    other.close()


def test_without_a_ring_nothing_is_missing(loaded: ProbeSet) -> None:
    (loaded.pins / "wake").unlink()
    found = Probes(loaded.directory)
    found.look()
    assert found.watches_ends
    assert found.newborn() == []
    found.close()


def test_a_pin_that_is_no_ring_is_refused(tmp_path: Path) -> None:
    with bpffs(tmp_path / "fs") as directory:
        make(directory / "wake", ARRAY, 4, 8, 4_096)
        found = Map(directory / "wake")
        assert found.type != RINGBUF
        with pytest.raises(BpfError):
            Ring(found)
        found.close()
