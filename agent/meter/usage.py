"""Readings -> usage. Pure: previous baseline + snapshot -> usage rows + next baseline.

Strategy. Each unit's kernel counters are subtracted from its last ones (`_raw`). Counters of a cgroup
include the units nested in it, so each raw difference is taken off the enclosing unit's; what is left of
the root is the host's own row. What an inner unit was counted for beyond its enclosing one (counters are
read one after another; a v2 root is counted by the timer tick) is carried as a deficit into the next
interval, so that no row is negative and nothing is forgiven.

Invariants, checked by property tests:
  sum of rows == root's difference + change of the deficits       (per additive measure, to the unit)
  sum of an incarnation's rows + opening == its last reading      (a unit without nested units)
  intervals of a stream do not overlap; end > start

Failure model. The caller commits the next baseline together with the batches made of the rows. If it
cannot, it calls `hold`: the rows are kept in the baseline and merged into the next interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from agent.meter.memory import NS_PER_SECOND, MemoryTrack
from agent.meter.model import COUNTER_BITS, COUNTERS, Counters, DeviceCounters, Reading, Snapshot
from wire.measures import BIT, MEASURES
from wire.v1 import usage_pb2 as pb

ROOT_ID = 1
FOLDED_ID = 0

_SUBTRACTED = tuple(
    COUNTERS.index(name) for name in ("cpu_usage_ns", "cpu_user_ns", "cpu_system_ns", "oom_kills")
)
"""Counters that include nested units. Throttling, pressure and peaks are a cgroup's own."""
_CPU = COUNTERS.index("cpu_usage_ns")
_MAY_LAG = frozenset((COUNTERS.index("cpu_user_ns"), COUNTERS.index("cpu_system_ns")))
"""The kernel scales these two to fit the usage (cputime_adjust); they may step back and then catch up."""
_IO_BITS = tuple(BIT[name] for name in ("io_read_bytes", "io_write_bytes", "io_read_ops", "io_write_ops"))
_IO_KNOWN = sum(1 << bit for bit in _IO_BITS)
_MEMORY, _WORKING_SET, _MEMORY_ERROR = (
    BIT[name]
    for name in ("memory_byte_seconds", "memory_working_set_byte_seconds", "memory_error_byte_seconds")
)
_MEMORY_PEAK, _PIDS_PEAK = BIT["memory_peak_bytes"], BIT["pids_peak"]
_MAXIMA = (_MEMORY_PEAK, _PIDS_PEAK)
_NO_IO: DeviceCounters = (0, 0, 0, 0)
_NOTHING = (0,) * len(_SUBTRACTED)
_MEASURE_COUNT = len(MEASURES)
MAX_KEPT_UNSEEN = 50_000
"""Units remembered while a reading is incomplete; beyond, the longest unseen are taken to have ended."""
MAX_GAPS = 64
_CLOCK_TOLERANCE_NS = 50_000_000
_CLOCK_SLEW_PPM = 600
"""The kernel slews at most 500 ppm (adjtimex MAXFREQ) around the crystal's own error."""


class Usage(msgspec.Struct, array_like=True):
    """What one unit used over an interval. `values[k]` is measure k, 0 where bit k of `known` is clear."""

    tenant: str
    cgroup_id: int
    path: str
    flags: int
    known: int
    values: list[int]
    devices: dict[str, DeviceCounters]
    opens: bool
    """First row of the incarnation in its epoch: the counters it starts from go into the batch."""
    counters_before: Counters
    io_before: dict[str, DeviceCounters] | None


