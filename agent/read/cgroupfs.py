"""cgroupfs -> snapshot, by kept file descriptors and pread.

Strategy. A walk finds units: it lists only directories that can contain new ones, and asks st_nlink first
(kernfs: number of subdirectories + 2). Each unit keeps its files open; a read of a file whose cgroup has
gone fails with ENODEV, and the unit is simply no longer in the snapshot. The inode of a cgroup directory
is its cgroup id (kernfs), so a directory made anew under the same path is another unit.

Bounds: at most `max_open_files` descriptors are kept, beyond that files are opened for each read; at most
MAX_UNITS units and MAX_DEPTH levels are walked, and what lies beyond makes the snapshot incomplete.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from agent.meter.model import MemorySample, Reading, Role, Snapshot
from agent.read import parse
from agent.read.plan import Plan
from agent.read.procfs import boot_id, cpu_total_ns

MAX_UNITS = 50_000
MAX_DEPTH = 64
READ_BYTES = 8_192
MAX_FILE_BYTES = 1 << 20
ROOT_ID = 1
RETRY_MISSING_EVERY = 30
"""Readings between two looks for a file that was not there (a controller enabled later)."""

_GONE = frozenset((errno.ENODEV, errno.ENOENT))
_ABSENT = frozenset((errno.ENODEV, errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL))

RoleOf = Callable[[str, bool], Role]


class _File:
    """One kernel file of a unit and its kept descriptor, -1 when it is not open."""

    __slots__ = ("fd", "missing_until", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.missing_until = 0


class _Unit:
    __slots__ = ("cgroup_id", "enclosing_id", "files", "path", "role")

    def __init__(self, cgroup_id: int, path: str, enclosing_id: int, role: Role) -> None:
        self.cgroup_id = cgroup_id
        self.path = path
        self.enclosing_id = enclosing_id
        self.role = role
        self.files: tuple[_File | None, ...] = ()


# Slots of _Unit.files.
_CPU, _CPU_USER, _CPU_SYSTEM, _THROTTLE, _MEMORY, _MEMORY_STAT, _MEMORY_PEAK, _MEMORY_LIMIT = range(8)
_OOM, _IO, _IO_OPS, _PIDS, _PIDS_PEAK, _PSI_CPU, _PSI_MEMORY, _PSI_IO = range(8, 16)


class CgroupReader:
    """Reads every unit of one host by one plan. Not thread-safe; one owner."""

    def __init__(self, plan: Plan, role: RoleOf, max_open_files: int = 60_000) -> None:
        self._plan = plan
        self._tree_prefix = f"{plan.tree}/"
        self._role = role
        self._max_open = max_open_files
        self._open = 0
        self._round = 0
        self._units: dict[int, _Unit] = {}
        self._complete = True
        self.cpu_source = plan.cpu_source
        """Where the host's own CPU time was read the last time."""
        self._root = _Unit(ROOT_ID, "/", ROOT_ID, Role.UNIT)
        self._root.files = self._files("", root=True)

    def read(self) -> Snapshot:
        """A snapshot of every unit. Units are read before the root, whose counters so cover theirs."""
        self._round += 1
        self._complete = True
        self._discover()
        units = []
        # Inner units come after the ones around them in the walk; reading backwards reads them first.
        for unit in reversed(list(self._units.values())):
            reading = self._reading(unit)
            if reading is None:
                self._forget(unit)
            else:
                units.append(reading)
        root = self._root_reading()
        return Snapshot(
            boot_id=boot_id(self._plan.proc_root),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            wall_unix_ns=time.time_ns(),
            root=root,
            units=units,
            complete=self._complete,
            nested_oom_kills=self._plan.memory_v2,
        )

    def sample_memory(self) -> list[MemorySample]:
        """Memory and pids of the host and the units of the last walk, by the descriptors at hand."""
        out = []
        for unit in (*self._units.values(), self._root):
            files = unit.files
            has_memory = self._there(files[_MEMORY])
            has_pids = unit is not self._root and self._there(files[_PIDS])
            if not has_memory and not has_pids:
                continue
            try:
                current = parse.number(self._text(files[_MEMORY])) if has_memory else None
                inactive = self._inactive(files) if has_memory else None
                pids = parse.number(self._text(files[_PIDS])) if has_pids else None
                out.append(MemorySample(unit.cgroup_id, current, inactive, pids))
            except _Gone:
                continue
        return out

    def close(self) -> None:
        for unit in (*self._units.values(), self._root):
            self._close_files(unit)
        self._units.clear()

    @property
    def open_files(self) -> int:
        return self._open

    def _discover(self) -> None:
        found: dict[int, _Unit] = {}
        base = str(self._plan.tree)
        stack: list[tuple[str, bool, int, int]] = [("", False, ROOT_ID, 0)]
        while stack:
            path, inside, enclosing, depth = stack.pop()
            try:
                with os.scandir(base + path) as entries:
                    children = [(e.name, e.inode(), e) for e in entries if e.is_dir(follow_symlinks=False)]
            except OSError as error:
                if error.errno not in _GONE:
                    # Not readable is not ended: what was known below stays until its own files say so.
                    self._complete = False
                    found |= {i: u for i, u in self._units.items() if u.path.startswith(f"{path}/")}
                continue
            children.sort(reverse=True, key=lambda child: child[0])
            for name, cgroup_id, entry in children:
                if len(found) >= MAX_UNITS or depth >= MAX_DEPTH:
                    self._complete = False
                    break
                child = f"{path}/{name}"
                unit = self._units.get(cgroup_id)
                if unit is None or unit.path != child:
                    unit = _Unit(cgroup_id, child, enclosing, self._role(child, inside))
                is_unit = unit.role is not Role.PASS
                if is_unit:
                    if not unit.files:
                        unit.files = self._files(child)
                    found[cgroup_id] = unit
                    if unit.role is Role.LEAF_UNIT:
                        continue
                try:
                    has_children = entry.stat(follow_symlinks=False).st_nlink != 2
                except OSError:
                    continue
                if has_children:
                    stack.append((child, inside or is_unit, cgroup_id if is_unit else enclosing, depth + 1))
        for cgroup_id, unit in self._units.items():
            if found.get(cgroup_id) is not unit:
                self._close_files(unit)
        self._units = found

    def _files(self, path: str, root: bool = False) -> tuple[_File | None, ...]:
        plan = self._plan
        files: list[_File | None] = [None] * 16

        def put(slot: int, base: Path | None, name: str) -> None:
            if base is not None:
                files[slot] = _File(f"{base}{path}/{name}")

        if plan.tree_is_v2:
            put(_CPU, plan.tree, "cpu.stat")
        else:
            put(_CPU, plan.tree, "cpuacct.usage")
            put(_CPU_USER, plan.tree, "cpuacct.usage_user")
            put(_CPU_SYSTEM, plan.tree, "cpuacct.usage_sys")
        if root and plan.root_cpuacct is not None:
            put(_CPU, plan.root_cpuacct, "cpuacct.usage")
            put(_CPU_USER, plan.root_cpuacct, "cpuacct.usage_user")
            put(_CPU_SYSTEM, plan.root_cpuacct, "cpuacct.usage_sys")
        if not root:
            put(_THROTTLE, plan.throttling_v1, "cpu.stat")
        if plan.memory_v2:
            for slot, name in (
                (_MEMORY, "memory.current"),
                (_MEMORY_STAT, "memory.stat"),
                (_MEMORY_PEAK, "memory.peak"),
                (_MEMORY_LIMIT, "memory.max"),
                (_OOM, "memory.events"),
            ):
                put(slot, plan.tree, name)
        else:
            for slot, name in (
                (_MEMORY, "memory.usage_in_bytes"),
                (_MEMORY_STAT, "memory.stat"),
                (_MEMORY_PEAK, "memory.max_usage_in_bytes"),
                (_MEMORY_LIMIT, "memory.limit_in_bytes"),
                (_OOM, "memory.oom_control"),
            ):
                put(slot, plan.memory_v1, name)
        if plan.io_v2:
            put(_IO, plan.tree, "io.stat")
        else:
            put(_IO, plan.io_v1, "blkio.throttle.io_service_bytes_recursive")
            put(_IO_OPS, plan.io_v1, "blkio.throttle.io_serviced_recursive")
        put(_PIDS, plan.tree if plan.pids_v2 else plan.pids_v1, "pids.current")
        put(_PIDS_PEAK, plan.tree if plan.pids_v2 else plan.pids_v1, "pids.peak")
        for slot, resource in ((_PSI_CPU, "cpu"), (_PSI_MEMORY, "memory"), (_PSI_IO, "io")):
            put(slot, plan.pressure, f"{resource}.pressure")
        return tuple(files)

    def _reading(self, unit: _Unit) -> Reading | None:
        """The unit's reading, or None when its cgroup has ended."""
        files, plan, text = unit.files, self._plan, self._text
        try:
            cpu_text = text(files[_CPU])
            if cpu_text is None and not os.path.isdir(f"{plan.tree}{unit.path}"):
                return None
            if plan.tree_is_v2:
                usage, user, system, periods, throttled, throttled_ns = parse.cpu_stat(cpu_text)
            else:
                usage = parse.number(cpu_text)
                user, system = parse.number(text(files[_CPU_USER])), parse.number(text(files[_CPU_SYSTEM]))
                periods = throttled = throttled_ns = None
            if periods is None and self._there(files[_THROTTLE]):
                stat = parse.keyed(text(files[_THROTTLE]))
                periods, throttled = stat.get(b"nr_periods"), stat.get(b"nr_throttled")
                throttled_ns = stat.get(b"throttled_time")
            oom = memory = inactive = peak = limit = None
            if self._there(files[_MEMORY]) and (memory_text := text(files[_MEMORY])) is not None:
                memory = parse.number(memory_text)
                inactive = self._inactive(files)
                peak = parse.number(text(files[_MEMORY_PEAK]))
                limit = parse.limit(text(files[_MEMORY_LIMIT]))
                oom = parse.field(text(files[_OOM]), b"oom_kill")
            io = None
            if self._there(files[_IO]) and (io_text := text(files[_IO])) is not None:
                io = parse.io_v2(io_text) if plan.io_v2 else parse.io_v1(io_text, text(files[_IO_OPS]))
                if io is None:
                    # The file is there and empty: no device has been used yet. It counts from here.
                    io = {}
            pids = pids_peak = None
            if self._there(files[_PIDS]) and (pids_text := text(files[_PIDS])) is not None:
                pids, pids_peak = parse.number(pids_text), parse.number(text(files[_PIDS_PEAK]))
            return Reading(
                unit.cgroup_id,
                unit.path,
                unit.enclosing_id,
                (
                    usage,
                    user,
                    system,
                    periods,
                    throttled,
                    throttled_ns,
                    oom,
                    *parse.pressure(text(files[_PSI_CPU])),
                    *parse.pressure(text(files[_PSI_MEMORY])),
                    *parse.pressure(text(files[_PSI_IO])),
                ),
                parse.whole_devices(io),
                memory,
                inactive,
                peak,
                limit,
                pids,
                pids_peak,
            )
        except _Gone:
            return None

    def _there(self, file: _File | None) -> bool:
        """Whether a controller's first file is worth a look: its others are absent where it is."""
        return file is not None and file.missing_until <= self._round

    def _inactive(self, files: tuple[_File | None, ...]) -> int | None:
        key = b"inactive_file" if self._plan.memory_v2 else b"total_inactive_file"
        return parse.field(self._text(files[_MEMORY_STAT]), key)

    def _root_reading(self) -> Reading:
        reading = self._reading(self._root)
        assert reading is not None, "the root cgroup does not end"
        counters = list(reading.counters)
        if self._plan.root_cpuacct is not None:
            files = self._root.files
            counters[:3] = (parse.number(self._text(files[slot])) for slot in (_CPU, _CPU_USER, _CPU_SYSTEM))
        elif counters[1] is not None and counters[2] is not None:
            # usage_usec of the root includes steal before Linux 6.14; user + system never does.
            counters[0] = counters[1] + counters[2]
        self.cpu_source = self._plan.cpu_source
        if counters[0] is None:
            counters[0] = cpu_total_ns(self._plan.proc_root)
            self.cpu_source = "/proc/stat"
        return Reading(
            ROOT_ID,
            "/",
            ROOT_ID,
            tuple(counters),
            reading.io,
            reading.memory_current_bytes,
            reading.memory_inactive_file_bytes,
        )

    def _text(self, file: _File | None) -> bytes | None:
        """The file's text; None when it cannot be read now. Raises _Gone when the *tree's* cgroup has ended:
        a cgroup missing from another hierarchy costs its fields only, since ended units never come back.
        """
        if file is None or file.missing_until > self._round:
            return None
        try:
            if file.fd >= 0:
                data = os.pread(file.fd, READ_BYTES, 0)
                return data if len(data) < READ_BYTES else _whole_file(file.fd)
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENODEV and file.path.startswith(self._tree_prefix):
                raise _Gone from None
            if error.errno not in _ABSENT:
                self._complete = False
            if file.fd < 0:
                file.missing_until = self._round + RETRY_MISSING_EVERY
            return None
        try:
            data = _whole_file(fd)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.ENODEV and file.path.startswith(self._tree_prefix):
                raise _Gone from None
            if error.errno not in _ABSENT:
                self._complete = False
            return None
        file.missing_until = 0
        if self._open < self._max_open:
            file.fd = fd
            self._open += 1
        else:
            os.close(fd)
        return data

    def _forget(self, unit: _Unit) -> None:
        self._close_files(unit)
        del self._units[unit.cgroup_id]

    def _close_files(self, unit: _Unit) -> None:
        for file in unit.files:
            if file is not None and file.fd >= 0:
                os.close(file.fd)
                file.fd = -1
                self._open -= 1


def _whole_file(fd: int) -> bytes:
    data = os.pread(fd, READ_BYTES, 0)
    while len(data) % READ_BYTES == 0 and data and len(data) < MAX_FILE_BYTES:
        more = os.pread(fd, READ_BYTES, len(data))
        if not more:
            break
        data += more
    return data


class _Gone(Exception):
    """The cgroup ended while it was being read."""
