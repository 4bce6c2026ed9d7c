"""What the maps of a set hold, read as the agent reads them."""

from __future__ import annotations

from typing import NamedTuple

from agent.read.probes import records
from agent.read.probes.bpf import Map, possible_cpus
from agent.read.probes.records import Birth, Overflow, Tombstone
from bench.probe_set import ProbeSet


class Traffic(NamedTuple):
    """Sums over all CPUs, of one direction and class."""

    bytes: int
    skbs: int
    segments: int


def births(probes: ProbeSet) -> dict[int, Birth]:
    held = Map(probes.pins / "births")
    try:
        return {
            cgroup_id: records.birth(bytes(values[index * held.value_size : (index + 1) * held.value_size]))
            for keys, values in held.chunks()
            for index, cgroup_id in enumerate(keys.cast("Q"))
        }
    finally:
        held.close()


def tombstones(probes: ProbeSet) -> dict[int, Tombstone]:
    held = Map(probes.pins / "tombstones")
    try:
        return {t.cgroup_id: t for keys, values in held.chunks() for t in records.tombstones(keys, values)}
    finally:
        held.close()


def network(probes: ProbeSet) -> dict[int, dict[tuple[str, str], Traffic]]:
    """Cgroup id -> (direction, class) -> traffic."""
    held = Map(probes.pins / "network")
    out = {}
    try:
        for keys, values in held.chunks():
            numbers = values.cast("Q")
            width = len(numbers) // len(keys.cast("Q")) // possible_cpus()
            for index, cgroup_id in enumerate(keys.cast("Q")):
                start = index * width * possible_cpus()
                sums = [
                    sum(numbers[start + slot + cpu * width] for cpu in range(possible_cpus()))
                    for slot in range(width)
                ]
                out[cgroup_id] = {
                    (direction, peer): Traffic(*sums[at : at + 3])
                    for d, direction in enumerate(("rx", "tx"))
                    for p, peer in enumerate(("loopback", "internal", "external"))
                    for at in ((d * 3 + p) * 3,)
                }
    finally:
        held.close()
    return out


def overflow(probes: ProbeSet) -> Overflow:
    held = Map(probes.pins / "overflow")
    try:
        return records.overflow(held.lookup(records.FIRST) or b"")
    finally:
        held.close()
