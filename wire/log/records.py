"""The format of the log. Pure: a header has a CRC, a batch its digest, so every byte can be verified."""

from __future__ import annotations

import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from wire.identity import AgentId, digest
from wire.limits import MAX_BATCH_BYTES

MAGIC = b"WBL1"
_HEADER = struct.Struct(">4sIIBBHQ16sQQ32s")
_CRC_AT, _AFTER_CRC = 8, 12
HEADER_BYTES = _HEADER.size
MAX_NOTE_BYTES = 4_096
MAX_BODY_BYTES = 4 * MAX_BATCH_BYTES
MAX_RECORD_BYTES = HEADER_BYTES + MAX_NOTE_BYTES + MAX_BODY_BYTES
_NO_AGENT = bytes(16)
_NOTHING = digest(b"")


class Kind(IntEnum):
    ACCEPTED = 1
    REJECTED = 2
    """Invalid for ever; its identity is used up."""
    REFUSED = 3
    """Not what was meant, or another's identity: kept as evidence, the identity stays as it was."""
    ADOPTED = 4
    """No batch: the stream goes on at `seq`; what came before was answered elsewhere or never sent."""
    MARK = 5
    """No batch: the log's own word that everything before it had been synced. Scans do not show it."""
    PARKED = 6
    """Durable, and waiting in its tenant's queue."""
    RELEASED = 7
    """A parked batch whose turn has come: the same bytes again."""
    ELSEWHERE = 8
    """No batch: another collector has delivered this one. The note is its digest."""


HANDED_ON = frozenset((Kind.ACCEPTED, Kind.RELEASED))
"""What the ledger may book, each batch once."""
_KINDS = {int(kind): kind for kind in Kind}
_KNOWN_AGENTS = 4_096

UNVERIFIED = 1
"""A flag: when it was taken in, no other collector could be asked about it, or another may have delivered it."""


class Record(NamedTuple):
    offset: int
    kind: Kind
    received_at_unix_ns: int
    agent_id: AgentId
    epoch: int
    seq: int
    digest: bytes
    note: bytes
    """Of a rejected batch: "REASON_NAME detail". Of an accepted one: empty, or how it came in after all. Of a parked or
    released one: see `handoff/park.py`."""
    body: bytes
    flags: int = 0
    """0 or UNVERIFIED."""

    @property
    def end(self) -> int:
        """Offset behind it."""
        return self.offset + HEADER_BYTES + len(self.note) + len(self.body)


class Bad(NamedTuple):
    """Bytes that are no record."""

    offset: int
    end: int
    """Where the next sound record begins, or the segment ends."""
    proven: bool
    """A mark behind it says that these bytes were synced once."""


def frame(
    kind: Kind,
    received_at_unix_ns: int,
    agent: bytes,
    epoch: int,
    seq: int,
    digest_: bytes,
    note: bytes,
    body: bytes,
    flags: int = 0,
) -> tuple[bytes, bytes]:
    """One record as (header and note, body): the body is written from where it lies. `agent` is the 16 bytes of
    the agent's UUID.
    """
    note = note[:MAX_NOTE_BYTES]
    header = _HEADER.pack(
        MAGIC, len(body), 0, kind, flags, len(note), received_at_unix_ns, agent, epoch, seq, digest_
    )
    crc = zlib.crc32(note, zlib.crc32(header[_AFTER_CRC:], len(body)))
    return b"".join((header[:_CRC_AT], crc.to_bytes(4, "big"), header[_AFTER_CRC:], note)), body


def mark(offset: int) -> bytes:
    """The mark that belongs at `offset`, when everything before it is synced."""
    return frame(Kind.MARK, time.time_ns(), _NO_AGENT, 0, offset, _NOTHING, b"", b"")[0]


def filler(hole: bytes) -> bytes:
    """As many bytes as `hole` has (HEADER_BYTES or more), readable as refused records around the same bytes."""
    out = bytearray()
    while hole:
        size = min(len(hole), HEADER_BYTES + MAX_BODY_BYTES)
        if 0 < len(hole) - size < HEADER_BYTES:
            size -= HEADER_BYTES
        body = hole[HEADER_BYTES:size]
        out += b"".join(frame(Kind.REFUSED, 0, _NO_AGENT, 0, 0, digest(body), b"", body))
        hole = hole[size:]
    return bytes(out)