class Gap(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of wall time in which something could not be measured."""

    start_unix_ns: int
    end_unix_ns: int
    reason: int
    count: int
    detail: str


class Interval(msgspec.Struct, frozen=True, array_like=True):
    """[start, end) in wall clock; `duration_ns` in CLOCK_BOOTTIME."""

    start_unix_ns: int
    end_unix_ns: int
    duration_ns: int
    flags: int


class Stretch(msgspec.Struct, array_like=True):
    """Rows of one interval of one boot."""

    boot_id: str
    interval: Interval
    usages: list[Usage]
    host_cpu_usage_ns: int
    cpu_deficit_ns: int


class UnitState(msgspec.Struct, array_like=True):
    """What is remembered of a unit between two intervals."""

    reading: Reading
    """Last known value of every field: a field that is unreadable once keeps its older value here."""
    memory: MemoryTrack
    tenant: str
    opened: bool
    """Its opening has been written in this epoch."""
    carry: tuple[int, ...] = _NOTHING
    """<= 0 per subtracted counter: counted in inner units before it was counted here."""
    io_carry: dict[str, DeviceCounters] = {}
    memory_carry_byte_ns: tuple[int, int, int] = (0, 0, 0)
    """Remainders below one byte-second, or what inner units had more: memory, working set, error."""


class Baseline(msgspec.Struct):
    """Where metering stands: everything the next step needs. One msgpack blob in the spool."""

    boot_id: str
    boottime_ns: int
    wall_unix_ns: int
    """Wall clock at the last snapshot, as read."""
    end_unix_ns: int
    """End of the last interval, as written into the batches."""
    sources: str
    """Signature of the plan the counters were read by."""
    root: UnitState
    units: dict[int, UnitState]
    held: list[Stretch] = []
    """Rows that could not be committed. The last is merged with the next interval unless the host rebooted."""
    gaps: list[Gap] = []


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often the agent means to read. All in nanoseconds of CLOCK_BOOTTIME."""

    interval_ns: int
    longest_sample_gap_ns: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of one interval, and the baseline that must become durable together with them."""

    stretches: list[Stretch]
    """In time's order. The last ends with the snapshot; others are of earlier boots and could not be committed."""
    gaps: list[Gap]
    baseline: Baseline

    @property
    def interval(self) -> Interval:
        return self.stretches[-1].interval

    @property
    def usages(self) -> list[Usage]:
        """Rows of the last stretch."""
        return self.stretches[-1].usages


TenantOf = Callable[[Reading], str]


def begin(snapshot: Snapshot, sources: str, tenant_of: TenantOf, gaps: list[Gap]) -> Baseline:
    """The first baseline of an epoch whose past is unknown: usage counts from this snapshot on."""
    return Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=snapshot.boottime_ns,
        wall_unix_ns=snapshot.wall_unix_ns,
        end_unix_ns=snapshot.wall_unix_ns,
        sources=sources,
        root=_first_state(snapshot.root, tenant_of(snapshot.root), snapshot.boottime_ns),
        units={r.cgroup_id: _first_state(r, tenant_of(r), snapshot.boottime_ns) for r in snapshot.units},
        gaps=gaps,
    )


def reopen(baseline: Baseline, gaps: list[Gap]) -> Baseline:
    """The baseline for a new epoch whose past is known: every unit writes an opening again."""
    for state in (baseline.root, *baseline.units.values()):
        state.opened = False
    for usage in (usage for stretch in baseline.held for usage in stretch.usages):
        usage.opens = usage.cgroup_id != FOLDED_ID
    baseline.gaps = [*baseline.gaps, *gaps]
    return baseline


def rebase(baseline: Baseline, snapshot: Snapshot, sources: str, tenant_of: TenantOf) -> Baseline:
    """Go on with counters from other sources: `snapshot` was read by the new plan right after a `step` by
    the old one. Carries and memory remainders stay; each unit opens anew, at the new source's counters.
    """
    fresh = begin(snapshot, sources, tenant_of, [])
    for old in (baseline.root, *baseline.units.values()):
        new = fresh.root if old is baseline.root else fresh.units.get(old.reading.cgroup_id)
        _hand_over(old, new or fresh.root)
        if new is not None:
            new.memory, new.memory_carry_byte_ns = old.memory, old.memory_carry_byte_ns
    return msgspec.structs.replace(baseline, sources=sources, root=fresh.root, units=fresh.units)


def observe(
    baseline: Baseline, boottime_ns: int, samples: Mapping[int, tuple[int | None, ...]], cadence: Cadence
) -> None:
    """Extend the memory integrals by samples taken between snapshots.

    `samples`: cgroup id -> (memory_current_bytes, memory_inactive_file_bytes, pids_current). In memory
    only: after a crash the stretch since the last commit is one trapezoid, marked as estimated.
    """
    for cgroup_id, (current, inactive, pids) in samples.items():
        state = baseline.units.get(cgroup_id)
        if state is not None:
            state.memory.add(boottime_ns, current, inactive, pids, cadence.longest_sample_gap_ns)


