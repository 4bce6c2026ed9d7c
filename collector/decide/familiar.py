"""A batch like the one before it: what both have in common is compared as bytes, only the rest is decoded.

    batch = head             schema version, agent, epoch
          | moment           seq, previous digest, tenant, interval
          | circumstances    boot, host, flags, CPUs, container table, row flags, `known`
          | columns          measures, devices, host totals

in the order of the field numbers, which is how protobuf libraries write it. Protobuf messages concatenate:
the parse of a whole is the merge of the parses of its parts. So where head and circumstances are byte for byte
those of a batch that was judged good, the parses of moment and columns say all that is new.

This way can only say yes. A batch it does not recognise, or whose rest is not plainly in order, is decoded
whole and judged by `validate`, which names what is wrong.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from wire.identity import DIGEST_BYTES, AgentId
from wire.limits import MAX_DEVICES_PER_BATCH, MAX_NAME_BYTES
from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

_FIELDS = pb.UsageBatch.DESCRIPTOR.fields_by_name
_HEAD = ("schema_version", "agent_id", "epoch")
_INTERVAL = ("interval_start_unix_ns", "interval_end_unix_ns", "interval_duration_ns")
_MOMENT = ("seq", "previous_digest", "tenant", *_INTERVAL)
_CIRCUMSTANCES = ("boot_id", "host", "producer", "flags", "coverage", "cpus", "row_flags", "known")
_BEHIND_MEASURES = frozenset(
    field for name, field in _FIELDS.items() if name.startswith("device_") or name == "host_totals"
)
_DEVICE_COLUMNS = tuple(name for name in _FIELDS if name.startswith("device_"))
_moment_of = attrgetter(*_MOMENT)
_devices_of = attrgetter(*_DEVICE_COLUMNS)
_batch_of = pb.UsageBatch.FromString

_column_begin = struct.Struct("<HB").unpack_from
"""Tag and first byte of the size of a packed column with a number above 15."""
_MEASURE_TAGS = frozenset(
    ((number := _FIELDS[name].number) << 3 & 0x7F | 0x82) | number >> 4 << 8 for name in MEASURES
)
_CPU_USAGE_TAG = 32 >> 4 << 8 | 0x82

_UNREADABLE = (DecodeError, ValueError, IndexError, struct.error)

_TENANT_AT = (2 + 38) + 1 + 1 + 34
"""Where the tenant's field begins, but for the digits of epoch and seq: behind version and agent, the tags of
epoch and seq, and the previous digest.
"""
_IS_CONTINUATION = bytes(0 if byte < 0x80 else 1 for byte in range(256))
_LARGE = b"\x01" * 8
"""Eight continuation bytes in a row: a varint of at least 2**56."""


class Familiar(msgspec.Struct, frozen=True, gc=False):
    """What the batches of one agent, epoch and tenant have in common."""

    head: bytes
    epoch: int
    tenant: str
    interval_bytes: int
    circumstances: bytes
    rows: int
    cpus: int


class Layout(NamedTuple):
    """The parts of a batch."""

    head: bytes
    circumstances: bytes
    columns: bytes


class News(NamedTuple):
    """What is new in a familiar batch. Its columns are in order; the other values were only decoded."""

    previous_digest: bytes
    tenant: str
    start_unix_ns: int
    end_unix_ns: int
    duration_ns: int
    rows: int
    cpus: int
    cpu_usage_ns: int


def lay_out(batch: pb.UsageBatch, body: bytes) -> Layout | None:
    """A decoded batch with rows in its parts; None if its bytes are not laid out as above."""
    table = batch.WhichOneof("table")
    if table is None or not batch.known:
        return None
    head, circumstances = _bytes_of(batch, _HEAD), _bytes_of(batch, (*_CIRCUMSTANCES, table))
    front = head + _bytes_of(batch, _MOMENT) + circumstances
    if not body.startswith(front):
        return None
    return Layout(head, circumstances, body[len(front) :])


class Familiars:
    """The last good batch of each agent and tenant, bounded in bytes; what falls out is learned again."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[tuple[AgentId, bytes], Familiar] = OrderedDict()
        """By agent and the bytes of the tenant's field."""

    def news(self, body: bytes, agent_id: AgentId, epoch: int, seq: int) -> News | None:
        """What this batch says beyond what is known; None if that takes a closer look."""
        tenant_at = _TENANT_AT + _digits(epoch) + _digits(seq)
        if seq == 1 or tenant_at + 1 >= len(body):
            return None
        interval_at = tenant_at + 2 + body[tenant_at + 1]
        known = self._known.get((agent_id, body[tenant_at:interval_at]))
        if known is None or known.epoch != epoch:
            return None
        end = interval_at + known.interval_bytes
        if not body.startswith(known.circumstances, end) or not body.startswith(known.head):
            return None
        try:
            moment = _moment_of(_batch_of(body[len(known.head) : end]))
            cpu_usage_ns = _columns(body[end + len(known.circumstances) :], known.rows)
        except _UNREADABLE:
            return None
        its_seq, previous_digest, tenant, start, stop, duration = moment
        if (
            cpu_usage_ns is None
            or its_seq != seq
            or tenant != known.tenant
            or len(previous_digest) != DIGEST_BYTES
            or 3 + _digits(start) + _digits(stop) + _digits(duration) != known.interval_bytes
        ):
            return None
        # These values take all the bytes there are, so there is nothing else between head and circumstances.
        return News(previous_digest, tenant, start, stop, duration, known.rows, known.cpus, cpu_usage_ns)

    def learn(self, batch: pb.UsageBatch, agent_id: AgentId, layout: Layout) -> None:
        """Remember what a good batch shows of those to come."""
        key = (agent_id, _bytes_of(batch, ("tenant",)))
        familiar = Familiar(
            layout.head,
            batch.epoch,
            batch.tenant,
            len(_bytes_of(batch, _INTERVAL)),
            layout.circumstances,
            len(batch.known),
            batch.cpus,
        )
        before = self._known.pop(key, None)
        if before is not None:
            self._bytes -= len(before.circumstances)
        self._known[key] = familiar
        self._bytes += len(familiar.circumstances)
        while self._bytes > self._max_bytes:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= len(oldest.circumstances)


