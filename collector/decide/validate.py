"""Is this batch what it says, and can it be true? Pure, and table-driven, since it runs for every batch.

Late and out-of-order batches are normal: an agent's spool may be weeks old. A batch from the future is
not: its hour has not been lived through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from collector.decide.familiar import Familiars, columns_in_order, lay_out
from wire.containers import BadTable, table_of
from wire.identity import DIGEST_BYTES, AgentId, digest
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
from wire.measures import MEASURES
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

_TENANT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TENANT_BYTES - 1}}}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CONTROL = bytes(range(0x20)) + b"\x7f"
_TEXT_BOUND = {
    "cgroup_path": MAX_PATH_BYTES,
    **dict.fromkeys(("runtime", "container_id", "pod_uid", "name"), MAX_NAME_BYTES),
}
_ALWAYS = ("cgroup_id", "cgroup_path", "kind")
_DEVICE_COLUMNS = tuple(n for n in pb.UsageBatch.DESCRIPTOR.fields_by_name if n.startswith("device_"))
_counters_of = attrgetter(*(n for n in pb.Opening.DESCRIPTOR.fields_by_name if n != "row"))
_BYTE_SECONDS = ("memory_byte_seconds", "memory_working_set_byte_seconds")
_KINDS = frozenset(pb.UnitKind.values()) - {0}
_LARGE = 1 << 56
MAX_FAMILIAR_BYTES = 32 << 20
"""What is remembered of batches, over all agents: mostly their container tables."""
_HOST_MEMORY_BOUND_BYTES = 1 << 50
"""No host has a pebibyte of memory."""
_CPU_TOLERANCE_PERCENT = 105
"""Counters are read one after another, and a carried deficit lands in a later interval."""
_CPU_LATE_NS = 10_000_000_000
"""A virtual CPU that is kept from running accounts for what ran on it when it runs again: each CPU may be this much behind
(docs/decisions/0035-cpus-account-late.md)."""
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


class Checked(msgspec.Struct, frozen=True, gc=False):
    """What the pipeline needs of a good batch, or why it is none."""

    refusal: Refusal | None
    tenant: str = ""
    rows: int = 0
    cpu_usage_ns: int = 0
    previous_digest: bytes = b""
    gaps: Sequence[pb.Gap] = ()


def check_bytes(body: bytes, claimed_digest: bytes) -> Refusal | None:
    """Are these the bytes the sender means? Asked before anything is decoded."""
    if len(body) > MAX_BATCH_BYTES:
        return Refusal(Reason.REASON_TOO_LARGE, f"{len(body)} bytes, at most {MAX_BATCH_BYTES}")
    if digest(body) != claimed_digest:
        return Refusal(Reason.REASON_DIGEST_MISMATCH, "the bytes do not have the digest that came with them")
    return None


class Validator:
    """Judges batches whose bytes were checked. Remembers what the batches of an agent have in common."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._familiars = Familiars(MAX_FAMILIAR_BYTES)

    def check(
        self,
        body: bytes,
        agent_id: AgentId,
        epoch: int,
        seq: int,
        permitted: frozenset[str] | None,
        now_unix_ns: int,
    ) -> Checked:
        """Judge one batch. Never raises, whatever the bytes are."""
        news = self._familiars.news(body, agent_id, epoch, seq)
        if (
            news is not None
            and _whose(news.tenant, permitted, self.bounds) is None
            and _when(news.start_unix_ns, news.end_unix_ns, news.duration_ns, self.bounds, now_unix_ns)
            is None
            and _plausible(news.cpu_usage_ns, news.cpus, news.duration_ns) is None
        ):
            return Checked(None, news.tenant, news.rows, news.cpu_usage_ns, news.previous_digest)
        try:
            batch = pb.UsageBatch.FromString(body)
        except (DecodeError, ValueError) as error:
            return _no(Refusal(Reason.REASON_MALFORMED, f"no UsageBatch: {error}"))
        rows = len(batch.known)
        cpu_usage_ns = sum(batch.cpu_usage_ns)
        layout = lay_out(batch, body)
        in_order = layout is not None and columns_in_order(layout.columns, rows)
        refusal = (
            _header(batch, agent_id, epoch, seq, permitted, self.bounds, now_unix_ns)
            or _table(batch, rows)
            or _numbers("row_flags", batch.row_flags, rows, "rows")
            or _numbers("known", batch.known, rows, "rows")
            or (None if in_order else _columns(batch, rows))
            or _plausible(cpu_usage_ns, batch.cpus, batch.interval_duration_ns)
            or _side_tables(batch, rows)
        )
        if refusal is not None:
            return _no(refusal)
        if layout is not None:
            self._familiars.learn(batch, agent_id, layout)
        return Checked(None, batch.tenant, rows, cpu_usage_ns, batch.previous_digest, batch.gaps)