def step(previous: Baseline, snapshot: Snapshot, tenant_of: TenantOf, cadence: Cadence) -> Outcome:
    """Usage between the previous baseline and this snapshot.

    Units not in the baseline were born since (the baseline held every unit of its moment), so they are
    counted from zero. A row's tenant is the one at the start of the interval: a change of owner takes
    effect where the interval is cut, which is here.
    """
    if snapshot.boot_id != previous.boot_id:
        previous = _after_reboot(previous, snapshot)
    interval = _interval(previous, snapshot, cadence)
    gap_ns = cadence.longest_sample_gap_ns

    states: dict[int, UnitState] = {}
    rows: dict[int, _Row] = {}
    for reading in (*snapshot.units, snapshot.root):
        known_as = previous.root if reading.cgroup_id == ROOT_ID else previous.units.get(reading.cgroup_id)
        born = known_as is None
        state = known_as or _born(reading, tenant_of(reading), previous.boottime_ns)
        row = _raw(state, reading, snapshot.boottime_ns, gap_ns)
        if born:
            row.flags |= pb.ROW_FLAG_PARTIAL
        rows[reading.cgroup_id] = row
        states[reading.cgroup_id] = row.next_state
    unseen = [state for cgroup_id, state in previous.units.items() if cgroup_id not in states]
    if not snapshot.complete:
        # Not seen is not ended when something could not be looked at: what comes back must go on from its
        # last counters, never from zero.
        unseen.sort(key=lambda state: state.memory.boottime_ns)
        kept = unseen[-MAX_KEPT_UNSEEN:]
        states |= {state.reading.cgroup_id: state for state in kept}
        unseen = unseen[:-MAX_KEPT_UNSEEN]
    for state in unseen:
        rows[state.reading.cgroup_id] = _ended(state)

    _subtract_nested(rows)
    usages = [row.finish() for row in rows.values()]
    _hand_up_carries(rows, states)

    for cgroup_id, state in states.items():
        if cgroup_id in previous.units or cgroup_id == ROOT_ID:
            state.tenant = tenant_of(state.reading)
    root = states.pop(ROOT_ID)
    baseline = Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=snapshot.boottime_ns,
        wall_unix_ns=snapshot.wall_unix_ns,
        end_unix_ns=interval.end_unix_ns,
        sources=previous.sources,
        root=root,
        units=states,
    )
    stretch = Stretch(
        boot_id=snapshot.boot_id,
        interval=interval,
        usages=usages,
        host_cpu_usage_ns=rows[ROOT_ID].host_cpu_ns,
        cpu_deficit_ns=-sum(s.carry[0] for s in (root, *states.values())),
    )
    stretches = [*previous.held, stretch]
    if previous.held and previous.held[-1].boot_id == snapshot.boot_id:
        stretches[-2:] = [_merge(previous.held[-1], stretch, cadence)]
    return Outcome(stretches, _few(previous.gaps), baseline)


def hold(outcome: Outcome, fold_ended: bool) -> Baseline:
    """The baseline to go on with when the rows could not be committed: they wait in it.

    With `fold_ended`, units that ended are added up per tenant (cgroup id 0), so that what waits is
    bounded by the living units and the tenants.
    """
    usages = outcome.usages
    if fold_ended:
        living = [u for u in usages if not u.flags & pb.ROW_FLAG_FINAL and u.cgroup_id != FOLDED_ID]
        folded: dict[str, Usage] = {}
        for usage in usages:
            if usage.cgroup_id == FOLDED_ID or usage.flags & pb.ROW_FLAG_FINAL:
                lump = folded.get(usage.tenant)
                if lump is None:
                    folded[usage.tenant] = msgspec.structs.replace(
                        usage,
                        cgroup_id=FOLDED_ID,
                        path="",
                        devices={},
                        opens=False,
                        counters_before=(),
                        io_before=None,
                        values=list(usage.values),
                    )
                else:
                    _add(lump, usage)
                    lump.devices = {}
        usages = [*living, *folded.values()]
    baseline = outcome.baseline
    baseline.held = [*outcome.stretches[:-1], msgspec.structs.replace(outcome.stretches[-1], usages=usages)]
    baseline.gaps = outcome.gaps
    return baseline


