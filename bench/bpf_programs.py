"""What the kernel itself measured of BPF programs while statistics are on, and an empty program to compare with."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SYSCALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_PROG_LOAD, _OBJ_GET, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _LINK_CREATE, _ENABLE_STATS = (
    5,
    7,
    13,
    15,
    28,
    32,
)
_CGROUP_SKB = 8
INGRESS, EGRESS = 0, 1
_STATS_RUN_TIME = 0
_RETURN_ONE = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)  # r0 = 1; exit

_libc = ctypes.CDLL(None, use_errno=True)


class RunTime(NamedTuple):
    """Of one program since statistics are on."""

    nanoseconds: int
    runs: int

    def since(self, earlier: RunTime) -> RunTime:
        return RunTime(self.nanoseconds - earlier.nanoseconds, self.runs - earlier.runs)


@contextlib.contextmanager
def statistics() -> Iterator[None]:
    """The kernel measures every program's run time meanwhile."""
    fd = _bpf(_ENABLE_STATS, struct.pack("=I", _STATS_RUN_TIME))
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def program_of(link_pin: Path) -> Iterator[int]:
    """A descriptor of the program that a pinned link attaches."""
    path = ctypes.create_string_buffer(os.fsencode(link_pin))
    link = _bpf(_OBJ_GET, struct.pack("=QII", ctypes.addressof(path), 0, 0))
    try:
        info = ctypes.create_string_buffer(64)
        _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", link, len(info), ctypes.addressof(info)))
        program_id = struct.unpack_from("=3I", info)[2]  # type, id, prog_id
        program = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", program_id))
    finally:
        os.close(link)
    try:
        yield program
    finally:
        os.close(program)


@contextlib.contextmanager
def empty_on_cgroup(cgroup: Path, direction: int) -> Iterator[int]:
    """A cgroup_skb program that lets everything pass, attached; its descriptor."""
    instructions = ctypes.create_string_buffer(_RETURN_ONE)
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16sII",
        _CGROUP_SKB,
        len(_RETURN_ONE) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        b"empty",
        0,
        direction,
    )
    program = _bpf(_PROG_LOAD, attr)
    try:
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            link = _bpf(_LINK_CREATE, struct.pack("=IIII", program, target, direction, 0))
        finally:
            os.close(target)
        try:
            yield program
        finally:
            os.close(link)
    finally:
        os.close(program)


def run_time(program: int) -> RunTime:
    fields = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
        if ":\t" in line
    )
    return RunTime(int(fields["run_time_ns"]), int(fields["run_cnt"]))


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, 144)
    result = _libc.syscall(_SYSCALL, command, buffer, len(buffer))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf({command}): {os.strerror(number)}")
    return int(result)
