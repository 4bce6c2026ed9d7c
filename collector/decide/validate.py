"""Is this batch what it says, and can it be true? Pure, and table-driven, since it runs for every batch.

Late and out-of-order batches are normal: an agent's spool may be weeks old. A batch from the future is
not: its hour has not been lived through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from wire.identity import AgentId, digest
from wire.limits import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    MAX_DETAIL_BYTES,
    MAX_DEVICES_PER_BATCH,
    MAX_GAPS_PER_BATCH,
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    MAX_TENANT_BYTES,
    MAX_VALUE,
    SCHEMA_VERSION,
)
from wire.measures import FIRST_MEASURE_FIELD, MEASURES
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

_TENANT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TENANT_BYTES - 1}}}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CONTROL = bytes(range(0x20)) + b"\x7f"
_NUMBER = {name: field.number for name, field in pb.UsageBatch.DESCRIPTOR.fields_by_name.items()}
_TABLE = {
    _NUMBER[n]: n
    for n in (
        "cgroup_id",
        "cgroup_path",
        "kind",
        "runtime",
        "container_id",
        "pod_uid",
        "name",
        "row_flags",
        "known",
    )
}
_TEXT_BOUND = {
    _NUMBER["cgroup_path"]: MAX_PATH_BYTES,
    **{_NUMBER[n]: MAX_NAME_BYTES for n in ("runtime", "container_id", "pod_uid", "name")},
}
_DEVICE = {
    _NUMBER[n]: n
    for n in (
        "device_row", "device_major", "device_minor", "device_read_bytes", "device_write_bytes",
        "device_read_ops", "device_write_ops",
    )
}  # fmt: skip
_ALWAYS = tuple(_NUMBER[n] for n in ("cgroup_id", "cgroup_path", "kind", "known"))
_FIRST, _LAST = FIRST_MEASURE_FIELD, FIRST_MEASURE_FIELD + len(MEASURES) - 1
_CPU = _NUMBER["cpu_usage_ns"]
_BYTE_SECONDS = frozenset(_NUMBER[n] for n in ("memory_byte_seconds", "memory_working_set_byte_seconds"))
_KINDS = frozenset(pb.UnitKind.values()) - {0}
_HOST_MEMORY_BOUND_BYTES = 1 << 50
"""No host has a pebibyte of memory."""
_CPU_TOLERANCE, _CPU_SLACK_NS = 1.05, 2_000_000_000
"""Counters are read one after another, and a held clock tick or a carried deficit lands in a later interval."""
_NS = 1_000_000_000


class Refusal(NamedTuple):
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the collector's settings allow."""

    tenants: frozenset[str] | None = None
    """None: any."""
    future_ns: int = 600 * _NS
    past_ns: int = 400 * 86_400 * _NS


class Checked(NamedTuple):
    """The decoded batch, or why there is none."""

    batch: pb.UsageBatch | None
    refusal: Refusal | None
    rows: int


def check_bytes(body: bytes, claimed_digest: bytes) -> Refusal | None:
    """Are these the bytes the sender means? Asked before anything is decoded."""
    if len(body) > MAX_BATCH_BYTES:
        return Refusal(Reason.REASON_TOO_LARGE, f"{len(body)} bytes, at most {MAX_BATCH_BYTES}")
    if digest(body) != claimed_digest:
        return Refusal(Reason.REASON_DIGEST_MISMATCH, "the bytes do not have the digest that came with them")
    return None


def check(
    body: bytes,
    agent_id: AgentId,
    epoch: int,
    seq: int,
    permitted: frozenset[str] | None,
    bounds: Bounds,
    now_unix_ns: int,
) -> Checked:
    """Decode and judge one batch whose bytes were checked. Never raises, whatever they are."""
    try:
        batch = pb.UsageBatch.FromString(body)
    except (DecodeError, ValueError) as error:
        return _no(Reason.REASON_MALFORMED, f"no UsageBatch: {error}")
    refusal = _header(batch, agent_id, epoch, seq, permitted, bounds, now_unix_ns) or _columns(batch)
    return Checked(batch, None, len(batch.cgroup_id)) if refusal is None else Checked(None, refusal, 0)


def _no(reason: Reason, detail: str) -> Checked:
    return Checked(None, Refusal(reason, detail[:MAX_DETAIL_BYTES]), 0)


def _header(
    batch: pb.UsageBatch,
    agent_id: AgentId,
    epoch: int,
    seq: int,
    permitted: frozenset[str] | None,
    bounds: Bounds,
    now: int,
) -> Refusal | None:
    if batch.schema_version != SCHEMA_VERSION:
        return Refusal(
            Reason.REASON_UNKNOWN_SCHEMA_VERSION,
            f"schema_version {batch.schema_version}, known is {SCHEMA_VERSION}",
        )
    if batch.agent_id != agent_id:
        return Refusal(Reason.REASON_FOREIGN_AGENT, "agent_id is not the one of the certificate")
    if batch.epoch != epoch or batch.seq != seq:
        return Refusal(
            Reason.REASON_IDENTITY_MISMATCH,
            f"epoch/seq {batch.epoch}/{batch.seq} inside, {epoch}/{seq} outside",
        )
    tenant = batch.tenant
    if not _TENANT.fullmatch(tenant):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "tenant: not a tenant name")
    if permitted is not None and tenant not in permitted:
        return Refusal(Reason.REASON_TENANT_NOT_PERMITTED, f"tenant {tenant} is not among this agent's")
    if bounds.tenants is not None and tenant not in bounds.tenants:
        return Refusal(
            Reason.REASON_UNKNOWN_TENANT, f"tenant {tenant} is not in the collector's `tenants.known`"
        )
    start, end = batch.interval_start_unix_ns, batch.interval_end_unix_ns
    if not 0 < start < end < MAX_VALUE or not 0 < batch.interval_duration_ns < MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "interval: start < end and duration > 0 are needed")
    if end > now + bounds.future_ns:
        return Refusal(
            Reason.REASON_CLOCK_SKEW, f"ends {(end - now) // _NS} s in the future; set the host's clock"
        )
    if end < now - bounds.past_ns:
        return Refusal(Reason.REASON_CLOCK_SKEW, f"ended {(now - end) // _NS} s ago; set the host's clock")
    if not _UUID.fullmatch(batch.boot_id) and batch.boot_id != "unknown":
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "boot_id: not a UUID")
    if not 0 < batch.cpus <= 65_536:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "cpus: between 1 and 65536")
    if len(batch.previous_digest) != (32 if seq > 1 else 0):
        return Refusal(Reason.REASON_CHAIN_BROKEN, "previous_digest: 32 bytes, none for seq 1")
    return None


