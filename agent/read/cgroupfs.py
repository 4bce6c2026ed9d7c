"""cgroupfs -> snapshot, by kept file descriptors and pread.

Strategy. A walk finds units: it lists only directories that can contain new ones, and asks st_nlink first
(kernfs: number of subdirectories + 2). Each unit keeps its files open; a read of a file whose cgroup has
gone fails with ENODEV, and the unit is simply no longer in the snapshot. The inode of a cgroup directory
is its cgroup id (kernfs), so a directory made anew under the same path is another unit.

Where the kernel probes walk the cgroups themselves, a unit's row replaces the files it knows the content of, field by
field, and ids that come and go replace the walk over directories; which is made all the same now and then.

Bounds: at most `max_open_files` descriptors are kept (`kept_files`); at most MAX_UNITS units and MAX_DEPTH levels
are walked, and what lies beyond makes the snapshot incomplete.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.meter.model import DeviceCounters, MemorySample, ProbeMark, Reading, Role, Snapshot
from agent.read import parse
from agent.read.kept_files import GONE, File, Gone, KeptFiles
from agent.read.plan import Plan
from agent.read.probes import as_files
from agent.read.probes.bpf import BpfError
from agent.read.probes.ends import Ends, Seen
from agent.read.probes.reader import Probes
from agent.read.probes.records import FLAGS, LEVEL, PARENT_ID, Knows, RawRow
from agent.read.probes.units import UnitPaths
from agent.read.procfs import boot_id, cpu_total_ns

MAX_UNITS = 50_000
MAX_DEPTH = 64
ROOT_ID = 1
WALK_DIRECTORIES_EVERY = 60
"""Readings, where the probes tell of births and ends: to find what they may have had no room for."""

_ROW_CPU, _ROW_MEMORY, _ROW_PIDS, _ROW_PRESSURE = (
    int(bit) for bit in (Knows.CPU, Knows.MEMORY, Knows.PIDS, Knows.PRESSURE)
)
_ROW_USUAL = _ROW_CPU | _ROW_MEMORY | _ROW_PIDS | _ROW_PRESSURE

RoleOf = Callable[[str, bool], Role]


class _Unit:
    __slots__ = ("cgroup_id", "enclosing_id", "files", "no_files_until", "path", "quota_below", "role")

    def __init__(self, cgroup_id: int, path: str, enclosing_id: int, role: Role) -> None:
        self.cgroup_id = cgroup_id
        self.path = path
        self.enclosing_id = enclosing_id
        self.role = role
        self.quota_below = False
        """Whether the cgroup with this unit's quota was read one level below it."""
        self.files: tuple[File | None, ...] = ()
        self.no_files_until = 0
        """Until that reading none of _FILES_BESIDE_ROWS is worth a look."""


# Slots of _Unit.files.
_CPU, _CPU_USER, _CPU_SYSTEM, _THROTTLE, _MEMORY, _MEMORY_STAT, _MEMORY_PEAK, _MEMORY_LIMIT = range(8)
_OOM, _IO, _IO_OPS, _PIDS, _PIDS_PEAK, _PSI_CPU, _PSI_MEMORY, _PSI_IO = range(8, 16)

_FILES_BESIDE_ROWS = (_THROTTLE, _MEMORY, _IO, _PIDS)
"""The first file of each controller that may be mounted as v1, or that a row does not hold the content of."""