def _no(refusal: Refusal) -> Checked:
    return Checked(refusal._replace(detail=refusal.detail[:MAX_DETAIL_BYTES]))


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
            f"seq: epoch and seq are {batch.epoch}/{batch.seq} inside, {epoch}/{seq} outside",
        )
    if not _TENANT.fullmatch(batch.tenant):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "tenant: not a tenant name")
    refusal = _whose(batch.tenant, permitted, bounds) or _when(
        batch.interval_start_unix_ns, batch.interval_end_unix_ns, batch.interval_duration_ns, bounds, now
    )
    if refusal is not None:
        return refusal
    if not _UUID.fullmatch(batch.boot_id) and batch.boot_id != "unknown":
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "boot_id: not a UUID")
    if not 0 < batch.cpus <= 65_536:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "cpus: between 1 and 65536")
    if len(batch.previous_digest) != (DIGEST_BYTES if seq > 1 else 0):
        return Refusal(Reason.REASON_CHAIN_BROKEN, "previous_digest: 32 bytes, none for seq 1")
    return _texts("host", [batch.host], MAX_NAME_BYTES) or _texts(
        "producer", [batch.producer], MAX_NAME_BYTES
    )


def _whose(tenant: str, permitted: frozenset[str] | None, bounds: Bounds) -> Refusal | None:
    if permitted is not None and tenant not in permitted:
        return Refusal(Reason.REASON_TENANT_NOT_PERMITTED, f"tenant {tenant} is not among this agent's")
    if bounds.tenants is not None and tenant not in bounds.tenants:
        return Refusal(
            Reason.REASON_UNKNOWN_TENANT,
            f"tenant {tenant} is not in the collector's `validation.tenants`",
        )
    return None


def _when(start: int, end: int, duration: int, bounds: Bounds, now: int) -> Refusal | None:
    if not 0 < start < end < MAX_VALUE or not 0 < duration < MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "interval: start < end and duration > 0 are needed")
    if end > now + bounds.future_ns:
        return Refusal(
            Reason.REASON_CLOCK_SKEW, f"ends {(end - now) // _NS} s in the future; set the host's clock"
        )
    if end < now - bounds.past_ns:
        return Refusal(Reason.REASON_CLOCK_SKEW, f"ended {(now - end) // _NS} s ago; set the host's clock")
    return None


def _table(batch: pb.UsageBatch, rows: int) -> Refusal | None:
    """Judge who the rows are about."""
    if rows > MAX_BATCH_ROWS:
        return Refusal(Reason.REASON_TOO_LARGE, f"known: {rows} rows, at most {MAX_BATCH_ROWS}")
    try:
        table = table_of(batch)
    except BadTable as error:
        return Refusal(Reason.REASON_MALFORMED, f"containers_zlib: {error}")
    for field, value in table.ListFields():
        name = field.name
        if len(value) != rows:
            return _shape(f"{name}: {len(value)} values for {rows} rows")
        bound = _TEXT_BOUND.get(name)
        if bound is not None:
            refusal = _texts(name, value, bound)
            if refusal is not None:
                return refusal
        elif name == "kind" and not _KINDS.issuperset(value):
            return Refusal(Reason.REASON_OUT_OF_BOUNDS, "kind: a number that is no UnitKind")
        elif name == "cgroup_id" and max(value) > MAX_VALUE:
            return Refusal(Reason.REASON_OUT_OF_BOUNDS, "cgroup_id: no cgroup has this number")
    if rows and not all(getattr(table, name) for name in _ALWAYS):
        return _shape("containers: cgroup_id, cgroup_path and kind need a value per row")
    return None


