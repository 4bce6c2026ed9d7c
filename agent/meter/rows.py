"""One unit's row: its state, its reading, and the difference of the two. Pure.

A row is made with nested units still in it (`raw`), then nested units are taken off (`nesting`), then it is
finished. What falls below zero is carried to the unit's next row, so no row is negative.
"""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from agent.meter.memory import NS_PER_SECOND, MemoryTrack
from agent.meter.model import COUNTER_BITS, COUNTERS, Counters, DeviceCounters, End, Reading
from wire.measures import BIT, MEASURES
from wire.v1 import usage_pb2 as pb

ROOT_ID = 1
FOLDED_ID = 0
NO_SAMPLE = -1
"""Instead of a time: the reading does not tell memory, and what was sampled before stands."""

SUBTRACTED = tuple(
    COUNTERS.index(name) for name in ("cpu_usage_ns", "cpu_user_ns", "cpu_system_ns", "oom_kills")
)
"""Counters that include nested units. Throttling, pressure and peaks are a cgroup's own."""
_SUBTRACTED_BITS = tuple(COUNTER_BITS[index] for index in SUBTRACTED)
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
NO_IO: DeviceCounters = (0, 0, 0, 0)
_NOTHING = (0,) * len(SUBTRACTED)
_NO_CARRY = (0, 0, 0)
_MEASURE_COUNT = len(MEASURES)
_COUNTER_MASKS = tuple(1 << bit for bit in COUNTER_BITS)


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
    memory_carry_byte_ns: tuple[int, int, int] = _NO_CARRY
    """Remainders below one byte-second: memory, working set, error."""
    memory_carry_byte_seconds: tuple[int, int, int] = _NO_CARRY
    """<= 0: what inner units had more, in whole byte-seconds so that it fits into 64 bits."""
    from_birth: bool = False
    """Whether all of its life was seen, so that a counter that appears later has counted this life alone."""

    def memory_carried_byte_ns(self) -> list[int]:
        """Both parts of the carry in one number each."""
        (x, y, z), whole = self.memory_carry_byte_ns, self.memory_carry_byte_seconds
        if whole == _NO_CARRY:
            return [x, y, z]
        return [whole[0] * NS_PER_SECOND + x, whole[1] * NS_PER_SECOND + y, whole[2] * NS_PER_SECOND + z]

    def carry_memory(self, totals_byte_ns: list[int]) -> None:
        x, y, z = totals_byte_ns
        if x >= 0 and y >= 0 and z >= 0:
            self.memory_carry_byte_seconds, self.memory_carry_byte_ns = _NO_CARRY, (x, y, z)
            return
        (a, x), (b, y), (c, z) = (divmod(total, NS_PER_SECOND) for total in totals_byte_ns)
        self.memory_carry_byte_seconds, self.memory_carry_byte_ns = (a, b, c), (x, y, z)


class Row:
    """A row while nested units are being subtracted. Integrals are in byte-nanoseconds until `finish`."""

    __slots__ = ("devices", "enclosing_id", "flags", "host_cpu_ns", "memory", "next_state", "state", "usage")

    def __init__(self, state: UnitState, next_state: UnitState, usage: Usage, memory: MemoryTrack) -> None:
        self.state = state
        self.next_state = next_state
        self.usage = usage
        self.flags = usage.flags
        self.enclosing_id = state.reading.enclosing_id
        self.memory = memory.integrals_byte_ns()
        self.devices: dict[str, list[int]] | None = None
        self.host_cpu_ns = usage.values[COUNTER_BITS[_CPU]]

    def finish(self) -> Usage:
        usage, state, after = self.usage, self.state, self.next_state
        values = usage.values
        if (
            self.devices is not None
            or state.carry != _NOTHING
            or state.io_carry
            or min(values[bit] for bit in _SUBTRACTED_BITS) < 0
        ):
            self._settle_deficits()
        usage.flags = self.flags
        if self.memory[0] is None and self.memory[1] is None:
            after.memory_carry_byte_ns = state.memory_carry_byte_ns
            after.memory_carry_byte_seconds = state.memory_carry_byte_seconds
            return usage
        carry = state.memory_carried_byte_ns()
        for slot, bit in enumerate((_MEMORY, _WORKING_SET, _MEMORY_ERROR)):
            total = self.memory[slot]
            if total is None or (slot == 2 and self.memory[0] is None):
                continue
            total += carry[slot]
            values[bit] = max(0, total) // NS_PER_SECOND
            carry[slot] = total - values[bit] * NS_PER_SECOND
            usage.known |= 1 << bit
        after.carry_memory(carry)
        return usage

    def _settle_deficits(self) -> None:
        usage, state = self.usage, self.state
        carry = list(state.carry)
        for slot, counter in enumerate(SUBTRACTED):
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
                old = state.io_carry.get(device, NO_IO)
                total4 = [a + b for a, b in zip(own.get(device, NO_IO), old, strict=True)]
                if any(v > 0 for v in total4):
                    devices[device] = four([max(0, v) for v in total4])
                if any(v < 0 for v in total4):
                    io_carry[device] = four([min(0, v) for v in total4])
            usage.devices, self.next_state.io_carry = devices, io_carry
            _set_io(usage.values, devices)