class CgroupReader:
    """Reads every unit of one host by one plan. Not thread-safe; one owner."""

    def __init__(
        self, plan: Plan, role: RoleOf, max_open_files: int = 60_000, probes: Probes | None = None
    ) -> None:
        self._plan = plan
        self.probes = probes or Probes(None)
        self._paths = UnitPaths(role)
        self._ends = Ends(self.probes, self._paths)
        self._walked: frozenset[int] = frozenset()
        """Ids of the last snapshot that was walked by the probes."""
        self._forgettable: list[int] = []
        self._role = role
        self._kept = KeptFiles(str(plan.tree), max_open_files)
        self._text, self._there = self._kept.text, self._kept.there
        self._units: dict[int, _Unit] = {}
        self.cpu_source = plan.cpu_source
        """Where the host's own CPU time was read the last time."""
        self._root = _Unit(ROOT_ID, "/", ROOT_ID, Role.UNIT)
        self._root.files = self._files("", root=True)

    def read(self, known: frozenset[int] = frozenset()) -> Snapshot:
        """A snapshot of every unit. Living units are read first, then ends, and the root last, whose counters so
        cover theirs. `known`: ids of units that were in an earlier snapshot and have not ended since.
        """
        self._kept.begin()
        begun = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        rows = self._rows()
        self._discover(rows)
        units: dict[int, Reading] = {}
        # Inner units come after the ones around them in the walk; reading backwards reads them first.
        for cgroup_id, unit in reversed(list(self._units.items())):
            reading = self._reading(unit, rows.get(cgroup_id) if rows is not None else None)
            if reading is None:
                self._forget(unit)
            else:
                units[cgroup_id] = reading
        seen = self._see(units, known, rows)
        mark, unloaded = self._marks()
        root = self._root_reading()
        self.probes.settle()
        return Snapshot(
            boot_id=boot_id(self._plan.proc_root),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            wall_unix_ns=time.time_ns(),
            root=root,
            units=list(units.values()),
            complete=self._kept.complete,
            nested_oom_kills=self._plan.memory_v2,
            ends=seen.ends,
            seen_boottime_ns=begun,
            networks=seen.networks,
            probes=mark,
            unloaded=unloaded,
        )

    def forget_ends(self, closed: Iterable[int]) -> int:
        """What was read last is durable: the kernel may forget the ends of these units, and what else ended."""
        try:
            return self.probes.forget([*closed, *self._forgettable])
        except BpfError as error:
            self.probes.drop(error)
            return 0

    def sample_memory(self) -> list[MemorySample]:
        """Memory and pids of the host and the units of the last walk, by the descriptors at hand."""
        out = []
        for unit in (*self._units.values(), self._root):
            if unit.no_files_until > self._kept.round:
                continue
            files = unit.files
            has_memory = self._there(files[_MEMORY])
            has_pids = unit is not self._root and self._there(files[_PIDS])
            if not has_memory and not has_pids:
                continue
            try:
                current = parse.number(self._text(files[_MEMORY])) if has_memory else None
                inactive = self._inactive(files) if has_memory else None
                pids = parse.number(self._text(files[_PIDS])) if has_pids else None
            except Gone:
                continue
            # Files that were never opened are not there after the cgroup's end, which is no size of its memory.
            if current is not None or pids is not None:
                out.append(MemorySample(unit.cgroup_id, current, inactive, pids))
        return out

    def close(self) -> None:
        """The probes stay open: they are their owner's."""
        for unit in (*self._units.values(), self._root):
            self._kept.close(unit.files)
        self._units.clear()

    @property
    def open_files(self) -> int:
        return self._kept.open

    def _rows(self) -> dict[int, RawRow] | None:
        """What the probes saw walking all cgroups just now."""
        if not self._plan.tree_is_v2:
            return None
        self.probes.look()
        try:
            if not self.probes.flushes_by_itself:
                self._have_flushed()
            return self.probes.rows()
        except (BpfError, OSError):
            return None

    def _have_flushed(self) -> None:
        """Whoever reads a cpu.stat has the kernel settle the counters of all that lies below."""
        with os.scandir(self._plan.tree) as entries:
            top = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in top:
            with contextlib.suppress(OSError), open(f"{path}/cpu.stat", "rb") as file:
                file.read()

    def _see(self, units: dict[int, Reading], known: frozenset[int], rows: dict[int, RawRow] | None) -> Seen:
        """Ends and traffic. Units that turn out to have ended leave the living ones."""
        living = {cgroup_id: reading.path for cgroup_id, reading in units.items()}
        try:
            seen = self._ends.read(living, known, rows, self._kept.complete)
        except BpfError as error:
            # Whoever ended is not seen now, and must not be taken for lost.
            self._kept.complete = False
            self.probes.drop(error)
            return Seen()
        for end in seen.ends:
            if units.pop(end.reading.cgroup_id, None) is not None:
                self._forget(self._units[end.reading.cgroup_id])
        self._forgettable = seen.forgettable
        return seen

    def _marks(self) -> tuple[ProbeMark | None, list[ProbeMark]]:
        try:
            return self.probes.marks()
        except BpfError as error:
            self.probes.drop(error)
            return None, []

    def _discover(self, rows: dict[int, RawRow] | None) -> None:
        due = self._kept.round % WALK_DIRECTORIES_EVERY == 1
        if rows is None or due or not self.probes.watches_ends or not self._follow(rows):
            self._walk_directories()
        self._walked = frozenset(rows or ())

    def _follow(self, rows: dict[int, RawRow]) -> bool:
        """Take up the units born since the last walk of the probes; False if somebody's birth is not known."""
        born = rows.keys() - self._walked
        for cgroup_id in sorted(born, key=lambda i: rows[i][LEVEL]):
            if cgroup_id in self._units:
                continue
            try:
                birth = self.probes.birth(cgroup_id)
            except BpfError:
                return False
            if birth is None or birth.flags & Knows.PATH_CUT or birth.level > MAX_DEPTH:
                return False
            if self._paths.is_unit(birth.path):
                if len(self._units) >= MAX_UNITS:
                    return False
                parent_id = birth.parent_id
                while parent_id not in self._units and parent_id in rows:
                    parent_id = rows[parent_id][PARENT_ID]
                enclosing_id = parent_id if parent_id in self._units else ROOT_ID
                role = self._role(birth.path, enclosing_id != ROOT_ID)
                unit = _Unit(cgroup_id, birth.path, enclosing_id, role)
                unit.files = self._files(birth.path)
                self._units[cgroup_id] = unit
        for cgroup_id in self._walked - rows.keys():
            unit_gone = self._units.get(cgroup_id)
            if unit_gone is not None:
                self._forget(unit_gone)
        return True

    def _walk_directories(self) -> None:
        found: dict[int, _Unit] = {}
        base = str(self._plan.tree)
        stack: list[tuple[str, bool, int, int]] = [("", False, ROOT_ID, 0)]
        while stack:
            path, inside, enclosing, depth = stack.pop()
            try:
                with os.scandir(base + path) as entries:
                    children = [(e.name, e.inode(), e) for e in entries if e.is_dir(follow_symlinks=False)]
            except OSError as error:
                if error.errno not in GONE:
                    # Not readable is not ended: what was known below stays until its own files say so.
                    self._kept.complete = False
                    found |= {i: u for i, u in self._units.items() if u.path.startswith(f"{path}/")}
                continue
            children.sort(reverse=True, key=lambda child: child[0])
            for name, cgroup_id, entry in children:
                if len(found) >= MAX_UNITS or depth >= MAX_DEPTH:
                    self._kept.complete = False
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
                self._kept.close(unit.files)
        self._units = found

    def _files(self, path: str, root: bool = False) -> tuple[File | None, ...]:
        plan = self._plan
        files: list[File | None] = [None] * 16

        def put(slot: int, base: Path | None, name: str) -> None:
            if base is not None:
                files[slot] = File(f"{base}{path}/{name}")

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
        if not root and plan.throttling_v1 is not None:
            put(_THROTTLE, plan.throttling_v1, "cpu.stat")
        elif path.endswith(".scope"):
            put(_THROTTLE, plan.tree if plan.tree_is_v2 else None, "container/cpu.stat")
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

    def _reading(self, unit: _Unit, row: RawRow | None) -> Reading | None:
        """The unit's reading, or None when its cgroup has ended. What the row knows is not read from files."""
        knows = 0
        told: tuple[int | None, ...] = ()
        if row is not None:
            knows, told = row[FLAGS], as_files.counters(row)
            if knows & _ROW_USUAL == _ROW_CPU | _ROW_PRESSURE and unit.no_files_until > self._kept.round:
                return Reading(unit.cgroup_id, unit.path, unit.enclosing_id, told)
        files = unit.files
        try:
            cpu = self._cpu(unit, told[:6] if knows & _ROW_CPU else None)
            if cpu is None:
                return None
            memory, inactive, peak, limit, kills = self._memory(files, row if knows & _ROW_MEMORY else None)
            pids, pids_peak = self._pids(files, row if knows & _ROW_PIDS else None)
            pressure = told[7:] if knows & _ROW_PRESSURE else self._pressure(files)
            reading = Reading(
                unit.cgroup_id,
                unit.path,
                unit.enclosing_id,
                (*cpu, kills, *pressure),
                self._io(files),
                memory,
                inactive,
                peak,
                limit,
                pids,
                pids_peak,
            )
        except Gone:
            return None
        unit.no_files_until = min(
            f.missing_until for slot in _FILES_BESIDE_ROWS if (f := files[slot]) is not None
        )
        return reading

    def _cpu(self, unit: _Unit, told: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
        """Usage, user, system; periods, throttled periods, throttled time. None: the cgroup has ended."""
        files, text = unit.files, self._text
        if told is not None:
            cpu = told
        else:
            cpu_text = text(files[_CPU])
            if cpu_text is None and not os.path.isdir(f"{self._plan.tree}{unit.path}"):
                return None
            if self._plan.tree_is_v2:
                cpu = parse.cpu_stat(cpu_text)
            else:
                user, system = parse.number(text(files[_CPU_USER])), parse.number(text(files[_CPU_SYSTEM]))
                cpu = (parse.number(cpu_text), user, system, None, None, None)
        if self._plan.throttling_v1 is None:
            if not cpu[3] and files[_THROTTLE] is not None:
                cpu = (*cpu[:3], *self._quota_below(unit, cpu[3:]))
        elif cpu[3] is None and self._there(files[_THROTTLE]):
            stat = parse.keyed(text(files[_THROTTLE]))
            cpu = (*cpu[:3], stat.get(b"nr_periods"), stat.get(b"nr_throttled"), stat.get(b"throttled_time"))
        return cpu

    def _memory(self, files: tuple[File | None, ...], row: RawRow | None) -> tuple[int | None, ...]:
        """Current, inactive file, peak, limit; OOM kills."""
        if row is not None and self._plan.memory_v2:
            memory, peak, limit = as_files.memory(row)
            return memory, self._inactive(files), peak, limit, as_files.counters(row)[6]
        text = self._text
        if not self._there(files[_MEMORY]) or (memory_text := text(files[_MEMORY])) is None:
            return None, None, None, None, None
        return (
            parse.number(memory_text),
            self._inactive(files),
            parse.number(text(files[_MEMORY_PEAK])),
            parse.limit(text(files[_MEMORY_LIMIT])),
            parse.field(text(files[_OOM]), b"oom_kill"),
        )

    def _io(self, files: tuple[File | None, ...]) -> dict[str, DeviceCounters] | None:
        if not self._there(files[_IO]) or (io_text := self._text(files[_IO])) is None:
            return None
        v2 = self._plan.io_v2
        io = parse.io_v2(io_text) if v2 else parse.io_v1(io_text, self._text(files[_IO_OPS]))
        # The file is there and empty: no device has been used yet. It counts from here.
        return {} if io is None else parse.whole_devices(io)

    def _pids(self, files: tuple[File | None, ...], row: RawRow | None) -> tuple[int | None, int | None]:
        if row is not None and self._plan.pids_v2:
            return as_files.pids(row)
        if not self._there(files[_PIDS]) or (pids_text := self._text(files[_PIDS])) is None:
            return None, None
        return parse.number(pids_text), parse.number(self._text(files[_PIDS_PEAK]))

    def _pressure(self, files: tuple[File | None, ...]) -> tuple[int | None, ...]:
        text, pressure = self._text, parse.pressure
        cpu, memory = pressure(text(files[_PSI_CPU])), pressure(text(files[_PSI_MEMORY]))
        return *cpu, *memory, *pressure(text(files[_PSI_IO]))

    def _quota_below(self, unit: _Unit, own: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Periods, throttled periods and throttled ns of a scope without a quota of its own.

        crun with systemd's cgroups puts what it limits into `container`, one level below the scope. That one
        ends first, and then the numbers are unknown: the scope's own zero would be a counter that fell.
        """
        try:
            text = self._text(unit.files[_THROTTLE])
        except Gone:
            text = None
        if text is None:
            return (None, None, None) if unit.quota_below else own
        unit.quota_below = True
        return parse.cpu_stat(text)[3:]

    def _inactive(self, files: tuple[File | None, ...]) -> int | None:
        key = b"inactive_file" if self._plan.memory_v2 else b"total_inactive_file"
        return parse.field(self._text(files[_MEMORY_STAT]), key)

    def _root_reading(self) -> Reading:
        reading = self._reading(self._root, None)
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

    def _forget(self, unit: _Unit) -> None:
        self._kept.close(unit.files)
        del self._units[unit.cgroup_id]
