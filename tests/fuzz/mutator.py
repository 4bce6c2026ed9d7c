"""Changes a batch as somebody would who knows protobuf, field by field; in a Delivery it is sealed again with the right digest.

Bytes changed anywhere mostly end at the digest, or as no protobuf at all; those are tried too.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from wire.identity import digest
from wire.v1 import ingest_pb2

Mutate = Callable[[bytes, int], bytes]
"""(bytes, size at most) -> other bytes: libFuzzer's own."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_NUMBERS = (0, 1, 3, 127, 128, 2**32 - 1, 2**32, 2**56 - 1, 2**56, 2**62, 2**62 + 1, 2**63, 2**64 - 1)
_MOST_ITEMS = 4
_TABLE, _TABLE_ZLIB = 20, 21
_MOST_OPENED = 1 << 16


def other_delivery(data: bytes, max_size: int, seed: int, mutate: Mutate) -> bytes:
    """Another input like this one."""
    rng = random.Random(seed)
    try:
        items = list(ingest_pb2.Delivery.FromString(data).items)
    except DecodeError:
        items = []
    if not items or rng.random() < 0.02:
        return mutate(data, max_size)
    # The last one mostly: what came before it is what it is compared with.
    at = len(items) - 1 if rng.random() < 0.6 else rng.randrange(len(items))
    room = max(16, max_size - len(data))
    match rng.randrange(12):
        case 0:
            items.insert(
                rng.randrange(len(items) + 1), ingest_pb2.Item.FromString(items[at].SerializeToString())
            )
        case 1:
            items.insert(rng.randrange(len(items)), items.pop(at))
        case 2:
            items[at].seq = rng.choice((items[at].seq % 2**62 + 1, 1, *_NUMBERS))
        case 3:
            items[at].batch = mutate(items[at].batch, len(items[at].batch) + room)
        case _:
            items[at].batch = _other_fields(items[at].batch, room, rng, mutate)
    if rng.random() < 0.98:
        items[at].digest = digest(items[at].batch)
    changed = ingest_pb2.Delivery(items=items[:_MOST_ITEMS]).SerializeToString(deterministic=True)
    return changed if len(changed) <= max_size else mutate(data, max_size)


def other_batch(data: bytes, max_size: int, seed: int, mutate: Mutate, good: Sequence[bytes]) -> bytes:
    """Another batch like this one, or like a good one: of what the search keeps most are refused at once."""
    rng = random.Random(seed)
    base = rng.choice(good) if rng.random() < 0.4 else data
    changed = _other_fields(base, max(16, max_size - len(base)), rng, mutate) if rng.random() < 0.8 else b""
    return changed if 0 < len(changed) <= max_size else mutate(data, max_size)


def _other_fields(message: bytes, room: int, rng: random.Random, mutate: Mutate) -> bytes:
    """A message with one of its fields changed, moved, repeated, taken out, or its numbers written one by one."""
    fields = _fields(message)
    if not fields:
        return mutate(message, len(message) + room)
    at = rng.randrange(len(fields))
    number, kind, value = fields[at]
    match rng.randrange(8):
        case 0:
            fields.insert(rng.randrange(len(fields) + 1), fields[at])
        case 1:
            fields.insert(rng.randrange(len(fields)), fields.pop(at))
        case 2:
            del fields[at]
        case 3:
            fields[at] = (rng.randrange(1, 84), kind, value)
        case 4 if kind == _LENGTH:
            # Packed numbers, or a table of columns: one of those.
            other = (
                _other_fields(value, room, rng, mutate)
                if number == _TABLE
                else _other_packed(value, room, rng, mutate)
                if number == _TABLE_ZLIB
                else _numbers(value, rng)
            )
            fields[at] = (number, kind, other)
        case 5 if kind == _LENGTH:
            fields[at : at + 1] = [(number, _VARINT, one) for one in _varints(value)]
        case _ if kind == _VARINT:
            fields[at] = (
                number,
                kind,
                _varint(rng.choice((*_NUMBERS, rng.getrandbits(rng.randrange(1, 65))))),
            )
        case _:
            fields[at] = (number, kind, mutate(value, len(value) + room))
    return b"".join(_encoded(*field) for field in fields)


def _other_packed(stream: bytes, room: int, rng: random.Random, mutate: Mutate) -> bytes:
    """A packed table with something in it changed, or that opens to very much, or is cut off, or has something behind it."""
    try:
        plain = zlib.decompressobj().decompress(stream, _MOST_OPENED)
    except zlib.error:
        return mutate(stream, len(stream) + room)
    match rng.randrange(8):
        case 0:
            return zlib.compress(plain + bytes(rng.randrange(_MOST_OPENED)), rng.randrange(10))
        case 1:
            return stream[: rng.randrange(len(stream) + 1)]
        case 2:
            return stream + rng.randbytes(3)
        case _:
            return zlib.compress(_other_fields(plain, room, rng, mutate), rng.randrange(10))


def _numbers(packed: bytes, rng: random.Random) -> bytes:
    """The column with one number changed, added or left out."""
    numbers = _varints(packed)
    at = rng.randrange(len(numbers) + 1)
    other = [_varint(rng.choice(_NUMBERS))] if rng.random() < 0.75 else []
    return b"".join(numbers[:at] + other + numbers[at + rng.randrange(2) :])


def _fields(message: bytes) -> list[tuple[int, int, bytes]]:
    """(number, wire type, value) of each, up to the first that is none."""
    out = []
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        begin = at
        if kind == _VARINT:
            at = _read_varint(message, at)[1]
        elif kind == _LENGTH:
            length, begin = _read_varint(message, at)
            at = begin + length
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            break
        out.append((number, kind, message[begin:at]))
    return out


def _encoded(number: int, kind: int, value: bytes) -> bytes:
    tag = _varint(number << 3 | kind)
    return tag + _varint(len(value)) + value if kind == _LENGTH else tag + value


def _varints(packed: bytes) -> list[bytes]:
    out, at = [], 0
    while at < len(packed):
        end = _read_varint(packed, at)[1]
        out.append(packed[at:end])
        at = end
    return out


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends)"""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80 or shift > 63:
            break
    return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