def _texts(name: str, texts: Sequence[str], bound_bytes: int) -> Refusal | None:
    joined = "".join(texts).encode()
    if len(joined) > bound_bytes and max(len(text.encode()) for text in texts) > bound_bytes:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: longer than {bound_bytes} bytes")
    if len(joined.translate(None, _CONTROL)) != len(joined):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: control characters must be written out")
    return None


def _columns(batch: pb.UsageBatch, rows: int) -> Refusal | None:
    """Number by number."""
    for name in MEASURES:
        refusal = _numbers(name, getattr(batch, name), rows, "rows")
        if refusal is not None:
            return refusal
    devices = len(batch.device_row)
    for name in _DEVICE_COLUMNS:
        refusal = _numbers(name, getattr(batch, name), devices, "devices")
        if refusal is not None:
            return refusal
        if devices and not getattr(batch, name):
            return _shape(f"{name}: 0 values for {devices} devices")
    bound = _HOST_MEMORY_BOUND_BYTES * (batch.interval_duration_ns // _NS + 2)
    for name in _BYTE_SECONDS:
        top = max(getattr(batch, name), default=0)
        if top > max(bound, _LARGE):
            return Refusal(Reason.REASON_IMPLAUSIBLE, f"{name}: {top} in {batch.interval_duration_ns} ns")
    return None


def _numbers(name: str, value: Sequence[int], count: int, of: str) -> Refusal | None:
    if value and len(value) != count:
        return _shape(f"{name}: {len(value)} values for {count} {of}")
    if value and max(value) > MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"{name}: {max(value)} is negative or impossible")
    return None


def _plausible(cpu_usage_ns: int, cpus: int, duration_ns: int) -> Refusal | None:
    """A host cannot use more CPU time than it has CPUs."""
    if cpu_usage_ns > MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, f"cpu_usage_ns: {cpu_usage_ns} is negative or impossible")
    if cpu_usage_ns > cpus * (duration_ns * _CPU_TOLERANCE_PERCENT // 100 + _CPU_LATE_NS):
        return Refusal(
            Reason.REASON_IMPLAUSIBLE, f"cpu_usage_ns: {cpu_usage_ns} in {duration_ns} ns on {cpus} CPUs"
        )
    return None


def _shape(detail: str) -> Refusal:
    return Refusal(Reason.REASON_TABLE_SHAPE, detail)


def _side_tables(batch: pb.UsageBatch, rows: int) -> Refusal | None:
    if batch.device_row:
        if len(batch.device_row) > MAX_DEVICES_PER_BATCH:
            return Refusal(Reason.REASON_TOO_LARGE, f"device_row: {len(batch.device_row)} devices")
        if max(batch.device_row) >= rows:
            return _shape(f"device_row: row {max(batch.device_row)} of {rows}")
    if batch.openings and (
        len(batch.openings) > rows or any(opening.row >= rows for opening in batch.openings)
    ):
        return _shape("openings: more than rows, or of a row that is not there")
    totals = batch.host_totals
    if any(max(_counters_of(opening)) > MAX_VALUE for opening in batch.openings):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "openings: a counter that is negative or impossible")
    if max(totals.cpu_usage_ns, totals.cpu_deficit_ns) > MAX_VALUE:
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "host_totals: a counter that is negative or impossible")
    if len(batch.gaps) > MAX_GAPS_PER_BATCH:
        return Refusal(Reason.REASON_TOO_LARGE, f"gaps: {len(batch.gaps)}, at most {MAX_GAPS_PER_BATCH}")
    if any(gap.start_unix_ns > gap.end_unix_ns for gap in batch.gaps):
        return Refusal(Reason.REASON_OUT_OF_BOUNDS, "gaps: start <= end is needed")
    return _texts("gaps", [gap.detail for gap in batch.gaps], MAX_DETAIL_BYTES) or _texts(
        "host_totals", [totals.cpu_source], MAX_NAME_BYTES
    )
