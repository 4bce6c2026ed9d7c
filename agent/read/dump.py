"""`weighbridge-agent read`: every cgroup of a tree as the kernel gives it, one line each, no metering."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from agent.read import parse
from agent.read.host import HostError, Mode, hierarchies

T = TypeVar("T")

MAX_DEPTH = 256
# What blkio calls the same two counters, by I/O scheduler and age; with the cgroups below first.
_SCHEDULERS = ("throttle.", "bfq.", "")
_SERVICE_BYTES = [f"{s}io_service_bytes{below}" for s in _SCHEDULERS for below in ("_recursive", "")]
_SERVICED = [f"{s}io_serviced{below}" for s in _SCHEDULERS for below in ("_recursive", "")]


def dump_tree(cgroup_root: Path, out: TextIO, as_json: bool) -> int:
    """Print each cgroup below `cgroup_root`, the root first; returns how many.

    In v1 and hybrid layouts a line is the union of what the hierarchies say of one path. Names that are
    not UTF-8 are printed with \\udcXX escapes, as JSON allows.
    """
    mode, v2, v1 = hierarchies(cgroup_root)
    if mode is None:
        raise HostError(f"no cgroup hierarchy at {cgroup_root}: name the right place with --cgroup-root")
    roots = [root for root in (v2, *v1.values()) if root is not None]
    count = 0
    if not as_json:
        print(f"{'CPU s':>12} {'MEMORY MiB':>11} {'PIDS':>6}  CGROUP", file=out)
    for path in sorted(_paths(roots)):
        line = _cgroup(mode, v2, v1, path)
        count += 1
        if as_json:
            print(json.dumps(line), file=out)
        else:
            cpu, memory, pids = line["cpu_usage_ns"], line["memory_current_bytes"], line["pids_current"]
            print(
                f"{'-' if cpu is None else f'{cpu / 1e9:.3f}':>12}"
                f" {'-' if memory is None else f'{memory / 2**20:.1f}':>11}"
                f" {'-' if pids is None else pids:>6}  {ascii(path)[1:-1]}",
                file=out,
            )
    return count


def _paths(roots: list[Path]) -> set[str]:
    return {path for root in roots for path in _walk(str(root))}


def _walk(base: str) -> Iterator[str]:
    stack = [""]
    while stack:
        path = stack.pop()
        yield path or "/"
        if path.count("/") >= MAX_DEPTH:
            continue
        try:
            with os.scandir(base + path) as entries:
                stack.extend(f"{path}/{e.name}" for e in entries if e.is_dir(follow_symlinks=False))
        except OSError:
            continue


class _Files:
    """The files of one cgroup in all hierarchies; None where one is missing or cannot be read."""

    def __init__(self, v2: Path | None, v1: dict[str, Path], path: str) -> None:
        self._v2 = v2
        self._v1 = v1
        self._path = path if path != "/" else ""

    def v2(self, name: str) -> bytes | None:
        return self._text(self._v2, name)

    def v1(self, controller: str, name: str) -> bytes | None:
        return self._text(self._v1.get(controller), name)

    def _text(self, base: Path | None, name: str) -> bytes | None:
        if base is None:
            return None
        try:
            with open(f"{base}{self._path}/{name}", "rb") as file:
                return file.read(1 << 20)
        except OSError:
            return None


def _first(*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)


def _cgroup(mode: Mode, v2: Path | None, v1: dict[str, Path], path: str) -> dict[str, Any]:
    files = _Files(v2, v1, path)
    return {
        "path": path,
        "mode": str(mode),
        **_cpu(files),
        **_memory(files),
        "pids_current": _first(
            parse.number(files.v2("pids.current")), parse.number(files.v1("pids", "pids.current"))
        ),
        "io": _io(files),
        "psi": _psi(files),
    }


def _cpu(files: _Files) -> dict[str, int | None]:
    stat = parse.keyed(files.v2("cpu.stat"))
    stat_v1 = parse.keyed(files.v1("cpu", "cpu.stat"))
    cpuacct = parse.keyed(files.v1("cpuacct", "cpuacct.stat"))
    return {
        "cpu_usage_ns": _first(
            parse.microseconds(stat.get(b"usage_usec")), parse.number(files.v1("cpuacct", "cpuacct.usage"))
        ),
        "cpu_user_ns": _first(
            parse.microseconds(stat.get(b"user_usec")),
            parse.number(files.v1("cpuacct", "cpuacct.usage_user")),
            parse.ticks(cpuacct.get(b"user")),
        ),
        "cpu_system_ns": _first(
            parse.microseconds(stat.get(b"system_usec")),
            parse.number(files.v1("cpuacct", "cpuacct.usage_sys")),
            parse.ticks(cpuacct.get(b"system")),
        ),
        "cpu_periods": _first(stat.get(b"nr_periods"), stat_v1.get(b"nr_periods")),
        "cpu_throttled_periods": _first(stat.get(b"nr_throttled"), stat_v1.get(b"nr_throttled")),
        "cpu_throttled_ns": _first(
            parse.microseconds(stat.get(b"throttled_usec")), stat_v1.get(b"throttled_time")
        ),
    }


def _memory(files: _Files) -> dict[str, int | None]:
    stat, stat_v1 = files.v2("memory.stat"), files.v1("memory", "memory.stat")
    return {
        "memory_current_bytes": _first(
            parse.number(files.v2("memory.current")),
            parse.number(files.v1("memory", "memory.usage_in_bytes")),
        ),
        "memory_peak_bytes": _first(
            parse.number(files.v2("memory.peak")),
            parse.number(files.v1("memory", "memory.max_usage_in_bytes")),
        ),
        "memory_inactive_file_bytes": _first(
            parse.field(stat, b"inactive_file"),
            parse.field(stat_v1, b"total_inactive_file"),
            parse.field(stat_v1, b"inactive_file"),
        ),
        "memory_limit_bytes": _first(
            parse.limit(files.v2("memory.max")), parse.limit(files.v1("memory", "memory.limit_in_bytes"))
        ),
        "oom_kills": _first(
            parse.field(files.v2("memory.events"), b"oom_kill"),
            parse.field(files.v1("memory", "memory.oom_control"), b"oom_kill"),
        ),
    }


def _io(files: _Files) -> dict[str, dict[str, int | None]] | None:
    io = parse.io_v2(files.v2("io.stat"))
    if io is None:
        io = parse.io_v1(
            _first(*(files.v1("blkio", f"blkio.{name}") for name in _SERVICE_BYTES)),
            _first(*(files.v1("blkio", f"blkio.{name}") for name in _SERVICED)),
        )
    if io is None:
        return None
    return {
        device: dict(zip(("read_bytes", "write_bytes", "read_ops", "write_ops"), values, strict=True))
        for device, values in io.items()
    }


def _psi(files: _Files) -> dict[str, dict[str, int | None]]:
    found = {}
    for resource in ("cpu", "memory", "io"):
        some, full = parse.pressure(files.v2(f"{resource}.pressure"))
        found[resource] = {"some_ns": some, "full_ns": full}
    return found
