"""Nested units: every nanosecond is billed at exactly one level. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.meter.model import COUNTER_BITS, COUNTERS, DeviceCounters
from agent.meter.rows import NO_IO, ROOT_ID, SUBTRACTED, Row, UnitState, four

_OOM_KILLS = COUNTERS.index("oom_kills")


def subtract_nested(rows: Mapping[int, Row], nested_oom_kills: bool) -> None:
    """Take each unit's raw difference off the unit around it, so that each level keeps only its own.

    `nested_oom_kills` is False where the kernel counts OOM kills per cgroup (v1): they are own already.
    """
    counted = _COUNTED if nested_oom_kills else _COUNTED[: SUBTRACTED.index(_OOM_KILLS)]
    # Siblings are taken off together: most units of a host are siblings.
    taken: dict[int, list[int]] = {}
    for row in rows.values():
        usage = row.usage
        if usage.cgroup_id == ROOT_ID:
            continue
        values, memory, enclosing_id = usage.values, row.memory, row.enclosing_id
        sums = taken.get(enclosing_id)
        if sums is None:
            sums = taken[enclosing_id] = [0] * (len(_COUNTED) + len(_INTEGRATES))
        for slot, bit, _ in counted:
            sums[slot] += values[bit]
        sums[_MEMORY] += memory[0] or 0
        sums[_WORKING_SET] += memory[1] or 0
        if usage.devices:
            _take_devices(usage.devices, _around(rows, enclosing_id, _counts_io))
    for enclosing_id, sums in taken.items():
        for slot, bit, can_tell in counted:
            # Also from an outer counter that could not be read this once: its next difference covers this
            # time too, and until then it carries a deficit.
            if sums[slot] and (around := _around(rows, enclosing_id, can_tell)) is not None:
                around.usage.values[bit] -= sums[slot]
        for slot, can_integrate in enumerate(_INTEGRATES):
            inner = sums[len(_COUNTED) + slot]
            if inner and (around := _around(rows, enclosing_id, can_integrate)) is not None:
                around.memory[slot] = (around.memory[slot] or 0) - inner


def _take_devices(devices: Mapping[str, DeviceCounters], around: Row | None) -> None:
    if around is None:
        return
    if around.devices is None:
        around.devices = {device: list(v) for device, v in around.usage.devices.items()}
    for device, delta in devices.items():
        own = around.devices.setdefault(device, [0, 0, 0, 0])
        for k in range(4):
            own[k] -= delta[k]


def hand_up_carries(rows: Mapping[int, Row], living: Mapping[int, UnitState]) -> None:
    """What an ended unit still carries goes to the nearest living unit around it: nothing is forgiven."""
    for cgroup_id, row in rows.items():
        ended = row.next_state
        if cgroup_id in living:
            continue
        heir_id = row.enclosing_id
        while heir_id not in living:
            heir_id = rows[heir_id].enclosing_id if heir_id in rows else ROOT_ID
        heir = living[heir_id]
        hand_over(ended, heir)
        if heir.memory.current_bytes is not None:
            a, b = heir.memory_carried_byte_ns(), ended.memory_carried_byte_ns()
            heir.carry_memory([a[0] + b[0], a[1] + b[1], a[2]])


def hand_over(ended: UnitState, heir: UnitState) -> None:
    """Add the deficits of one unit to those of another."""
    heir.carry = tuple(a + b for a, b in zip(heir.carry, ended.carry, strict=True))
    if ended.io_carry:
        heir.io_carry = dict(heir.io_carry)
        for device, owed in ended.io_carry.items():
            old = heir.io_carry.get(device, NO_IO)
            heir.io_carry[device] = four([a + b for a, b in zip(old, owed, strict=True)])


def _around(rows: Mapping[int, Row], enclosing_id: int, can_tell: Callable[[Row], bool]) -> Row | None:
    """The nearest enclosing unit that can tell the quantity at all, so that it includes the inner one's."""
    while True:
        row = rows.get(enclosing_id) or rows[ROOT_ID]
        if can_tell(row):
            return row
        if row.usage.cgroup_id == ROOT_ID:
            return None
        enclosing_id = row.enclosing_id


def _counts(index: int) -> Callable[[Row], bool]:
    def can_tell(row: Row) -> bool:
        counters = row.state.reading.counters
        return index < len(counters) and counters[index] is not None

    return can_tell


def _integrates(slot: int) -> Callable[[Row], bool]:
    return lambda row: row.memory[slot] is not None


def _counts_io(row: Row) -> bool:
    return row.state.reading.io is not None


_COUNTED = tuple((slot, COUNTER_BITS[index], _counts(index)) for slot, index in enumerate(SUBTRACTED))
_INTEGRATES = (_integrates(0), _integrates(1))
_MEMORY, _WORKING_SET = len(_COUNTED), len(_COUNTED) + 1
