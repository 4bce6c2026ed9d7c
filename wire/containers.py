"""The container table of a batch: packed by whoever writes it, opened by whoever reads it.

Nobody else reads the oneof; who knows a table from before compares its bytes, as they are.
"""

from __future__ import annotations

import zlib

from google.protobuf.message import DecodeError

from wire.limits import MAX_BATCH_BYTES, MAX_TABLE_EXPANSION
from wire.v1 import usage_pb2 as pb

_LEVEL = 1
"""Higher ones save 2 % of a table of 100 rows, and take up to three times as long with many rows."""


class BadTable(ValueError):
    """A packed table that cannot be opened; the text says why."""


def put_table(batch: pb.UsageBatch, table: pb.ContainerTable) -> None:
    """Make it the batch's, packed where that is shorter and a reader would open it."""
    plain = table.SerializeToString(deterministic=True)
    packed = zlib.compress(plain, _LEVEL)
    if len(packed) < len(plain) <= len(packed) * MAX_TABLE_EXPANSION:
        batch.containers_zlib = packed
    else:
        batch.containers.CopyFrom(table)


def table_of(batch: pb.UsageBatch) -> pb.ContainerTable:
    """Raises BadTable. The columns may be of any length."""
    return open_table(batch.containers_zlib) if batch.HasField("containers_zlib") else batch.containers


def open_table(packed: bytes) -> pb.ContainerTable:
    """Raises BadTable, at the latest after MAX_TABLE_EXPANSION times as many bytes as there are."""
    stream = zlib.decompressobj()
    most = min(MAX_BATCH_BYTES, len(packed) * MAX_TABLE_EXPANSION)
    try:
        plain = stream.decompress(packed, most + 1)
    except zlib.error as error:
        raise BadTable(f"no zlib stream: {error}") from error
    if len(plain) > most:
        raise BadTable(f"opens to more than {most} bytes; send it as `containers`")
    if not stream.eof:
        raise BadTable("cut off")
    if stream.unused_data:
        raise BadTable(f"{len(stream.unused_data)} bytes behind its end")
    try:
        return pb.ContainerTable.FromString(plain)
    except (DecodeError, ValueError) as error:
        raise BadTable(f"no ContainerTable: {error}") from error