def pieces(data: bytes, base: int) -> Iterator[Record | Bad]:
    """The records of a part of a segment that begins at offset `base`, with a Bad for what lies between them."""
    position = 0
    last_mark: int | None = None
    while position < len(data):
        record = record_at(data, position, base)
        if record is not None:
            yield record
            position = record.end - base
            continue
        if last_mark is None:
            last_mark = _last_mark(data, base)
        # Every record is at least a header long, so none begins sooner.
        resume = data.find(MAGIC, position + HEADER_BYTES)
        while resume >= 0 and record_at(data, resume, base) is None:
            resume = data.find(MAGIC, resume + 1)
        if resume < 0:
            resume = len(data)
        yield Bad(base + position, base + resume, last_mark > position)
        position = resume


def _last_mark(data: bytes, base: int) -> int:
    """Position of the last mark; -1 if there is none."""
    position = data.rfind(MAGIC)
    while position >= 0:
        record = record_at(data, position, base)
        if record is not None and record.kind is Kind.MARK:
            return position
        position = data.rfind(MAGIC, 0, position)
    return -1


def record_at(data: bytes, position: int, base: int) -> Record | None:
    """The record at a position if every byte of it verifies."""
    head = _head_at(data, position, base)
    if head is None:
        return None
    _, body_size, _, kind, flags, note_size, received, agent, epoch, seq, wanted = head
    body_at = position + HEADER_BYTES + note_size
    if body_at + body_size > len(data):
        return None
    body = data[body_at : body_at + body_size]
    if digest(body) != wanted:
        return None
    note = data[position + HEADER_BYTES : body_at]
    return Record(
        base + position, _KINDS[kind], received, _agent_id(agent), epoch, seq, wanted, note, body, flags
    )


class Extent(NamedTuple):
    """What the header of a record says."""

    kind: Kind
    end: int
    """Offset behind the record."""


def extent_at(data: bytes, position: int, base: int) -> Extent | None:
    """How far the record at a position reaches, if its header and note verify; its batch may be spoilt, or not there."""
    head = _head_at(data, position, base)
    if head is None:
        return None
    _, body_size, _, kind, _, note_size, *_ = head
    return Extent(_KINDS[kind], base + position + HEADER_BYTES + note_size + body_size)


def _head_at(data: bytes, position: int, base: int) -> tuple[Any, ...] | None:
    """The fields of the header at a position if it and the note behind it verify."""
    if len(data) - position < HEADER_BYTES:
        return None
    head = _HEADER.unpack_from(data, position)
    magic, body_size, crc, kind, _, note_size, _, _, _, seq, _ = head
    if magic != MAGIC or note_size > MAX_NOTE_BYTES or body_size > MAX_BODY_BYTES or kind not in _KINDS:
        return None
    # A batch may contain what looks like a mark; only here would it have to know where it will lie.
    if kind == Kind.MARK and seq != base + position:
        return None
    covered = position + HEADER_BYTES
    if covered + note_size > len(data):
        return None
    note = data[covered : covered + note_size]
    if zlib.crc32(note, zlib.crc32(data[position + _AFTER_CRC : covered], body_size)) != crc:
        return None
    return head


def body_size_of(head: bytes) -> int:
    """How long the batch is that belongs behind a head that `frame` made."""
    size: int = _HEADER.unpack_from(head)[1]
    return size


def record_of(offset: int, head: bytes, body: bytes) -> Record:
    """The record of two pieces that `frame` made and nobody had their hands on: nothing is verified."""
    _, _, _, kind, flags, _, received, agent, epoch, seq, digest_ = _HEADER.unpack_from(head)
    note = head[HEADER_BYTES:]
    return Record(offset, _KINDS[kind], received, _agent_id(agent), epoch, seq, digest_, note, body, flags)


@lru_cache(_KNOWN_AGENTS)
def _agent_id(agent: bytes) -> AgentId:
    return AgentId(str(uuid.UUID(bytes=agent)))
