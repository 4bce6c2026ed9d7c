"""UsageBatch -> a row of table `batches`, in ClickHouse's RowBinary. Pure.

RowBinary: integers little-endian, a String as varint length and bytes, an Array as varint length and elements, a UUID as
two little-endian halves. A column is copied as a block, so the cost per batch hardly depends on its rows.
"""

from __future__ import annotations

import struct
import sys
import uuid
from array import array
from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ledger.consume.arrival import Arrival
from wire.containers import BadTable, open_table
from wire.identity import DIGEST_BYTES, is_agent_id
from wire.limits import MAX_BATCH_ROWS, MAX_VALUE, SCHEMA_VERSION
from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

assert sys.byteorder == "little"
assert array("Q").itemsize == 8
assert array("I").itemsize == 4

_OPENING = tuple(field.name for field in pb.Opening.DESCRIPTOR.fields if field.name not in ("row", "known"))
_DEVICES_32 = ("row", "major", "minor")
_DEVICES_64 = ("read_bytes", "write_bytes", "read_ops", "write_ops")

COLUMNS: tuple[str, ...] = (
    *("agent_id", "epoch", "seq", "digest", "previous_digest", "received_at_ns", "schema_version", "tenant"),
    *("interval_start_ns", "interval_end_ns", "interval_duration_ns", "boot_id", "host", "producer"),
    *("flags", "coverage", "cpus"),
    *(
        f"units.{name}"
        for name in ("cgroup_id", "cgroup_path", "kind", "runtime", "container_id", "pod_uid", "name")
    ),
    *("units.row_flags", "units.known"),
    *(f"units.{name}" for name in MEASURES),
    *(f"devices.{name}" for name in (*_DEVICES_32, *_DEVICES_64)),
    *("openings.row", "openings.known"),
    *(f"openings.{name}" for name in _OPENING),
    *(f"gaps.{name}" for name in ("start_ns", "end_ns", "reason", "count", "detail")),
    *("has_host_totals", "host_cpu_usage_ns", "host_cpu_deficit_ns", "host_cpu_source"),
)
_ALWAYS = ("cgroup_id", "cgroup_path", "kind")
_TEXTS = ("runtime", "container_id", "pod_uid", "name")
_always_of = attrgetter(*_ALWAYS)
_texts_of = attrgetter(*_TEXTS)
_optional_of = attrgetter("row_flags", *MEASURES)
_measures_of = attrgetter(*MEASURES)
_devices_of = attrgetter(*(f"device_{name}" for name in (*_DEVICES_32, *_DEVICES_64)))
_DEVICE_CODES = "I" * len(_DEVICES_32) + "Q" * len(_DEVICES_64)
# Most batches have none of these: so many empty arrays.
_NO_DEVICES = bytes(len(_DEVICE_CODES))
_NO_OPENINGS = bytes(2 + len(_OPENING))
_NO_GAPS = bytes(5)
_HEAD = struct.Struct("<16sQQ32s32sQI")
_TIMES = struct.Struct("<QQQ")
_THREE_32 = struct.Struct("<III")
_TOTALS = struct.Struct("<?QQ")
_NO_DIGEST = bytes(DIGEST_BYTES)
UNNAMED = 255
_KNOWN_TABLES = 2_048
"""Container tables remembered: an agent's hardly changes from one interval to the next."""


class Unreadable(Exception):
    """Bytes that are no UsageBatch, or not the one they are said to be."""


def read(arrival: Arrival) -> pb.UsageBatch:
    """The batch of an arrival. Unreadable says why not: whoever wrote it into the source was no collector."""
    try:
        batch = pb.UsageBatch.FromString(arrival.body)
    except DecodeError as error:
        raise Unreadable("the bytes are no UsageBatch") from error
    if (batch.agent_id, batch.epoch, batch.seq) != (arrival.agent_id, arrival.epoch, arrival.seq):
        raise Unreadable("the batch names another identity than what it came with")
    if batch.schema_version != SCHEMA_VERSION:
        raise Unreadable(
            f"its schema version is {batch.schema_version}, and this release reads {SCHEMA_VERSION}: upgrade the ledger,"
            " then `weighbridge-ledger reread`"
        )
    if not batch.seq or not is_agent_id(batch.agent_id):
        raise Unreadable("its identity is none: an agent is a lower-case UUID, and numbers count from 1")
    if len(batch.previous_digest) != (DIGEST_BYTES if batch.seq > 1 else 0):
        raise Unreadable("its previous digest is not of 32 bytes, or the first batch has one")
    rows = len(batch.known)
    if rows > MAX_BATCH_ROWS:
        raise Unreadable(f"it has {rows} rows, at most {MAX_BATCH_ROWS}")
    # What the collector lets be absent stands for as many zeros or empty texts: it was accepted, so it is booked.
    if _units(batch).rows != rows or not {*map(len, _optional_of(batch))} <= {0, rows}:
        raise Unreadable("its columns are not of one length")
    if len({*map(len, _devices_of(batch))}) != 1:
        raise Unreadable("its device columns are not of one length")
    if max(batch.device_row, default=-1) >= rows or any(opening.row >= rows for opening in batch.openings):
        raise Unreadable("it speaks of a row that it does not have")
    if not 0 < batch.interval_start_unix_ns < batch.interval_end_unix_ns < MAX_VALUE:
        raise Unreadable("its interval is empty, or in no time that there is")
    return batch


