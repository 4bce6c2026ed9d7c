"""What this host offers: probed by looking and trying, never by a version number.

Everything hangs off two roots (`--cgroup-root`, `--proc-root`), so that the same code reads a fixture, the
host from inside a container, and the host itself.
"""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.errors import AgentError
from agent.meter.model import ClockState

CONTROLLERS_V1 = ("cpu", "cpuacct", "memory", "blkio", "pids")
OTHER_FILES = 256
_V2_FILES = ("cgroup.procs", "cpu.stat", "memory.current", "io.stat", "pids.current", "cpu.pressure")
_TIME_ERROR = 5
_STA_UNSYNC = 0x0040


class HostError(AgentError):
    """This host cannot be metered as it is; the message names the fix."""


class Mode(StrEnum):
    V1 = "v1"
    V2 = "v2"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One probe of the host. Paths are directories; `v1` has a key per controller that is mounted."""

    mode: Mode
    proc_root: Path
    v2: Path | None
    v2_controllers: frozenset[str]
    v1: dict[str, Path]
    populated_v1_cpuacct: bool
    """cpuacct has cgroups that the v2 hierarchy has not: containers of an older runtime."""
    boot_id: str
    cpus: int
    host: str
    kernel: str
    pressure: bool
    privileged: bool


def probe(cgroup_root: Path, proc_root: Path) -> HostFacts:
    """Look at the two roots. HostError if there is no cgroup hierarchy at all."""
    mode, v2, v1 = hierarchies(cgroup_root)
    if mode is None:
        raise HostError(
            f"no cgroup hierarchy at {cgroup_root}: mount one (mount -t cgroup2 none /sys/fs/cgroup) or name"
            " the right place with --cgroup-root"
        )
    controllers = _words(v2 / "cgroup.controllers") if v2 else frozenset()
    return HostFacts(
        mode=mode,
        proc_root=proc_root,
        v2=v2,
        v2_controllers=controllers,
        v1=v1,
        populated_v1_cpuacct=_only_in_v1(v1.get("cpuacct"), v2),
        boot_id=_text(proc_root / "sys/kernel/random/boot_id") or "unknown",
        cpus=online_cpus(proc_root),
        host=os.uname().nodename,
        kernel=os.uname().release,
        pressure=v2 is not None and ((v2 / "cpu.pressure").exists() or (proc_root / "pressure/cpu").exists()),
        privileged=os.geteuid() == 0,
    )


def hierarchies(cgroup_root: Path) -> tuple[Mode | None, Path | None, dict[str, Path]]:
    """(mode, v2 directory, v1 directory per controller), decided by the files that are there."""
    if (cgroup_root / "cgroup.controllers").is_file():
        return Mode.V2, cgroup_root, {}
    v2 = cgroup_root / "unified"
    found_v2 = v2 if (v2 / "cgroup.controllers").is_file() or (v2 / "cgroup.procs").is_file() else None
    v1: dict[str, Path] = {}
    try:
        entries = sorted(entry for entry in cgroup_root.iterdir() if entry.is_dir())
    except OSError:
        entries = []
    for entry in entries:
        for controller in entry.name.split(","):
            if controller in CONTROLLERS_V1 and entry != found_v2:
                # A mount point of its own name wins over a combined one; both show the same hierarchy.
                v1[controller] = entry if entry.name == controller else v1.get(controller, entry)
    if v1:
        return (Mode.HYBRID if found_v2 else Mode.V1), found_v2, v1
    if found_v2 is None and _looks_like_v2(cgroup_root):
        found_v2 = cgroup_root
    return (Mode.V2, found_v2, {}) if found_v2 else (None, None, {})


def _looks_like_v2(directory: Path) -> bool:
    """A part of a v2 tree, or a copy of one, that came without cgroup.controllers."""
    return any(next(directory.glob(f"{level}{name}"), None) for level in ("", "*/") for name in _V2_FILES)


def files_to_keep_open(wanted: int) -> int:
    """How many descriptors may be kept for readings: the soft limit is raised as far as the hard one allows,
    and OTHER_FILES stay free for the spool, the collector and the local port.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed and soft != hard:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(0, min(wanted, soft - OTHER_FILES))


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), up to what is read here, padded beyond its real size."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock_state() -> tuple[ClockState, int | None]:
    """The kernel's view of its wall clock and its largest error in ns. Reading needs no privilege."""
    timex = _Timex()
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        return ClockState.UNKNOWN, None
    if state < 0:
        return ClockState.UNKNOWN, None
    unsynchronised = state == _TIME_ERROR or timex.status & _STA_UNSYNC
    return (ClockState.UNSYNCHRONISED if unsynchronised else ClockState.SYNCHRONISED), timex.maxerror * 1_000


def _only_in_v1(cpuacct: Path | None, v2: Path | None) -> bool:
    """Whether cpuacct has a populated cgroup, two levels deep at most, whose path v2 lacks."""
    if cpuacct is None:
        return False
    for pattern in ("*/", "*/*/"):
        for directory in cpuacct.glob(pattern):
            path = directory.relative_to(cpuacct)
            if _text(directory / "cgroup.procs") and (v2 is None or not (v2 / path).is_dir()):
                return True
    return False


def online_cpus(proc_root: Path) -> int:
    """Logical CPUs that run now; they may come and go."""
    text = _text(proc_root / "stat") or ""
    return (
        sum(1 for line in text.split("\n") if line.startswith("cpu") and line[3:4].isdigit())
        or os.cpu_count()
        or 1
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _words(path: Path) -> frozenset[str]:
    return frozenset((_text(path) or "").split())