def _digits(value: int) -> int:
    """Bytes of a varint above 0."""
    return (value.bit_length() + 6) // 7


def _bytes_of(batch: pb.UsageBatch, names: Iterable[str]) -> bytes:
    part = pb.UsageBatch(**{name: getattr(batch, name) for name in names})
    return part.SerializeToString(deterministic=True)


def columns_in_order(encoded: bytes, rows: int) -> bool:
    """Whether the columns of a batch are so plainly in order that no number has to be looked at."""
    try:
        return _columns(encoded, rows) is not None
    except _UNREADABLE:
        return False


def _columns(encoded: bytes, rows: int) -> int | None:
    """Sum of cpu_usage_ns, if these are columns in order, nothing else, with a value per row, none of them large."""
    marks = encoded.translate(_IS_CONTINUATION)
    if marks.rfind(_LARGE) >= 0:  # takes half as long as `in`
        return None
    values_in, end = marks.count, len(encoded)
    at = before = cpu_usage_ns = 0
    while at < end:
        tag, size = _column_begin(encoded, at)
        if tag not in _MEASURE_TAGS:
            break
        begin = at + 3
        if size > 0x7F:
            # A third byte would make the column longer than any with these rows can be.
            size, begin = size & 0x7F | encoded[begin] << 7, begin + 1
        stop = begin + size
        # A value ends at each byte below 0x80.
        if tag <= before or values_in(0, begin, stop) != rows or marks[stop - 1]:
            return None
        if tag == _CPU_USAGE_TAG:
            cpu_usage_ns = sum(_batch_of(encoded[at:stop]).cpu_usage_ns[:])
        before, at = tag, stop
    return cpu_usage_ns if at == end or _in_order(_batch_of(encoded[at:]), rows) else None


def _in_order(behind: pb.UsageBatch, rows: int) -> bool:
    """Devices and host totals and nothing else, with a value per device, each device of a row, and no odd text."""
    if not _BEHIND_MEASURES.issuperset(field for field, _ in behind.ListFields()):
        return False
    devices, source = len(behind.device_row), behind.host_totals.cpu_source
    return (
        len(source) <= MAX_NAME_BYTES
        and source.isascii()
        and source.isprintable()
        and all(len(column) == devices for column in _devices_of(behind))
        and (devices == 0 or (devices <= MAX_DEVICES_PER_BATCH and max(behind.device_row) < rows))
    )