class _Row:
    """A row while nested units are being subtracted. Integrals are in byte-nanoseconds until `finish`."""

    __slots__ = ("devices", "enclosing_id", "flags", "host_cpu_ns", "memory", "next_state", "state", "usage")

    def __init__(self, state: UnitState, next_state: UnitState, usage: Usage, memory: MemoryTrack) -> None:
        self.state = state
        self.next_state = next_state
        self.usage = usage
        self.flags = usage.flags
        self.enclosing_id = state.reading.enclosing_id
        self.memory: list[int | None] = [memory.byte_ns, memory.working_set_byte_ns, memory.error_byte_ns]
        self.devices: dict[str, list[int]] | None = None
        self.host_cpu_ns = usage.values[COUNTER_BITS[_CPU]]

    def finish(self) -> Usage:
        usage, state, after = self.usage, self.state, self.next_state
        values = usage.values
        if self.devices is not None or any(state.carry) or state.io_carry or min(values) < 0:
            self._settle_deficits()
        carry = list(state.memory_carry_byte_ns)
        for slot, bit in enumerate((_MEMORY, _WORKING_SET, _MEMORY_ERROR)):
            total = self.memory[slot]
            if total is None or (slot == 2 and self.memory[0] is None):
                continue
            total += carry[slot]
            values[bit] = max(0, total) // NS_PER_SECOND
            carry[slot] = total - values[bit] * NS_PER_SECOND
            usage.known |= 1 << bit
        after.memory_carry_byte_ns = (carry[0], carry[1], carry[2])
        usage.flags = self.flags
        return usage

    def _settle_deficits(self) -> None:
        usage, state = self.usage, self.state
        carry = list(state.carry)
        for slot, counter in enumerate(_SUBTRACTED):
            bit = COUNTER_BITS[counter]
            total = usage.values[bit] + carry[slot]
            usage.values[bit] = max(0, total)
            carry[slot] = min(0, total)
        self.next_state.carry = tuple(carry)
        if self.devices is not None or state.io_carry:
            devices: dict[str, DeviceCounters] = {}
            io_carry: dict[str, DeviceCounters] = {}
            own = self.devices if self.devices is not None else {k: list(v) for k, v in usage.devices.items()}
            for device in own.keys() | state.io_carry.keys():
                old = state.io_carry.get(device, _NO_IO)
                total4 = [a + b for a, b in zip(own.get(device, _NO_IO), old, strict=True)]
                if any(v > 0 for v in total4):
                    devices[device] = _four([max(0, v) for v in total4])
                if any(v < 0 for v in total4):
                    io_carry[device] = _four([min(0, v) for v in total4])
            usage.devices, self.next_state.io_carry = devices, io_carry
            _set_io(usage.values, devices)


def _raw(state: UnitState, reading: Reading, boottime_ns: int, longest_gap_ns: int) -> _Row:
    """Difference of one unit's reading to its state, nested units still included."""
    before = state.reading
    values = [0] * _MEASURE_COUNT
    known = 0
    flags = 0
    kept: list[int | None] | None = None
    index = -1
    for old, new, bit in zip(before.counters, reading.counters, COUNTER_BITS, strict=False):
        index += 1
        if new is None or old is None:
            if old is not None:
                kept = kept or list(reading.counters)
                kept[index] = old
            continue
        delta = new - old
        if delta < 0:
            if index in _MAY_LAG:
                kept = kept or list(reading.counters)
                kept[index], delta = old, 0
            else:
                delta = new
                flags |= pb.ROW_FLAG_COUNTER_RESET
        values[bit] = delta
        known |= 1 << bit
    io = reading.io
    devices: dict[str, DeviceCounters] = {}
    if io is None:
        io = before.io
    elif before.io is not None:
        known |= _IO_KNOWN
        if io:
            devices, reset = _io_deltas(before.io, io)
            flags |= reset
            _set_io(values, devices)
        if before.io.keys() - io.keys():
            # A device that is gone for now (unplugged, or its line unreadable once) keeps its counters.
            io = {**before.io, **io}

    memory = state.memory
    memory.add(
        boottime_ns,
        reading.memory_current_bytes,
        reading.memory_inactive_file_bytes,
        reading.pids_current,
        longest_gap_ns,
    )
    known |= _peaks(values, memory, before, reading)
    if memory.estimated and memory.byte_ns is not None:
        flags |= pb.ROW_FLAG_MEMORY_ESTIMATED

    if kept is not None or io is not reading.io:
        reading = msgspec.structs.replace(
            reading, io=io, counters=tuple(kept) if kept is not None else reading.counters
        )
    usage = Usage(
        state.tenant,
        reading.cgroup_id,
        reading.path,
        flags,
        known,
        values,
        devices,
        not state.opened,
        before.counters,
        before.io,
    )
    next_state = UnitState(reading, memory.restarted(), state.tenant, True, state.carry, state.io_carry)
    return _Row(state, next_state, usage, memory)