def raw(state: UnitState, reading: Reading, boottime_ns: int, longest_gap_ns: int) -> Row:
    """Difference of one unit's reading to its state, nested units still included. `boottime_ns` is when its memory
    was as it says.
    """
    before, memory = state.reading, state.memory
    values = [0] * _MEASURE_COUNT
    counters_before, io_before = before.counters, before.io
    if state.from_birth:
        # A runtime enables controllers after it has made the cgroup; a reading in between finds some files only.
        if counters_before.count(None) > reading.counters.count(None):
            counters_before = _zero_where_new(counters_before, reading.counters)
        if io_before is None and reading.io is not None:
            io_before = {}
    known, flags, counters = _count(values, counters_before, reading.counters)
    known_io, flags_io, devices, io = _count_io(values, io_before, reading.io)
    if boottime_ns != NO_SAMPLE:
        memory.add(
            boottime_ns,
            reading.memory_current_bytes,
            reading.memory_inactive_file_bytes,
            reading.pids_current,
            longest_gap_ns,
        )
    else:
        memory.stop()
    known |= known_io | _peaks(values, memory, before, reading)
    flags |= flags_io
    if memory.estimated and memory.byte_ns is not None:
        flags |= pb.ROW_FLAG_MEMORY_ESTIMATED
    if counters is not reading.counters or io is not reading.io:
        reading = msgspec.structs.replace(reading, counters=counters, io=io)
    return _row(state, reading, flags, known, values, devices)


def ended(state: UnitState) -> Row:
    """The last row of a unit whose end nobody saw: what memory was sampled since its last reading."""
    reading = state.reading
    state.memory.stop()
    values = [0] * _MEASURE_COUNT
    known = sum(1 << COUNTER_BITS[i] for i, value in enumerate(reading.counters) if value is not None)
    if reading.io is not None:
        known |= _IO_KNOWN
    known |= _peaks(values, state.memory, reading, reading)
    flags = pb.ROW_FLAG_FINAL | pb.ROW_FLAG_TAIL_UNSEEN | pb.ROW_FLAG_PARTIAL
    return _row(state, reading, flags, known, values, {})


def at_end(state: UnitState, end: End, longest_gap_ns: int) -> Row:
    """The row of a unit that was removed: its memory until then, its other counters as far as they are final."""
    reading = end.reading
    has_memory = reading.memory_current_bytes is not None
    row = raw(state, reading, end.removed_boottime_ns if has_memory else NO_SAMPLE, longest_gap_ns)
    row.flags |= int(pb.ROW_FLAG_PARTIAL)
    if end.released:
        row.flags |= int(pb.ROW_FLAG_FINAL)
    return row


def _row(
    state: UnitState,
    reading: Reading,
    flags: int,
    known: int,
    values: list[int],
    devices: dict[str, DeviceCounters],
) -> Row:
    """The row from `state` to `reading`, which is where the unit's next row starts."""
    before, memory = state.reading, state.memory
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
    next_state = UnitState(
        reading,
        memory.restarted(),
        state.tenant,
        True,
        state.carry,
        state.io_carry,
        from_birth=state.from_birth,
    )
    return Row(state, next_state, usage, memory)


def _zero_where_new(before: Counters, now: Counters) -> Counters:
    return tuple(
        0 if old is None and new is not None else old for old, new in zip_longest(before, now[: len(before)])
    )


def _count(values: list[int], before: Counters, now: Counters) -> tuple[int, int, Counters]:
    """Set the differences; (known bits, row flags, the counters that the next differences start from)."""
    if len(now) < len(before):
        # A reading without its last counters does not know them; that is no reason to forget them.
        now += (None,) * (len(before) - len(now))
    known = 0
    odd = False
    for old, new, bit, mask in zip(before, now, COUNTER_BITS, _COUNTER_MASKS, strict=False):
        if old is None:
            continue
        if new is None or new < old:
            odd = True
            continue
        values[bit] = new - old
        known |= mask
    if not odd:
        return known, 0, now
    more, flags, now = _count_odd(values, before, now)
    return known | more, flags, now


