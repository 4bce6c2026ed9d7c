"""What recovery is computed from and what it gives: values that a query can fill.

A *span* is a stretch of an agent's stream over which counters can be compared: an epoch, or what follows a change of
sources within one (GAP_REASON_SOURCE_CHANGED: every unit opens again, at other counters). It is named by
(epoch, span_start_ns), where span_start_ns is 0 for an epoch's first and the interval's start of the change for others.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from wire.measures import BIT, MEASURES
from wire.v1 import usage_pb2 as pb

RECOVERABLE: tuple[str, ...] = tuple(
    name for name in MEASURES if name in pb.Opening.DESCRIPTOR.fields_by_name
)
"""The measures an opening tells. Integrals over time (memory byte-seconds), maxima, pressure and network traffic are in
no opening: what of them was in a lost batch is lost.
"""
BITS: tuple[int, ...] = tuple(1 << BIT[name] for name in RECOVERABLE)
"""Bit of each recoverable measure in `known`."""

Amounts = tuple[int, ...]
"""One number for each of RECOVERABLE."""


class Opening(NamedTuple):
    """The counters of an incarnation (boot_id, cgroup_id) at the start of its first row in a span."""

    agent_id: str
    epoch: int
    span_start_ns: int
    start_ns: int
    """Start of the row's interval, unix ns."""
    tenant: str
    boot_id: str
    cgroup_id: int
    cgroup_path: str
    kind: int
    known: int
    counters: Amounts


class Booked(NamedTuple):
    """Sums over the rows of one incarnation in one span; cgroup_id 0: of folded units, whatever they were."""

    agent_id: str
    epoch: int
    span_start_ns: int
    boot_id: str
    cgroup_id: int
    cgroup_path: str
    kind: int
    first_start_ns: int
    last_end_ns: int
    was_reset: bool
    """Whether a row says ROW_FLAG_COUNTER_RESET."""
    sums: Amounts


class Beginning(NamedTuple):
    """The interval in which the host itself opened: the first of a span, or of a boot within one."""

    agent_id: str
    epoch: int
    span_start_ns: int
    boot_id: str
    whole: bool
    """All of the interval's batches are booked and the whole host was readable, so every unit alive then has an opening."""
    cpu_owed_ns: int | None
    """CPU deficit of the whole host at the interval's start. None: not all of the interval is booked."""
    cpu_source: str


class Doubt(Enum):
    """Why a difference is not recovered. What it is of stays in the difference of the unit around, which includes it."""

    NO_OPENING = "no earlier opening is booked to compare with"
    NOT_KNOWN = "one of the two openings does not know the measure"
    RESET = "a counter started anew in between"
    FOLDED = "rows of ended units were folded in between, perhaps of units inside this one"
    DEVICE_GONE = "counters fell, as they do when a block device goes away"
    SOURCE_CHANGED = "counters were read from another source"


class Recovered(NamedTuple):
    """Usage that counters tell and no booked row. Negative: rows tell it twice."""

    agent_id: str
    epoch: int
    boot_id: str
    cgroup_id: int
    cgroup_path: str
    tenant: str
    start_unix_ns: int
    end_unix_ns: int
    """From the last booked row of the incarnation to the opening; the other way round where rows overlap."""
    measure: str
    amount: int


class Unknown(NamedTuple):
    """A measure that was not compared at an opening."""

    agent_id: str
    epoch: int
    boot_id: str
    cgroup_id: int
    cgroup_path: str
    tenant: str
    start_unix_ns: int
    end_unix_ns: int
    measure: str
    doubt: Doubt


class Recovery(NamedTuple):
    recovered: list[Recovered]
    unknown: list[Unknown]
