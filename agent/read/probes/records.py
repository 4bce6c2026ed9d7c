"""bpf/records.h in Python: the layouts, and records as plain values. A test compares the two byte for byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

LAYOUT = 1
PATH_BYTES = 360
CLASSES = 3
ROWS_IN_ELEMENT = 24
TRAFFIC_FIELDS = 3

_ID = Struct("=Q")
_BIRTH = Struct(f"=QQIIII{PATH_BYTES}s")
_TOMBSTONE = Struct(f"=10QII{PATH_BYTES}s")
_NETWORK = Struct(f"={2 * CLASSES * TRAFFIC_FIELDS}Q")
_HEAD = Struct("=5Q")
_ROW = Struct("=20QII")
_OVERFLOW = Struct("=8Q")
_ABOUT = Struct("=4I2Q32s")

SIZES = {
    "births": (_ID.size, _BIRTH.size),
    "tombstones": (_ID.size, _TOMBSTONE.size),
    "network": (_ID.size, _NETWORK.size),
    "snapshot": (4, ROWS_IN_ELEMENT * _ROW.size),
    "overflow": (4, _OVERFLOW.size),
    "about": (4, _ABOUT.size),
}
"""Map -> bytes of its keys and of its values."""

FIRST = b"\0\0\0\0"
"""Key of the only element of an array of one."""


class Knows(IntFlag):
    """WB_KNOWS_*, WB_CHILDLESS and WB_PATH_CUT."""

    CPU = 1 << 0
    THROTTLING = 1 << 1
    MEMORY = 1 << 2
    OOM_KILLS = 1 << 3
    PIDS = 1 << 4
    PIDS_PEAK = 1 << 5
    PRESSURE = 1 << 6
    MEMORY_PEAK = 1 << 7
    CHILDLESS = 1 << 30
    PATH_CUT = 1 << 31


class Has(IntFlag):
    """WB_HAS_*: what of the set is attached."""

    LIFECYCLE = 1 << 0
    NETWORK = 1 << 1
    SNAPSHOT = 1 << 2


class Walk(IntEnum):
    """enum wb_walk: how the snapshot is taken."""

    NONE = 0
    CSS = 1
    CGROUP_ITERATOR = 2
    TABLE = 3


class Engine(IntEnum):
    """enum wb_engine."""

    CORE = 1
    BCC = 2


class About(NamedTuple):
    layout: int
    engine: int
    has: int
    walk: int
    load_id: int
    programs_boottime_ns: int
    version: str


class Birth(NamedTuple):
    parent_id: int
    born_boottime_ns: int
    flags: int
    level: int
    children: int
    unused: int
    path: str


class Tombstone(NamedTuple):
    cgroup_id: int
    parent_id: int
    born_boottime_ns: int
    """0: before the probes were there."""
    removed_boottime_ns: int
    released_boottime_ns: int
    """0: not yet."""
    cpu_usage_ns: int
    cpu_user_ns: int
    cpu_system_ns: int
    memory_current_bytes: int
    memory_peak_bytes: int
    oom_kills: int
    flags: int
    level: int
    path: str

    @property
    def removal_seen(self) -> bool:
        """False: removed before the probes were there, or without room to write it; only the release was seen."""
        return self.removed_boottime_ns != self.released_boottime_ns


RawRow = tuple[int, ...]
"""The fields of `Row` in order: a host has thousands, and few of them are looked at by name."""


class Row(NamedTuple):
    """One cgroup of the snapshot, all values as the kernel holds them."""

    cgroup_id: int
    parent_id: int
    cpu_usage_ns: int
    cpu_user_ns: int
    cpu_system_ns: int
    cpu_periods: int
    cpu_throttled_periods: int
    cpu_throttled_ns: int
    memory_current_bytes: int
    memory_peak_bytes: int
    memory_limit_bytes: int
    oom_kills: int
    pids_current: int
    pids_peak: int
    psi_io_some_ns: int
    psi_io_full_ns: int
    psi_memory_some_ns: int
    psi_memory_full_ns: int
    psi_cpu_some_ns: int
    psi_cpu_full_ns: int
    flags: int
    level: int


PARENT_ID, FLAGS, LEVEL = (Row._fields.index(name) for name in ("parent_id", "flags", "level"))
"""Places in a RawRow."""


class Overflow(NamedTuple):
    """What there was no room for since the load."""

    births: int = 0
    tombstones: int = 0
    tombstones_cpu_ns: int = 0
    network_skbs: int = 0
    network_bytes: int = 0
    snapshot_rows: int = 0
    wakes: int = 0
    paths_cut: int = 0


def key(cgroup_id: int) -> bytes:
    return _ID.pack(cgroup_id)


def about(value: bytes) -> About:
    fields = _ABOUT.unpack(value)
    return About._make((*fields[:-1], _text(fields[-1])))


def birth(value: bytes) -> Birth:
    fields = _BIRTH.unpack(value)
    return Birth._make((*fields[:-1], _text(fields[-1])))


def tombstones(keys: memoryview, values: memoryview) -> Iterator[Tombstone]:
    for cgroup_id, fields in zip(keys.cast("Q"), _TOMBSTONE.iter_unpack(values), strict=True):
        yield Tombstone._make((cgroup_id, *fields[:-1], _text(fields[-1])))


def network(keys: memoryview, values: memoryview, cpus: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(cgroup id, the sums over all CPUs in the order of `agent.meter.network.MEASURES`)."""
    numbers, width = values.cast("Q"), _NETWORK.size // 8
    for index, cgroup_id in enumerate(keys.cast("Q")):
        start = index * cpus * width
        element = numbers[start : start + cpus * width].tolist()
        yield cgroup_id, tuple([sum(element[slot::width]) for slot in _NETWORK_SLOTS])


class Head(NamedTuple):
    """Of the snapshot."""

    sequence: int
    rows: int
    missed: int
    begun_boottime_ns: int
    ended_boottime_ns: int


def head(element: bytes | memoryview) -> Head:
    """What the snapshot's first element begins with."""
    return Head._make(_HEAD.unpack_from(element))


def elements_of(rows: int) -> int:
    """Elements of the snapshot that hold its head and so many rows."""
    return 1 + -(-rows // ROWS_IN_ELEMENT)


def rows(elements: memoryview, count: int) -> dict[int, RawRow]:
    """The snapshot's `count` cgroups by id; they begin with the second element."""
    begin = ROWS_IN_ELEMENT * _ROW.size
    return {values[0]: values for values in _ROW.iter_unpack(elements[begin : begin + count * _ROW.size])}


def overflow(value: bytes) -> Overflow:
    return Overflow._make(_OVERFLOW.unpack(value))


def _text(cut: bytes) -> str:
    """As os.scandir gives names: bytes that are no UTF-8 become \\udc80 to \\udcff."""
    return os.fsdecode(cut[: cut.find(b"\0")] if b"\0" in cut else cut)


# struct wb_network is rx[loopback, internal, external], tx[...], each of bytes, skbs, segments. Packets are segments:
# what crossed the wire, where one skb may stand for many.
_BYTES, _SEGMENTS = 0, 2
_NETWORK_SLOTS = tuple(
    (direction * CLASSES + peer) * TRAFFIC_FIELDS + field
    for field in (_BYTES, _SEGMENTS)
    for peer in range(CLASSES)
    for direction in (0, 1)
)