def encode(arrival: Arrival, batch: pb.UsageBatch) -> bytes:
    """The row, columns as in COLUMNS. `batch` is what `read` gave."""
    rows = len(batch.known)
    count, nothing = _varint(rows), _zeros(rows)
    measures = [
        # A slice of a repeated field is a list, made at once; iterating over the field itself takes twice as long.
        count + array("Q", column[:]).tobytes() if column else nothing
        for column in _measures_of(batch)
    ]
    return b"".join(
        (
            _HEAD.pack(
                _uuid(batch.agent_id),
                batch.epoch,
                batch.seq,
                arrival.digest,
                batch.previous_digest or _NO_DIGEST,
                arrival.received_at_unix_ns,
                batch.schema_version,
            ),
            _text(batch.tenant),
            _TIMES.pack(batch.interval_start_unix_ns, batch.interval_end_unix_ns, batch.interval_duration_ns),
            _text(batch.boot_id),
            _text(batch.host),
            _text(batch.producer),
            _THREE_32.pack(batch.flags, batch.coverage, batch.cpus),
            _units(batch).columns,
            count,
            array("I", batch.row_flags[:]).tobytes() or bytes(4 * rows),
            count,
            array("Q", batch.known[:]).tobytes(),
            *measures,
            _devices(batch) if batch.device_row else _NO_DEVICES,
            _openings(batch) if batch.openings else _NO_OPENINGS,
            _gaps(batch) if batch.gaps else _NO_GAPS,
            _TOTALS.pack(
                batch.HasField("host_totals"),
                batch.host_totals.cpu_usage_ns,
                batch.host_totals.cpu_deficit_ns,
            ),
            _text(batch.host_totals.cpu_source),
        )
    )


class _Units(NamedTuple):
    """A container table."""

    rows: int
    columns: bytes
    """In RowBinary."""


def _units(batch: pb.UsageBatch) -> _Units:
    packed = batch.HasField("containers_zlib")
    data = batch.containers_zlib if packed else batch.containers.SerializeToString(deterministic=True)
    return _read_table(data, packed)


@lru_cache(_KNOWN_TABLES)
def _read_table(data: bytes, packed: bool) -> _Units:
    try:
        table = open_table(data) if packed else pb.ContainerTable.FromString(data)
    except BadTable as error:
        raise Unreadable(f"its container table cannot be opened: {error}") from error
    rows = len(table.cgroup_id)
    if {*map(len, _always_of(table))} != {rows} or not {*map(len, _texts_of(table))} <= {0, rows}:
        raise Unreadable("the columns of its container table are not of one length")
    columns = b"".join(
        (
            _column("Q", table.cgroup_id),
            _texts(table.cgroup_path),
            _column("B", map(_byte, table.kind)),
            *(_texts(column or ("",) * rows) for column in _texts_of(table)),
        )
    )
    return _Units(rows, columns)


def _devices(batch: pb.UsageBatch) -> bytes:
    columns = zip(_DEVICE_CODES, _devices_of(batch), strict=True)
    return b"".join(_column(code, column[:]) for code, column in columns)


def _openings(batch: pb.UsageBatch) -> bytes:
    openings = batch.openings
    return b"".join(
        (
            _column("I", [o.row for o in openings]),
            *(_column("Q", [getattr(o, name) for o in openings]) for name in ("known", *_OPENING)),
        )
    )


def _gaps(batch: pb.UsageBatch) -> bytes:
    gaps = batch.gaps
    return b"".join(
        (
            _column("Q", [g.start_unix_ns for g in gaps]),
            _column("Q", [g.end_unix_ns for g in gaps]),
            _column("B", [_byte(g.reason) for g in gaps]),
            _column("Q", [g.count for g in gaps]),
            _texts([g.detail for g in gaps]),
        )
    )


def _byte(number: int) -> int:
    """Of an enum. Nobody checks a gap's reason on the way: what no release has ever named, also below 0, is 255."""
    return number if 0 <= number < UNNAMED else UNNAMED


def _column(code: str, values: Iterable[int]) -> bytes:
    column = array(code, values)
    return _varint(len(column)) + column.tobytes()


def _texts(values: Iterable[str]) -> bytes:
    texts = [_text(value) for value in values]
    return _varint(len(texts)) + b"".join(texts)


@lru_cache(MAX_BATCH_ROWS)
def _zeros(rows: int) -> bytes:
    """A measure that nobody measured."""
    return _varint(rows) + bytes(8 * rows)


@lru_cache(65_536)
def _text(value: str) -> bytes:
    data = value.encode()
    return _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """LEB128, as RowBinary counts."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@lru_cache(65_536)
def _uuid(text: str) -> bytes:
    data = uuid.UUID(text).bytes
    return data[7::-1] + data[:7:-1]
