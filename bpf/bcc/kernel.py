"""System calls that Python has no names for: bpf(2), perf_event_open(2), and a mount nobody else sees."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

_BPF, _PERF_EVENT_OPEN = {"x86_64": (321, 298), "aarch64": (280, 241)}.get(platform.machine(), (0, 0))

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_OBJ_PIN, _OBJ_GET, _PROG_RUN, _OBJ_INFO = 6, 7, 10, 15
_LINK_CREATE, _LINK_UPDATE = 28, 29

_ARRAY = 2
CGROUP_INGRESS, CGROUP_EGRESS = 0, 1
_PERF_EVENT = 41
ANY, NOEXIST, EXIST = 0, 1, 2

_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_IOC_SET_BPF, _PERF_IOC_ENABLE = 0x4004_2408, 0x2400
_CLONE_NEWNS = 0x0002_0000
_MS_NOSUID_NODEV_NOEXEC, _MS_REC_PRIVATE = 0xE, 0x4_4000

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class Map:
    """A map by its descriptor, which it owns. Keys and values are bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = ctypes.create_string_buffer(96)
        _bpf(_OBJ_INFO, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)), "map info")
        _, _, self.key_bytes, self.value_bytes, self.room = struct.unpack_from("=5I", info)

    def lookup(self, key: bytes) -> bytes | None:
        """Of a map that is not per CPU."""
        value = ctypes.create_string_buffer(self.value_bytes)
        try:
            self._element(_MAP_LOOKUP, key, value, 0)
        except FileNotFoundError:
            return None
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        assert (len(key), len(value)) == (self.key_bytes, self.value_bytes)
        self._element(_MAP_UPDATE, key, ctypes.create_string_buffer(value, len(value)), flags)

    def delete(self, key: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._element(_MAP_DELETE, key, None, 0)

    def all_keys(self) -> Iterator[bytes]:
        """While others change the map a key may come twice, so its room bounds the walk."""
        following = ctypes.create_string_buffer(self.key_bytes)
        before = None
        for _ in range(self.room):
            try:
                self._element(_MAP_NEXT_KEY, before, following, 0)
            except FileNotFoundError:
                return
            before = following.raw
            yield before

    def _element(
        self, command: int, key: bytes | None, value: ctypes.Array[ctypes.c_char] | None, flags: int
    ) -> None:
        held = None if key is None else ctypes.create_string_buffer(key, len(key))
        at = [0 if buffer is None else ctypes.addressof(buffer) for buffer in (held, value)]
        _bpf(command, struct.pack("=I4xQQQ", self.fd, *at, flags), "map element")


def create_array(name: str, value_bytes: int) -> Map:
    """Of one element."""
    # type, key, value, room, flags, inner map, NUMA node, name
    attr = struct.pack("=IIIIIII16s", _ARRAY, 4, value_bytes, 1, 0, 0, 0, name.encode())
    return Map(_bpf(_MAP_CREATE, attr, f"map {name}"))


def pin(fd: int, path: Path) -> None:
    text = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("=QI", ctypes.addressof(text), fd), str(path))


def pinned(path: Path) -> int:
    """A descriptor of what is pinned there; FileNotFoundError if nothing is."""
    text = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, struct.pack("=QII", ctypes.addressof(text), 0, 0), str(path))


def link_to_cgroup(program: int, cgroup: int, direction: int) -> int:
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program, cgroup, direction, 0), "cgroup link")


def link_to_event(program: int, event: int) -> int:
    """Kernel 5.15 ("bpf: Add bpf_link for perf event"); OSError before."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program, event, _PERF_EVENT, 0), "tracepoint link")


def exchange_program(link: int, program: int) -> None:
    """At once: every event is seen by exactly one of the two."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0), "cgroup link")


def run_raw_tracepoint(program: int, arguments: Sequence[int]) -> None:
    """As if the tracepoint had fired."""
    context = ctypes.create_string_buffer(struct.pack(f"={len(arguments)}Q", *arguments))
    size = 8 * len(arguments)
    # program, return value, data sizes and addresses, repetitions, duration, context sizes and addresses
    attr = struct.pack("=IIIIQQIIIIQQ", program, 0, 0, 0, 0, 0, 0, 0, size, 0, ctypes.addressof(context), 0)
    _bpf(_PROG_RUN, attr, "program run")


def misses_of(program: int) -> int:
    """How often it should have run and could not, since it was loaded. 0 on kernels that do not say."""
    lines = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return int(said.get("recursion_misses", 0))


def tracepoint_event(tracepoint_id: int) -> int:
    """A perf event of a tracepoint. A program on it sees the events of all CPUs, whichever it was opened on."""
    # type, size, config, sample_period, sample_type; the rest is 0.
    attr = ctypes.create_string_buffer(
        struct.pack("=IIQQ", _PERF_TYPE_TRACEPOINT, 112, tracepoint_id, 1), 112
    )
    fd = _libc.syscall(_PERF_EVENT_OPEN, attr, -1, 0, -1, _PERF_FLAG_FD_CLOEXEC)
    return _checked(fd, "perf_event_open")


def attach_to_event(program: int, event: int) -> None:
    """Until the event's descriptor is closed."""
    _checked(_libc.ioctl(event, _PERF_IOC_SET_BPF, program), "tracepoint")
    _checked(_libc.ioctl(event, _PERF_IOC_ENABLE, 0), "tracepoint")


def mount_for_this_process(filesystem: str, directory: Path) -> None:
    """In a mount namespace of the caller's own: nothing is left behind."""
    _checked(_libc.unshare(_CLONE_NEWNS), "unshare")
    _checked(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "mount")
    kind = filesystem.encode()
    _checked(_libc.mount(kind, os.fsencode(directory), kind, _MS_NOSUID_NODEV_NOEXEC, None), str(directory))


def end_with_parent() -> None:
    """For a process that was just forked."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def _bpf(command: int, attr: bytes, what: str) -> int:
    buffer = ctypes.create_string_buffer(attr, 144)
    return _checked(_libc.syscall(_BPF, command, buffer, len(buffer)), what)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
