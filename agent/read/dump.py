"""`weighbridge-agent read`: every cgroup of a tree as the kernel gives it, one line each, no metering."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from agent.read import parse
from agent.read.host import HostError, Mode, hierarchies

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


def _cgroup(mode: Mode, v2: Path | None, v1: dict[str, Path], path: str) -> dict[str, Any]:
    def text(base: Path | None, name: str) -> bytes | None:
        if base is None:
            return None
        try:
            with open(f"{base}{path if path != '/' else ''}/{name}", "rb") as file:
                return file.read(1 << 20)
        except OSError:
            return None

    def from_v1(controller: str, name: str) -> bytes | None:
        return text(v1.get(controller), name)

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    stat = parse.keyed(text(v2, "cpu.stat"))
    stat_v1 = parse.keyed(from_v1("cpu", "cpu.stat"))
    cpuacct = parse.keyed(from_v1("cpuacct", "cpuacct.stat"))
    memory_stat, memory_stat_v1 = text(v2, "memory.stat"), from_v1("memory", "memory.stat")
    io = parse.io_v2(text(v2, "io.stat"))
    if io is None:
        io = parse.io_v1(
            first(*(from_v1("blkio", f"blkio.{name}") for name in _SERVICE_BYTES)),
            first(*(from_v1("blkio", f"blkio.{name}") for name in _SERVICED)),
        )
    psi = {}
    for resource in ("cpu", "memory", "io"):
        some, full = parse.pressure(text(v2, f"{resource}.pressure"))
        psi[resource] = {"some_ns": some, "full_ns": full}
    return {
        "path": path,
        "mode": str(mode),
        "cpu_usage_ns": first(
            parse.microseconds(stat.get(b"usage_usec")), parse.number(from_v1("cpuacct", "cpuacct.usage"))
        ),
        "cpu_user_ns": first(
            parse.microseconds(stat.get(b"user_usec")),
            parse.number(from_v1("cpuacct", "cpuacct.usage_user")),
            parse.ticks(cpuacct.get(b"user")),
        ),
        "cpu_system_ns": first(
            parse.microseconds(stat.get(b"system_usec")),
            parse.number(from_v1("cpuacct", "cpuacct.usage_sys")),
            parse.ticks(cpuacct.get(b"system")),
        ),
        "cpu_periods": first(stat.get(b"nr_periods"), stat_v1.get(b"nr_periods")),
        "cpu_throttled_periods": first(stat.get(b"nr_throttled"), stat_v1.get(b"nr_throttled")),
        "cpu_throttled_ns": first(
            parse.microseconds(stat.get(b"throttled_usec")), stat_v1.get(b"throttled_time")
        ),
        "memory_current_bytes": first(
            parse.number(text(v2, "memory.current")), parse.number(from_v1("memory", "memory.usage_in_bytes"))
        ),
        "memory_peak_bytes": first(
            parse.number(text(v2, "memory.peak")),
            parse.number(from_v1("memory", "memory.max_usage_in_bytes")),
        ),
        "memory_inactive_file_bytes": first(
            parse.field(memory_stat, b"inactive_file"),
            parse.field(memory_stat_v1, b"total_inactive_file"),
            parse.field(memory_stat_v1, b"inactive_file"),
        ),
        "memory_limit_bytes": first(
            parse.limit(text(v2, "memory.max")), parse.limit(from_v1("memory", "memory.limit_in_bytes"))
        ),
        "oom_kills": first(
            parse.field(text(v2, "memory.events"), b"oom_kill"),
            parse.field(from_v1("memory", "memory.oom_control"), b"oom_kill"),
        ),
        "pids_current": first(
            parse.number(text(v2, "pids.current")), parse.number(from_v1("pids", "pids.current"))
        ),
        "io": None
        if io is None
        else {
            device: dict(zip(("read_bytes", "write_bytes", "read_ops", "write_ops"), values, strict=True))
            for device, values in io.items()
        },
        "psi": psi,
    }