def _ended(state: UnitState) -> _Row:
    """The last row of a unit whose end nobody saw: what memory was sampled since its last reading."""
    reading, memory = state.reading, state.memory
    values = [0] * _MEASURE_COUNT
    known = sum(1 << COUNTER_BITS[i] for i, value in enumerate(reading.counters) if value is not None)
    if reading.io is not None:
        known |= _IO_KNOWN
    known |= _peaks(values, memory, reading, reading)
    flags = pb.ROW_FLAG_FINAL | pb.ROW_FLAG_TAIL_UNSEEN | pb.ROW_FLAG_PARTIAL
    usage = Usage(
        state.tenant,
        reading.cgroup_id,
        reading.path,
        flags,
        known,
        values,
        {},
        not state.opened,
        reading.counters,
        reading.io,
    )
    next_state = UnitState(reading, memory.restarted(), state.tenant, True, state.carry, state.io_carry)
    return _Row(state, next_state, usage, memory)


def _peaks(values: list[int], memory: MemoryTrack, before: Reading, reading: Reading) -> int:
    """Set the maxima within the interval and return their bits. A lifetime peak counts only if it rose."""
    known = 0
    for bit, sampled, old, new in (
        (_MEMORY_PEAK, memory.peak_bytes, before.memory_peak_bytes, reading.memory_peak_bytes),
        (_PIDS_PEAK, memory.pids_peak, before.pids_peak, reading.pids_peak),
    ):
        if sampled is not None:
            values[bit] = max(sampled, new) if new is not None and old is not None and new > old else sampled
            known |= 1 << bit
    return known


def _io_deltas(
    before: dict[str, DeviceCounters], now: dict[str, DeviceCounters]
) -> tuple[dict[str, DeviceCounters], int]:
    devices: dict[str, DeviceCounters] = {}
    flags = 0
    for device, counters in now.items():
        old = before.get(device, _NO_IO)
        if counters == old:
            continue
        delta = [b - a for a, b in zip(old, counters, strict=True)]
        if min(delta) < 0:
            # The device was replaced under the same number: its counters started from zero.
            delta, flags = list(counters), int(pb.ROW_FLAG_COUNTER_RESET)
        devices[device] = _four(delta)
    return devices, flags


def _subtract_nested(rows: Mapping[int, _Row]) -> None:
    """Take each unit's raw difference off the unit around it, so that each level keeps only its own."""
    raw = [
        (row, [row.usage.values[COUNTER_BITS[i]] for i in _SUBTRACTED], list(row.memory))
        for row in rows.values()
    ]
    for row, counters, memory in raw:
        if row.usage.cgroup_id == ROOT_ID:
            continue
        for index, counter in zip(_SUBTRACTED, counters, strict=True):
            if counter:
                # Also from an outer counter that could not be read this once: its next difference covers this
                # time too, and until then it carries a deficit.
                around = _around(rows, row, _COUNTS[index])
                if around is not None:
                    around.usage.values[COUNTER_BITS[index]] -= counter
        for slot in (0, 1):
            inner = memory[slot]
            if inner:
                around = _around(rows, row, _INTEGRATES[slot])
                if around is not None:
                    around.memory[slot] = (around.memory[slot] or 0) - inner
        if row.usage.devices:
            around = _around(rows, row, _counts_io)
            if around is None:
                continue
            if around.devices is None:
                around.devices = {device: list(v) for device, v in around.usage.devices.items()}
            for device, delta in row.usage.devices.items():
                own = around.devices.setdefault(device, [0, 0, 0, 0])
                for k in range(4):
                    own[k] -= delta[k]


