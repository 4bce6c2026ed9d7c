"""What is wrong with a batch by the contract: decoded whole, looked at value by value, every fault listed.

Written from proto/weighbridge/v1/usage.proto and wire/limits.py, for comparison with `collector/decide/validate.py`, which
stops at the first fault and compares bytes where it can.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from wire import limits
from wire.measures import MEASURES
from wire.statuses import Reason
from wire.v1 import usage_pb2 as pb

FUTURE_NS, PAST_NS = 600 * 10**9, 400 * 86_400 * 10**9
TABLE = tuple(pb.ContainerTable.DESCRIPTOR.fields_by_name)
DEVICES = tuple(name for name in pb.UsageBatch.DESCRIPTOR.fields_by_name if name.startswith("device_"))
TEXT_BYTES = {"cgroup_path": limits.MAX_PATH_BYTES} | dict.fromkeys(
    ("runtime", "container_id", "pod_uid", "name"), limits.MAX_NAME_BYTES
)
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_KINDS = pb.UnitKind.values()[1:]
MOST_MEMORY_BYTES, LARGE = 1 << 50, 1 << 56

Fault = tuple[Reason, str]
"""Why, and which field; no field where the bytes are no batch at all."""


class Circumstances(NamedTuple):
    """What a batch is judged by besides its bytes."""

    agent_id: str
    epoch: int
    seq: int
    permitted: frozenset[str] | None
    tenants: frozenset[str] | None
    now_unix_ns: int


def decoded(body: bytes) -> pb.UsageBatch | None:
    try:
        return pb.UsageBatch.FromString(body)
    except DecodeError:
        return None


def faults(batch: pb.UsageBatch | None, around: Circumstances) -> set[Fault]:
    """Everything that is wrong; empty: the batch has to be accepted."""
    if batch is None:
        return {(Reason.REASON_MALFORMED, "")}
    rows = len(batch.known)
    return {
        *_header(batch, around),
        *_interval(batch, around.now_unix_ns),
        *_table(batch, rows),
        *_columns(batch, rows),
        *_devices(batch, rows),
        *_others(batch, rows),
    }


def _header(batch: pb.UsageBatch, around: Circumstances) -> Iterator[Fault]:
    if batch.schema_version != limits.SCHEMA_VERSION:
        yield Reason.REASON_UNKNOWN_SCHEMA_VERSION, "schema_version"
    if batch.agent_id != around.agent_id:
        yield Reason.REASON_FOREIGN_AGENT, "agent_id"
    if (batch.epoch, batch.seq) != (around.epoch, around.seq):
        yield Reason.REASON_IDENTITY_MISMATCH, "seq"
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,127}", batch.tenant):
        yield Reason.REASON_OUT_OF_BOUNDS, "tenant"
    if around.permitted is not None and batch.tenant not in around.permitted:
        yield Reason.REASON_TENANT_NOT_PERMITTED, "tenant"
    if around.tenants is not None and batch.tenant not in around.tenants:
        yield Reason.REASON_UNKNOWN_TENANT, "tenant"
    if batch.boot_id != "unknown" and not re.fullmatch(
        "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", batch.boot_id
    ):
        yield Reason.REASON_OUT_OF_BOUNDS, "boot_id"
    if not 1 <= batch.cpus <= 65_536:
        yield Reason.REASON_OUT_OF_BOUNDS, "cpus"
    if len(batch.previous_digest) != (0 if around.seq == 1 else 32):
        yield Reason.REASON_CHAIN_BROKEN, "previous_digest"
    for name, text in (("host", batch.host), ("producer", batch.producer)):
        if _hostile(text, limits.MAX_NAME_BYTES):
            yield Reason.REASON_OUT_OF_BOUNDS, name


def _hostile(text: str, most_bytes: int) -> bool:
    return len(text.encode()) > most_bytes or _CONTROL.search(text) is not None


def _interval(batch: pb.UsageBatch, now_unix_ns: int) -> Iterator[Fault]:
    start, end = batch.interval_start_unix_ns, batch.interval_end_unix_ns
    if not 0 < start < end < limits.MAX_VALUE or not 0 < batch.interval_duration_ns < limits.MAX_VALUE:
        yield Reason.REASON_OUT_OF_BOUNDS, "interval"
    if not now_unix_ns - PAST_NS <= end <= now_unix_ns + FUTURE_NS:
        yield Reason.REASON_CLOCK_SKEW, "interval_end_unix_ns"


def _opened(packed: bytes) -> pb.ContainerTable | None:
    """None: it is no table, or more of one than it may be, or more than one."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed)
        if not stream.eof or stream.unused_data or len(plain) > min(limits.MAX_BATCH_BYTES, 16 * len(packed)):
            return None
        return pb.ContainerTable.FromString(plain)
    except (zlib.error, DecodeError):
        return None


