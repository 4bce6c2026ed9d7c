"""A UsageBatch seen with its columns as raw bytes, so that a well-formed one is judged without a loop over rows.

A packed repeated field and a `bytes` field look the same on the wire (length-delimited). `ColumnView` is the
contract's own descriptor with every packed column and the container table retyped to `bytes`, made at
import, so there is nothing to keep in step. What a column of varints must satisfy is then a question to a
byte string: a value ends at each byte below 0x80, and k continuation bytes in a row are a value of at least
2**(7k).

The view is trusted only for bytes in canonical form (nothing unknown, no field twice); anything else is
judged on the whole message, more slowly, by `validate`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from wire.measures import MEASURES
from wire.v1 import usage_pb2 as pb

_DECODED = frozenset(("cpu_usage_ns", "device_row"))
"""Columns whose numbers are needed."""
_ROW_COLUMNS = (*(name for name in MEASURES if name not in _DECODED), "row_flags", "known")
_DEVICE_COLUMNS = (
    "device_major", "device_minor", "device_read_bytes", "device_write_bytes", "device_read_ops",
    "device_write_ops",
)  # fmt: skip
_CONTINUATION = bytes(range(0x80, 0x100))
_IS_CONTINUATION = bytes(0 if byte < 0x80 else 1 for byte in range(256))
_LARGE = b"\x01" * 8
"""Eight continuation bytes: a value of at least 2**56, for a closer look."""


def _column_view() -> Any:
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    field_type = descriptor_pb2.FieldDescriptorProto
    for message in file.message_type:
        if message.name != "UsageBatch":
            continue
        for field in message.field:
            packed = field.label == field_type.LABEL_REPEATED and field.type in (
                field_type.TYPE_UINT32,
                field_type.TYPE_UINT64,
            )
            if (packed and field.name not in _DECODED) or field.name == "containers":
                field.label, field.type = field_type.LABEL_OPTIONAL, field_type.TYPE_BYTES
                field.ClearField("type_name")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weighbridge.v1.UsageBatch"))


ColumnView = _column_view()
_row_columns = attrgetter(*_ROW_COLUMNS)
_device_columns = attrgetter(*_DEVICE_COLUMNS)


def view_of(body: bytes) -> Any | None:
    """The view of a batch in canonical form; None if only the whole message can tell."""
    try:
        view = ColumnView.FromString(body)
    except (DecodeError, ValueError):
        return None
    view.DiscardUnknownFields()
    return view if view.ByteSize() == len(body) else None


def regular(view: Any, rows: int) -> bool:
    """Every column has a value per row (per device), none of them large. False: look closer."""
    columns = list(filter(None, _row_columns(view)))
    if any(_device_columns(view)) or view.device_row:
        devices = len(view.device_row)
        for column in _device_columns(view):
            if len(column.translate(None, _CONTINUATION)) != devices or column[-1] > 0x7F:
                return False
            if _LARGE in column.translate(_IS_CONTINUATION):
                return False
    # One pass for all columns: 1 for a continuation byte, 0 for the last byte of a value.
    marks = b"".join(columns).translate(_IS_CONTINUATION)
    end = 0
    for column in columns:
        begin, end = end, end + len(column)
        if marks.count(0, begin, end) != rows or marks[end - 1]:
            return False
    return _LARGE not in marks