def _counts(index: int) -> Callable[[_Row], bool]:
    def can_tell(row: _Row) -> bool:
        counters = row.state.reading.counters
        return index < len(counters) and counters[index] is not None

    return can_tell


def _integrates(slot: int) -> Callable[[_Row], bool]:
    return lambda row: row.memory[slot] is not None


def _counts_io(row: _Row) -> bool:
    return row.state.reading.io is not None


_COUNTS = {index: _counts(index) for index in _SUBTRACTED}
_INTEGRATES = {slot: _integrates(slot) for slot in (0, 1)}


def _around(rows: Mapping[int, _Row], row: _Row, can_tell: Callable[[_Row], bool]) -> _Row | None:
    """The nearest enclosing unit that can tell the quantity at all, so that it includes the inner one's."""
    while row.usage.cgroup_id != ROOT_ID:
        row = rows.get(row.enclosing_id) or rows[ROOT_ID]
        if can_tell(row):
            return row
    return None


def _hand_up_carries(rows: Mapping[int, _Row], living: Mapping[int, UnitState]) -> None:
    """What an ended unit still carries goes to the nearest living unit around it: nothing is forgiven."""
    for cgroup_id, row in rows.items():
        ended = row.next_state
        if cgroup_id in living:
            continue
        heir_id = row.enclosing_id
        while heir_id not in living:
            heir_id = rows[heir_id].enclosing_id if heir_id in rows else ROOT_ID
        heir = living[heir_id]
        _hand_over(ended, heir)
        if heir.memory.current_bytes is not None:
            a, b = heir.memory_carry_byte_ns, ended.memory_carry_byte_ns
            heir.memory_carry_byte_ns = (a[0] + b[0], a[1] + b[1], a[2])


def _hand_over(ended: UnitState, heir: UnitState) -> None:
    """Add the deficits of one unit to those of another."""
    heir.carry = tuple(a + b for a, b in zip(heir.carry, ended.carry, strict=True))
    if ended.io_carry:
        heir.io_carry = dict(heir.io_carry)
        for device, owed in ended.io_carry.items():
            old = heir.io_carry.get(device, _NO_IO)
            heir.io_carry[device] = _four([a + b for a, b in zip(old, owed, strict=True)])


def _interval(previous: Baseline, snapshot: Snapshot, cadence: Cadence) -> Interval:
    """Bounds of the interval that ends with this snapshot.

    The end is the wall clock, written as the multiple of the interval it was meant to be when it is less
    than a tenth of an interval past it. The start is the previous end, whatever the clock did.
    """
    duration = snapshot.boottime_ns - previous.boottime_ns
    wall = snapshot.wall_unix_ns
    aligned = wall - wall % cadence.interval_ns
    end = aligned if wall - aligned < cadence.interval_ns // 10 else wall
    flags = 0
    drift = (wall - previous.wall_unix_ns) - duration
    tolerance = _CLOCK_TOLERANCE_NS + duration * _CLOCK_SLEW_PPM // 1_000_000
    if drift > tolerance:
        flags |= pb.BATCH_FLAG_CLOCK_STEPPED_FORWARD
    if drift < -tolerance:
        flags |= pb.BATCH_FLAG_CLOCK_STEPPED_BACK
    start = previous.end_unix_ns
    if end <= start:
        # The wall clock is behind what was written already (or two readings share one boundary): time in
        # the record stands almost still until the clock has caught up. The duration remains true.
        end = start + 1
    if duration > cadence.interval_ns * 3 // 2:
        flags |= pb.BATCH_FLAG_LONG_INTERVAL
    if previous.boottime_ns == 0:
        flags |= pb.BATCH_FLAG_AFTER_REBOOT
    return Interval(start, end, max(1, duration), flags)