def _table(batch: pb.UsageBatch, rows: int) -> Iterator[Fault]:
    if rows > limits.MAX_BATCH_ROWS:
        yield Reason.REASON_TOO_LARGE, "known"
    table = _opened(batch.containers_zlib) if batch.HasField("containers_zlib") else batch.containers
    if table is None:
        yield Reason.REASON_MALFORMED, "containers_zlib"
        return
    for name in TABLE:
        column = getattr(table, name)
        if len(column) not in (0, rows):
            yield Reason.REASON_TABLE_SHAPE, name
        for value in column:
            if isinstance(value, str):
                if _hostile(value, TEXT_BYTES[name]):
                    yield Reason.REASON_OUT_OF_BOUNDS, name
            elif value > limits.MAX_VALUE or (name == "kind" and value not in _KINDS):
                yield Reason.REASON_OUT_OF_BOUNDS, name
    if rows and not (table.cgroup_id and table.cgroup_path and table.kind):
        yield Reason.REASON_TABLE_SHAPE, "containers"


def _columns(batch: pb.UsageBatch, rows: int) -> Iterator[Fault]:
    for name in ("row_flags", "known", *MEASURES):
        yield from _numbers(name, getattr(batch, name), rows)
    bound = max(LARGE, MOST_MEMORY_BYTES * (batch.interval_duration_ns // 10**9 + 2))
    for name in ("memory_byte_seconds", "memory_working_set_byte_seconds"):
        if max(getattr(batch, name), default=0) > bound:
            yield Reason.REASON_IMPLAUSIBLE, name
    usage = sum(batch.cpu_usage_ns)
    if usage > limits.MAX_VALUE:
        yield Reason.REASON_OUT_OF_BOUNDS, "cpu_usage_ns"
    if usage > batch.cpus * (batch.interval_duration_ns * 105 // 100 + 10 * 10**9):
        yield Reason.REASON_IMPLAUSIBLE, "cpu_usage_ns"


def _numbers(name: str, column: Sequence[int], count: int) -> Iterator[Fault]:
    if len(column) not in (0, count):
        yield Reason.REASON_TABLE_SHAPE, name
    if column and max(column) > limits.MAX_VALUE:
        yield Reason.REASON_OUT_OF_BOUNDS, name


def _devices(batch: pb.UsageBatch, rows: int) -> Iterator[Fault]:
    count = len(batch.device_row)
    if count > limits.MAX_DEVICES_PER_BATCH:
        yield Reason.REASON_TOO_LARGE, "device_row"
    for name in DEVICES:
        column = getattr(batch, name)
        yield from _numbers(name, column, count)
        if len(column) != count:
            yield Reason.REASON_TABLE_SHAPE, name
    if any(row >= rows for row in batch.device_row):
        yield Reason.REASON_TABLE_SHAPE, "device_row"


def _others(batch: pb.UsageBatch, rows: int) -> Iterator[Fault]:
    if len(batch.openings) > rows or any(opening.row >= rows for opening in batch.openings):
        yield Reason.REASON_TABLE_SHAPE, "openings"
    totals = batch.host_totals
    for name, message in (*(("openings", opening) for opening in batch.openings), ("host_totals", totals)):
        numbers = [value for _, value in message.ListFields() if isinstance(value, int)]
        if max(numbers, default=0) > limits.MAX_VALUE:
            yield Reason.REASON_OUT_OF_BOUNDS, name
    if _hostile(totals.cpu_source, limits.MAX_NAME_BYTES):
        yield Reason.REASON_OUT_OF_BOUNDS, "host_totals"
    if len(batch.gaps) > limits.MAX_GAPS_PER_BATCH:
        yield Reason.REASON_TOO_LARGE, "gaps"
    for gap in batch.gaps:
        if gap.start_unix_ns > gap.end_unix_ns or _hostile(gap.detail, limits.MAX_DETAIL_BYTES):
            yield Reason.REASON_OUT_OF_BOUNDS, "gaps"
