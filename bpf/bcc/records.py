"""The records of records.h that the helper reads and writes itself. Their sizes are compared with the maps'."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import kernel

FIRST = struct.pack("=I", 0)
PATH_BYTES = 360
PATH_CUT = 1 << 31

HAS_LIFECYCLE, HAS_NETWORK = 1, 2
LAYOUT, ENGINE_CORE, ENGINE_BCC = 1, 1, 2

_ID = struct.Struct("=Q")
_PLACE = struct.Struct("=QII")
_BIRTH = struct.Struct(f"=QQIIII{PATH_BYTES}s")
_TOMBSTONE = struct.Struct(f"=10QII{PATH_BYTES}s")
_ABOUT = struct.Struct("=IIIIQQ32s")

VALUE_BYTES = {"births": _BIRTH.size, "tombstones": _TOMBSTONE.size, "paths": _PLACE.size}
ABOUT_BYTES = _ABOUT.size


class About(NamedTuple):
    layout: int
    engine: int
    has: int
    walk: int
    load_id: int
    programs_boottime_ns: int
    version: bytes

    @classmethod
    def parse(cls, value: bytes) -> About:
        return cls(*_ABOUT.unpack(value))

    def pack(self) -> bytes:
        return _ABOUT.pack(*self)


class Birth(NamedTuple):
    parent_id: int
    born_boottime_ns: int
    flags: int
    level: int
    children: int
    unused: int
    path: bytes

    @classmethod
    def parse(cls, value: bytes) -> Birth:
        return cls(*_BIRTH.unpack(value))

    def pack(self) -> bytes:
        return _BIRTH.pack(*self)


def id_key(cgroup_id: int) -> bytes:
    return _ID.pack(cgroup_id)


def id_of(key: bytes) -> int:
    number: int = _ID.unpack(key)[0]
    return number


def path_key(path: bytes) -> bytes | None:
    """None: too long to be a key."""
    return path.ljust(PATH_BYTES, b"\0") if len(path) < PATH_BYTES else None


def place(cgroup_id: int, level: int) -> bytes:
    return _PLACE.pack(cgroup_id, level, 0)


def late_tombstone(birth: Birth, now_boottime_ns: int) -> bytes:
    """Of a cgroup whose end nobody saw. It is over; when it ended, and what it used, is not known."""
    times = (birth.parent_id, birth.born_boottime_ns, now_boottime_ns, now_boottime_ns)
    return _TOMBSTONE.pack(*times, *[0] * 6, birth.flags & PATH_CUT, birth.level, birth.path)


def released(tombstone: bytes, now_boottime_ns: int) -> bytes:
    return tombstone[:24] + _ID.pack(now_boottime_ns) + tombstone[32:]


def removed_boottime_ns(tombstone: bytes) -> int:
    return id_of(tombstone[16:24])


def check(maps: Mapping[str, kernel.Map]) -> None:
    for name, size in VALUE_BYTES.items():
        assert maps[name].value_bytes == size, f"{name}: the loader's layout is not this helper's"
