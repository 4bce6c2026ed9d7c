"""Batches in a file, each behind its length as a varint: protobuf's delimited form, as `spool export` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from wire.limits import MAX_BATCH_BYTES

_MAX_SHIFT = 28
"""A length of five bytes at most."""
_PIECE_BYTES = 1 << 20


class Delimited(NamedTuple):
    offset: int
    """Of its length, in the file."""
    end: int
    body: bytes
    trouble: str
    """Why there is no body; empty if there is one."""


def delimit(body: bytes) -> bytes:
    """The batch behind its length."""
    length = len(body)
    prefix = bytearray()
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


def delimited(source: BinaryIO) -> Iterator[Delimited]:
    """Every batch, and what is none. Behind a length that cannot be read nothing more is found."""
    offset = 0
    while first := source.read(1):
        length, size = first[0] & 0x7F, 1
        byte = first[0]
        while byte >= 0x80:
            more = source.read(1)
            if not more or 7 * size > _MAX_SHIFT:
                yield Delimited(offset, offset + size, b"", "no length of a batch")
                return
            byte = more[0]
            length |= (byte & 0x7F) << 7 * size
            size += 1
        end = offset + size + length
        if length > MAX_BATCH_BYTES:
            missing = _skip(source, length)
            body, trouble = b"", f"{length} bytes are more than a batch may have ({MAX_BATCH_BYTES})"
        else:
            body = source.read(length)
            missing, trouble = length - len(body), ""
        if missing:
            yield Delimited(offset, end - missing, b"", "the file ends in the middle of it")
            return
        yield Delimited(offset, end, body, trouble)
        offset = end


def _skip(source: BinaryIO, length: int) -> int:
    """Read over so many bytes; how many of them are not there."""
    while length and (piece := source.read(min(length, _PIECE_BYTES))):
        length -= len(piece)
    return length