def _count_odd(values: list[int], before: Counters, now: Counters) -> tuple[int, int, Counters]:
    """`_count` for the counters that are unknown now or lower than before. What is unknown keeps its older
    base: when it comes back, its difference covers the time between.
    """
    known = flags = 0
    kept = list(now)
    for index, (old, new) in enumerate(zip(before, now, strict=False)):
        if old is None or (new is not None and new >= old):
            continue
        if new is None:
            kept[index] = old
            continue
        known |= _COUNTER_MASKS[index]
        if index in _MAY_LAG:
            kept[index] = old
        else:
            values[COUNTER_BITS[index]] = new
            flags |= int(pb.ROW_FLAG_COUNTER_RESET)
    return known, flags, tuple(kept)


def _count_io(
    values: list[int], before: dict[str, DeviceCounters] | None, now: dict[str, DeviceCounters] | None
) -> tuple[int, int, dict[str, DeviceCounters], dict[str, DeviceCounters] | None]:
    """Set the differences; (known bits, row flags, differences by device, where the next ones start from)."""
    if now is None:
        return 0, 0, {}, before
    if before is None:
        return 0, 0, {}, now
    devices: dict[str, DeviceCounters] = {}
    flags = 0
    if now:
        devices, flags = _io_deltas(before, now)
        _set_io(values, devices)
    if before.keys() - now.keys():
        # A device that is gone for now (unplugged, or its line unreadable once) keeps its counters.
        now = {**before, **now}
    return _IO_KNOWN, flags, devices, now


def _peaks(values: list[int], memory: MemoryTrack, before: Reading, reading: Reading) -> int:
    """Set the maxima within the interval and return their bits. A lifetime peak counts only if it rose."""
    known = 0
    sampled = memory.peak_bytes
    if sampled is not None:
        old, new = before.memory_peak_bytes, reading.memory_peak_bytes
        values[_MEMORY_PEAK] = sampled if new is None or old is None or new <= old else max(sampled, new)
        known = 1 << _MEMORY_PEAK
    sampled = memory.pids_peak
    if sampled is not None:
        old, new = before.pids_peak, reading.pids_peak
        values[_PIDS_PEAK] = sampled if new is None or old is None or new <= old else max(sampled, new)
        known |= 1 << _PIDS_PEAK
    return known


def _io_deltas(
    before: dict[str, DeviceCounters], now: dict[str, DeviceCounters]
) -> tuple[dict[str, DeviceCounters], int]:
    devices: dict[str, DeviceCounters] = {}
    flags = 0
    for device, counters in now.items():
        old = before.get(device, NO_IO)
        if counters == old:
            continue
        delta = [b - a for a, b in zip(old, counters, strict=True)]
        if min(delta) < 0:
            # The device was replaced under the same number: its counters started from zero.
            delta, flags = list(counters), int(pb.ROW_FLAG_COUNTER_RESET)
        devices[device] = four(delta)
    return devices, flags


def first_state(reading: Reading, tenant: str, boottime_ns: int) -> UnitState:
    memory = MemoryTrack(boottime_ns, reading.memory_current_bytes, reading.memory_inactive_file_bytes)
    return UnitState(reading, memory, tenant, opened=False)


def says_nothing(usage: Usage) -> bool:
    """Whether the row of a removed unit can be left out: it used nothing more, and its last row is yet to come."""
    return not (usage.opens or usage.flags & pb.ROW_FLAG_FINAL or any(usage.values))


def born(reading: Reading, tenant: str, boottime_ns: int) -> UnitState:
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
    state = first_state(zero, tenant, boottime_ns)
    state.from_birth = True
    return state


def add(total: Usage, later: Usage) -> None:
    """Add a later stretch of the same unit. A measure is known of the whole if it is known of either part."""
    for bit, value in enumerate(later.values):
        if bit in _MAXIMA:
            total.values[bit] = max(total.values[bit], value)
        else:
            total.values[bit] += value
    total.known |= later.known
    total.flags |= later.flags
    for device, delta in later.devices.items():
        old = total.devices.get(device, NO_IO)
        total.devices[device] = four([a + b for a, b in zip(old, delta, strict=True)])


def four(values: list[int]) -> DeviceCounters:
    return (values[0], values[1], values[2], values[3])


def _set_io(values: list[int], devices: dict[str, DeviceCounters]) -> None:
    for slot, bit in enumerate(_IO_BITS):
        values[bit] = sum(delta[slot] for delta in devices.values())
