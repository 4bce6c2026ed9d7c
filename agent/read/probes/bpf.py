"""bpf(2) without a library: open pins, ask what they are, look up, delete.

Nothing here needs a capability: since Linux 5.19 kernel.unprivileged_bpf_disabled only forbids to make maps and to
load programs ("bpf: refine kernel.unprivileged_bpf_disabled behaviour"); who may open a pin may use it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.errors import AgentError

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_LOOKUP_ELEM, _DELETE_ELEM, _OBJ_GET, _INFO_BY_FD, _LOOKUP_BATCH = 1, 3, 7, 15, 24
_RDONLY = 1 << 3

# union bpf_attr, as far as the commands above read it.
_ELEM = struct.Struct("=IIQQQ")  # map_fd, padding, key, value, flags
_GET = struct.Struct("=QII")  # pathname, bpf_fd, file_flags
_INFO = struct.Struct("=IIQ")  # bpf_fd, info_len, info
_BATCH = struct.Struct("=QQQQIIQQ")  # in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags
_BATCH_COUNT = struct.Struct("=I")
_BATCH_COUNT_AT = 32
_MAP_INFO = struct.Struct("=IIIIII")  # type, id, key_size, value_size, max_entries, map_flags

_PER_CPU_TYPES = frozenset((5, 6, 10))  # PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH
_CHUNK_BYTES = 1 << 20
"""Memory for one batch of values; a map is read in as many as it takes."""
_TOKEN_BYTES = 16

_libc = ctypes.CDLL(None, use_errno=True)


class BpfError(AgentError):
    """A bpf(2) call was refused; `number` is its errno."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what}: {os.strerror(number)}")
        self.number = number


class Map:
    """One pinned map and what the kernel says of it. Keeps its descriptor, and so the map, until `close`."""

    def __init__(self, pin: Path, writable: bool = False) -> None:
        self.name = pin.name
        self.fd = _open(pin, writable)
        try:
            self.type, self.id, self.key_size, self.value_size, self.max_entries, _ = _map_info(self.fd, pin)
        except BpfError:
            os.close(self.fd)
            raise
        self.per_cpu = self.type in _PER_CPU_TYPES
        self.stride = -(-self.value_size // 8) * 8 * possible_cpus() if self.per_cpu else self.value_size
        """Bytes of one element's values: those of all CPUs one after another, each padded to 8."""

    def lookup(self, key: bytes) -> bytes | None:
        """The value of one key, None if it has none."""
        value = ctypes.create_string_buffer(self.stride)
        sought = ctypes.create_string_buffer(key, len(key))
        attr = ctypes.create_string_buffer(
            _ELEM.pack(self.fd, 0, ctypes.addressof(sought), ctypes.addressof(value), 0), 128
        )
        number = _call(_LOOKUP_ELEM, attr)
        if number == errno.ENOENT:
            return None
        if number:
            raise BpfError(f"reading the map {self.name}", number)
        return value.raw

    def chunks(self) -> Iterator[tuple[memoryview, memoryview]]:
        """(keys, values) of the whole map, a chunk at a time. Valid until the next chunk is asked for.

        A bucket is read under its lock: each element is whole, and one that is there throughout is seen once.
        """
        size = max(64, min(self.max_entries, _CHUNK_BYTES // self.stride))
        tokens = [ctypes.create_string_buffer(_TOKEN_BYTES) for _ in range(2)]
        first = True
        while True:
            keys = ctypes.create_string_buffer(self.key_size * size)
            values = ctypes.create_string_buffer(self.stride * size)
            while True:
                start = 0 if first else ctypes.addressof(tokens[0])
                places = ctypes.addressof(tokens[1]), ctypes.addressof(keys), ctypes.addressof(values)
                attr = ctypes.create_string_buffer(_BATCH.pack(start, *places, size, self.fd, 0, 0), 128)
                number = _call(_LOOKUP_BATCH, attr)
                if number == errno.ENOSPC:
                    break
                if number not in (0, errno.ENOENT):
                    raise BpfError(f"reading the map {self.name}", number)
                count = _BATCH_COUNT.unpack_from(attr, _BATCH_COUNT_AT)[0]
                if count:
                    yield (
                        memoryview(keys).cast("B")[: count * self.key_size],
                        memoryview(values).cast("B")[: count * self.stride],
                    )
                if number == errno.ENOENT:
                    return
                first = False
                tokens.reverse()
            # More elements in one bucket than there is room for.
            size *= 2

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete elements; how many were there."""
        deleted = 0
        for key in keys:
            sought = ctypes.create_string_buffer(key, len(key))
            attr = ctypes.create_string_buffer(_ELEM.pack(self.fd, 0, ctypes.addressof(sought), 0, 0), 128)
            number = _call(_DELETE_ELEM, attr)
            if number not in (0, errno.ENOENT):
                raise BpfError(f"deleting from the map {self.name}", number)
            deleted += number == 0
        return deleted

    def first(self, count: int) -> memoryview:
        """The values of an array's first `count` elements."""
        keys = ctypes.create_string_buffer(self.key_size * count)
        values = ctypes.create_string_buffer(self.stride * count)
        token = ctypes.create_string_buffer(_TOKEN_BYTES)
        places = ctypes.addressof(token), ctypes.addressof(keys), ctypes.addressof(values)
        attr = ctypes.create_string_buffer(_BATCH.pack(0, *places, count, self.fd, 0, 0), 128)
        number = _call(_LOOKUP_BATCH, attr)
        if number not in (0, errno.ENOENT):
            raise BpfError(f"reading the map {self.name}", number)
        got = _BATCH_COUNT.unpack_from(attr, _BATCH_COUNT_AT)[0]
        return memoryview(values).cast("B")[: got * self.stride]

    def close(self) -> None:
        os.close(self.fd)


@functools.cache
def possible_cpus() -> int:
    """CPUs the kernel has room for: so many values has an element of a per-CPU map."""
    highest = Path("/sys/devices/system/cpu/possible").read_text().replace("-", ",").split(",")[-1]
    return int(highest) + 1


def _open(pin: Path, writable: bool) -> int:
    path = ctypes.create_string_buffer(os.fsencode(pin))
    attr = ctypes.create_string_buffer(_GET.pack(ctypes.addressof(path), 0, 0 if writable else _RDONLY), 128)
    fd = _libc.syscall(_number(), _OBJ_GET, attr, 128)
    if fd < 0:
        raise BpfError(f"opening the pin {pin}", ctypes.get_errno())
    os.set_inheritable(fd, False)
    return int(fd)


def _map_info(fd: int, pin: Path) -> tuple[int, ...]:
    info = ctypes.create_string_buffer(256)
    attr = ctypes.create_string_buffer(_INFO.pack(fd, len(info), ctypes.addressof(info)), 128)
    number = _call(_INFO_BY_FD, attr)
    if number:
        raise BpfError(f"asking what {pin} is", number)
    return _MAP_INFO.unpack_from(info)


def _call(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    """0 or the errno."""
    return ctypes.get_errno() if _libc.syscall(_number(), command, attr, 128) < 0 else 0


@functools.cache
def _number() -> int:
    machine = platform.machine()
    try:
        return _SYSCALL[machine]
    except KeyError:
        raise BpfError(f"bpf(2) on {machine}", errno.ENOSYS) from None
