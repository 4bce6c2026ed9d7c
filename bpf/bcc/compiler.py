"""bcc, in a process of its own: it brings a whole compiler into memory, and needs it for a second."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import kernel

_MOST_DESCRIPTORS, _MOST_BYTES, _MOST_SECONDS = 16, 65_536, 120
_TRACING = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_PARANOID, _MOST_PARANOID_UPSTREAM = Path("/proc/sys/kernel/perf_event_paranoid"), 2
"""Debian's and Ubuntu's kernels have levels above, with which CAP_PERFMON does not do."""
_BUILT = Path(__file__).parent.parent
"""Where records.h and the text that both engines share are."""


class Refused(Exception):
    """The reason, for the operator."""


class Kind(Enum):
    """The names bcc has for them."""

    TRACEPOINT = "TRACEPOINT"
    RAW_TRACEPOINT = "RAW_TRACEPOINT"
    CGROUP_SKB = "CGROUP_SKB"


@dataclass(frozen=True)
class Text:
    """One file of programs, and the tracepoints that are to be opened for them."""

    file: str
    programs: tuple[tuple[str, Kind], ...]
    tracepoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """Descriptors, in the order of the text."""

    programs: list[int]
    events: list[int]


def load(text: Text, maps: Mapping[str, kernel.Map], verbose: bool) -> Loaded:
    """Compile and load; attached to nothing yet. Refused with what the compiler or the kernel says."""
    fds = _apart(lambda: _load(text, maps), verbose)
    return Loaded(fds[: len(text.programs)], fds[len(text.programs) :])


def _load(text: Text, maps: Mapping[str, kernel.Map]) -> list[int]:
    tracing = _tracing() if text.tracepoints else None
    try:
        from bcc import BPF
    except ImportError as error:
        raise Refused(f"what `import bcc` finds is not python3-bpfcc's ({error})") from error
    flags = [f"-I{_BUILT}"]
    for name, held in maps.items():
        flags += [f"-DFD_{name}={held.fd}", f"-DROOM_{name}={held.room}"]
    built = BPF(src_file=str(_BUILT / "bcc" / text.file).encode(), cflags=flags)
    programs = [built.load_func(name.encode(), getattr(BPF, kind.value)).fd for name, kind in text.programs]
    events = []
    for tracepoint in text.tracepoints:
        assert tracing is not None
        events.append(_event(tracing / "events" / tracepoint))
    return [*programs, *events]


def _event(tracepoint: Path) -> int:
    try:
        return kernel.tracepoint_event(int((tracepoint / "id").read_text()))
    except PermissionError as error:
        level = int(_PARANOID.read_text())
        if level <= _MOST_PARANOID_UPSTREAM:
            raise
        raise Refused(
            f"kernel.perf_event_paranoid is {level}, by which this distribution's kernel wants CAP_SYS_ADMIN for"
            f" tracepoints: sysctl kernel.perf_event_paranoid={_MOST_PARANOID_UPSTREAM}, or add that capability to the"
            f" unit's CapabilityBoundingSet; then load again"
        ) from error


def _tracing() -> Path:
    """tracefs, which says how a tracepoint's record is laid out."""
    for directory in _TRACING:
        if (directory / "events").is_dir():
            return directory
    try:
        kernel.mount_for_this_process("tracefs", _TRACING[0])
    except OSError as error:
        raise Refused(
            f"tracefs is not mounted, and cannot be ({error}): mount -t tracefs tracefs {_TRACING[0]}"
        ) from error
    return _TRACING[0]


def _apart(work: Callable[[], list[int]], verbose: bool) -> list[int]:
    """Have `work` done by a child, and take over the descriptors it made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            ours.close()
            _answer(work, theirs, None if verbose else said.fileno())
        theirs.close()
        ours.settimeout(_MOST_SECONDS)
        try:
            message, fds, _, _ = socket.recv_fds(ours, _MOST_BYTES, _MOST_DESCRIPTORS)
        except socket.timeout as error:
            os.kill(child, signal.SIGKILL)
            raise Refused(f"the compiler was not done after {_MOST_SECONDS} s") from error
        finally:
            _, status = os.waitpid(child, 0)
        if not message:
            raise Refused(f"the compiler ended with status {status}")
        reason = json.loads(message)
        if reason is not None:
            said.seek(0)
            raise Refused(_first_error(said.read(_MOST_BYTES).decode(errors="replace")) or reason)
    return fds


def _answer(work: Callable[[], list[int]], to: socket.socket, stderr: int | None) -> None:
    """Does not return."""
    try:
        kernel.end_with_parent()
        if stderr is not None:
            # What bcc and clang have to say goes there unasked.
            os.dup2(stderr, 2)
        fds = work()
        socket.send_fds(to, [b"null"], fds)
    except Exception as error:  # noqa: BLE001 the edge of a process: whatever it is, the parent reports it.
        to.send(json.dumps(str(error)).encode())
    finally:
        os._exit(0)


def _first_error(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if "error:" in line), "")
