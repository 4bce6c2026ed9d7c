"""Maps made by hand, as root, for pins that the loader would never make."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.read.probes import bpf

HASH, ARRAY, PERCPU_HASH = 1, 2, 5
_MAP_CREATE, _UPDATE, _PIN = 0, 2, 6


def _attr(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, 128)


def _checked(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result = bpf._libc.syscall(bpf._number(), command, attr, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def make(pin: Path, kind: int, key: int, value: int, entries: int = 1_000, mode: int = 0o440) -> int:
    """Make a map and pin it; its descriptor."""
    fd = _checked(_MAP_CREATE, _attr(struct.pack("=IIIII", kind, key, value, entries, 0)))
    path = ctypes.create_string_buffer(os.fsencode(pin))
    _checked(_PIN, _attr(struct.pack("=QII", ctypes.addressof(path), fd, 0)))
    pin.chmod(mode)
    return fd


def put(fd: int, key: bytes, value: bytes) -> None:
    a, b = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _checked(_UPDATE, _attr(struct.pack("=IIQQQ", fd, 0, ctypes.addressof(a), ctypes.addressof(b), 0)))


@contextmanager
def bpffs(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