def _after_reboot(previous: Baseline, snapshot: Snapshot) -> Baseline:
    """The baseline of the new boot: everything counts from zero at the boot; what came before is a gap."""
    booted = max(snapshot.wall_unix_ns - snapshot.boottime_ns, previous.end_unix_ns)
    lost = Gap(
        previous.end_unix_ns,
        booted,
        pb.GAP_REASON_REBOOT,
        len(previous.units),
        f"boot {snapshot.boot_id} follows {previous.boot_id}",
    )
    root = _born(snapshot.root, previous.root.tenant, 0)
    for state in (previous.root, *previous.units.values()):
        # What was billed ahead of the host's counter is still owed, and the host's own row pays it.
        _hand_over(state, root)
    return Baseline(
        boot_id=snapshot.boot_id,
        boottime_ns=0,
        wall_unix_ns=snapshot.wall_unix_ns - snapshot.boottime_ns,
        end_unix_ns=booted,
        sources=previous.sources,
        root=root,
        units={},
        held=previous.held,
        gaps=[*previous.gaps, lost],
    )


def _few(gaps: list[Gap]) -> list[Gap]:
    """At most MAX_GAPS: the rest become one that spans them."""
    if len(gaps) <= MAX_GAPS:
        return gaps
    rest = gaps[MAX_GAPS - 1 :]
    lump = Gap(
        min(gap.start_unix_ns for gap in rest),
        max(gap.end_unix_ns for gap in rest),
        rest[-1].reason,
        sum(max(1, gap.count) for gap in rest),
        f"{len(rest)} gaps in one, the last: {rest[-1].detail}",
    )
    return [*gaps[: MAX_GAPS - 1], lump]


def _first_state(reading: Reading, tenant: str, boottime_ns: int) -> UnitState:
    memory = MemoryTrack(boottime_ns, reading.memory_current_bytes, reading.memory_inactive_file_bytes)
    return UnitState(reading, memory, tenant, opened=False)


def _born(reading: Reading, tenant: str, boottime_ns: int) -> UnitState:
    """The state of a unit at a time when it did not exist: all that is known of it now was 0 then."""
    zero = msgspec.structs.replace(
        reading,
        counters=tuple(None if value is None else 0 for value in reading.counters),
        io=None if reading.io is None else {},
        memory_current_bytes=None if reading.memory_current_bytes is None else 0,
        memory_inactive_file_bytes=None if reading.memory_inactive_file_bytes is None else 0,
        memory_peak_bytes=None if reading.memory_peak_bytes is None else 0,
        pids_peak=None if reading.pids_peak is None else 0,
    )
    return _first_state(zero, tenant, boottime_ns)


def _merge(earlier: Stretch, later: Stretch, cadence: Cadence) -> Stretch:
    """One interval out of two that follow one another; rows of the same unit and tenant are added."""
    first, second = earlier.interval, later.interval
    duration = first.duration_ns + second.duration_ns
    long = pb.BATCH_FLAG_LONG_INTERVAL if duration > cadence.interval_ns * 3 // 2 else 0
    merged = {(u.cgroup_id, u.tenant): u for u in earlier.usages}
    for usage in later.usages:
        known = merged.get((usage.cgroup_id, usage.tenant))
        if known is None:
            merged[usage.cgroup_id, usage.tenant] = usage
        else:
            _add(known, usage)
    return Stretch(
        boot_id=later.boot_id,
        interval=Interval(
            first.start_unix_ns, second.end_unix_ns, duration, first.flags | second.flags | long
        ),
        usages=list(merged.values()),
        host_cpu_usage_ns=earlier.host_cpu_usage_ns + later.host_cpu_usage_ns,
        cpu_deficit_ns=later.cpu_deficit_ns,
    )


def _add(total: Usage, later: Usage) -> None:
    """Add a later stretch of the same unit. A measure is known of the whole if it is known of either part."""
    for bit, value in enumerate(later.values):
        if bit in _MAXIMA:
            total.values[bit] = max(total.values[bit], value)
        else:
            total.values[bit] += value
    total.known |= later.known
    total.flags |= later.flags
    for device, delta in later.devices.items():
        old = total.devices.get(device, _NO_IO)
        total.devices[device] = _four([a + b for a, b in zip(old, delta, strict=True)])


def _four(values: list[int]) -> DeviceCounters:
    return (values[0], values[1], values[2], values[3])


def _set_io(values: list[int], devices: dict[str, DeviceCounters]) -> None:
    for slot, bit in enumerate(_IO_BITS):
        values[bit] = sum(delta[slot] for delta in devices.values())
