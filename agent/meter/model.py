"""What the readers give and the meter takes: readings of cgroups at one instant.

Counters are cumulative, in base units, as the kernel gives them; `None` is unknown and never 0. Structs
are `array_like` because the last reading of every unit is written into the spool at every interval.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from wire.measures import BIT

COUNTERS: tuple[str, ...] = (
    "cpu_usage_ns",
    "cpu_user_ns",
    "cpu_system_ns",
    "cpu_periods",
    "cpu_throttled_periods",
    "cpu_throttled_ns",
    "oom_kills",
    "psi_cpu_some_ns",
    "psi_cpu_full_ns",
    "psi_memory_some_ns",
    "psi_memory_full_ns",
    "psi_io_some_ns",
    "psi_io_full_ns",
)
"""Order of `Reading.counters`. Trailing unknown counters may be left off."""

NETWORK: tuple[str, ...] = (
    "net_rx_loopback_bytes",
    "net_tx_loopback_bytes",
    "net_rx_internal_bytes",
    "net_tx_internal_bytes",
    "net_rx_external_bytes",
    "net_tx_external_bytes",
    "net_rx_loopback_packets",
    "net_tx_loopback_packets",
    "net_rx_internal_packets",
    "net_tx_internal_packets",
    "net_rx_external_packets",
    "net_tx_external_packets",
)
"""Order of the counters in `Network.entries`. Packets are segments: what crosses the wire."""

COUNTER_BITS: tuple[int, ...] = tuple(BIT[name] for name in COUNTERS)
"""Bit of each counter in a row's `known`."""

Counters = tuple[int | None, ...]

DeviceCounters = tuple[int, int, int, int]
"""Cumulative read bytes, write bytes, read operations, write operations of one block device."""


class Reading(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Counters and gauges of one metering unit at one instant.

    CPU time, memory, I/O and (v2) OOM kills include everything below the cgroup (the kernel's hierarchical
    counters); throttling, pressure and peaks are the cgroup's own. `enclosing_id` is the cgroup id of
    the nearest unit around it, the root's (1) if there is none.
    """

    cgroup_id: int
    path: str
    enclosing_id: int
    counters: Counters
    io: dict[str, DeviceCounters] | None = None
    """Per device "major:minor". None: unknown. {}: no I/O yet."""
    memory_current_bytes: int | None = None
    memory_inactive_file_bytes: int | None = None
    memory_peak_bytes: int | None = None
    """Highest memory_current_bytes of the cgroup's life."""
    memory_limit_bytes: int | None = None
    """None: unknown or unlimited."""
    pids_current: int | None = None
    pids_peak: int | None = None
    """Highest pids_current of the cgroup's life."""


class MemorySample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is read of a unit between two snapshots, to integrate memory more finely than the interval."""

    cgroup_id: int
    memory_current_bytes: int | None
    memory_inactive_file_bytes: int | None
    pids_current: int | None


class End(msgspec.Struct, frozen=True, gc=False):
    """The end of one unit as the kernel probes recorded it. What they do not record is None in the reading."""

    reading: Reading
    born_boottime_ns: int
    """0: before the probes were there."""
    removed_boottime_ns: int
    released: bool
    """The counters will not move any more."""
    load_id: int
    """CLOCK_BOOTTIME at which the probes that recorded it were loaded."""
    removal_seen: bool = True
    """False: it was removed before the probes were there, or they had no room to write that down."""


class Network(msgspec.Struct, frozen=True):
    """Traffic since one load of the probes, by the cgroup that made the socket: own, nothing below included."""

    load_id: int
    entries: list[tuple[int, int | None, tuple[int, ...]]]
    """(cgroup id, cgroup id of the unit it belongs to, counters). No unit: not to be counted before it is known."""
    unloaded: bool = False
    """Nobody counts on; this is the last reading."""


class ProbeMark(msgspec.Struct, frozen=True, array_like=True):
    """Which probes were there at one reading, and what they had lost by then."""

    load_id: int
    exits: bool
    network: bool
    lost: dict[str, int]
    """What there was no room for since the load, by kind."""


class Snapshot(msgspec.Struct, frozen=True):
    """Every metering unit of the host at one instant. `root` is the host itself (cgroup id 1, path "/").

    `complete` is False when some cgroup could not be read for another reason than having ended. A unit is either
    in `units` or in `ends`.
    """

    boot_id: str
    boottime_ns: int
    wall_unix_ns: int
    root: Reading
    units: list[Reading]
    complete: bool
    nested_oom_kills: bool = True
    """Whether oom_kills include what lies below: v2's memory.events do, v1's memory.oom_control does not."""
    ends: list[End] = []
    """Units that were removed, each at every reading until its counters are final and it is forgotten."""
    seen_boottime_ns: int = 0
    """Every unit born before this instant is in this snapshot, or was in an earlier one."""
    networks: list[Network] = []
    """The last is that of the probes that are there now, an earlier one of probes unloaded since the last reading."""
    probes: ProbeMark | None = None
    """None: no probes."""
    unloaded: list[ProbeMark] = []
    """Probes that were unloaded since the last reading, as they ended."""


class ClockState(Enum):
    """The kernel's own view of its wall clock (adjtimex)."""

    SYNCHRONISED = "synchronised"
    UNSYNCHRONISED = "unsynchronised"
    UNKNOWN = "unknown"


class Role(Enum):
    """What the walk over a cgroup tree does with one cgroup."""

    LEAF_UNIT = "leaf_unit"
    """Meter it and all below it as one: a container."""
    UNIT = "unit"
    """Meter it, and go on below: other units may be nested in it (they are subtracted)."""
    PASS = "pass"  # noqa: S105 - not a password
    """Not metered by itself; go on below."""