def _columns(batch: pb.UsageBatch) -> Refusal | None:
    rows = len(batch.cgroup_id)
    if rows > MAX_BATCH_ROWS:
        return Refusal(Reason.REASON_TOO_LARGE, f"{rows} rows, at most {MAX_BATCH_ROWS}")
    devices = len(batch.device_row)
    seen = 0
    known = 0
    for field, value in batch.ListFields():
        number = field.number
        if _FIRST <= number <= _LAST:
            if len(value) != rows:
                return Refusal(
                    Reason.REASON_TABLE_SHAPE, f"{field.name}: {len(value)} values for {rows} rows"
                )
            top = max(value)
            if top > MAX_VALUE:
                return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{field.name}: {top} is negative or impossible")
            if number == _CPU or number in _BYTE_SECONDS:
                refusal = _plausible(batch, field.name, number, top)
                if refusal:
                    return refusal
            known |= 1 << (number - _FIRST)
        elif number in _TABLE:
            seen += number in _ALWAYS
            refusal = _table(field.name, number, value, rows)
            if refusal:
                return refusal
        elif number in _DEVICE:
            refusal = _devices(field.name, number, value, rows, devices)
            if refusal:
                return refusal
        elif number > 76:
            refusal = _side_tables(batch, rows)
            if refusal:
                return refusal
    if rows and seen != len(_ALWAYS):
        return Refusal(
            Reason.REASON_TABLE_SHAPE, "cgroup_id, cgroup_path, kind and known need a value per row"
        )
    claimed = 0
    for bits in set(batch.known):
        claimed |= bits
    if known & ~claimed or claimed >> len(MEASURES):
        return Refusal(Reason.REASON_TABLE_SHAPE, "known: a column has values and no row knows it")
    return None


def _table(name: str, number: int, value: Any, rows: int) -> Refusal | None:
    if len(value) != rows:
        return Refusal(Reason.REASON_TABLE_SHAPE, f"{name}: {len(value)} values for {rows} rows")
    bound = _TEXT_BOUND.get(number)
    if bound is not None:
        joined = "".join(value).encode()
        if len(joined) > bound and max(len(text.encode()) for text in value) > bound:
            return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: longer than {bound} bytes")
        if len(joined.translate(None, _CONTROL)) != len(joined):
            return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: control characters must be written out")
    elif name == "kind" and not _KINDS.issuperset(value):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "kind: a number that is no UnitKind")
    return None


def _plausible(batch: pb.UsageBatch, name: str, number: int, top: int) -> Refusal | None:
    """A host cannot use more CPU time than it has CPUs, nor more memory than exists."""
    if number == _CPU:
        bound = int(batch.cpus * batch.interval_duration_ns * _CPU_TOLERANCE) + _CPU_SLACK_NS
    else:
        bound = _HOST_MEMORY_BOUND_BYTES * (batch.interval_duration_ns // _NS + 2)
    if top > bound:
        return Refusal(
            Reason.REASON_IMPLAUSIBLE,
            f"{name}: {top} in {batch.interval_duration_ns} ns on {batch.cpus} CPUs",
        )
    return None


def _devices(name: str, number: int, value: Any, rows: int, devices: int) -> Refusal | None:
    if len(value) != devices or devices > MAX_DEVICES_PER_BATCH:
        return Refusal(Reason.REASON_TABLE_SHAPE, f"{name}: {len(value)} values for {devices} devices")
    top = max(value)
    if name == "device_row" and top >= rows:
        return Refusal(Reason.REASON_TABLE_SHAPE, f"device_row: row {top} of {rows}")
    if top > MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: {top} is negative or impossible")
    return None


def _side_tables(batch: pb.UsageBatch, rows: int) -> Refusal | None:
    if len(batch.openings) > rows or any(opening.row >= rows for opening in batch.openings):
        return Refusal(Reason.REASON_TABLE_SHAPE, "openings: more than rows, or of a row that is not there")
    if len(batch.gaps) > MAX_GAPS_PER_BATCH:
        return Refusal(Reason.REASON_TOO_LARGE, f"gaps: {len(batch.gaps)}, at most {MAX_GAPS_PER_BATCH}")
    for gap in batch.gaps:
        if len(gap.detail) > MAX_DETAIL_BYTES or gap.start_unix_ns > gap.end_unix_ns:
            return Refusal(Reason.REASON_OUT_OF_BOUNDS, "gaps: start <= end and a short detail are needed")
    return None
