"""A collector's durable log, followed from another process while it is written.

Strategy. Only what is proven is read: a mark, or a segment that follows, says that everything before it was synced. What
lies behind the last proof may be gone after a power cut, other bytes would take its place, and our position would be in
nowhere. So each look goes over headers only, from the position to the last mark there is (`_walk`), and what lies
before that is read and verified to the last byte. A position is never behind a mark that nothing proves yet.

Failure model. A failed write is cut off and written anew, so nothing found behind the proof is remembered from look to
look. A file may be exchanged (`log repair`, a restored copy): each look compares the inode. A header that cannot be read
is a group being written until a mark is found behind it; then it is damage, and a person decides.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ledger.consume.arrival import NOBODY, Arrival, Kind, bounded_reason
from ledger.errors import LedgerError
from wire.log import records, segment_path, segments
from wire.log.records import (
    HEADER_BYTES,
    MAGIC,
    MAX_NOTE_BYTES,
    MAX_RECORD_BYTES,
    Extent,
    Record,
    extent_at,
    record_at,
)

PLACE = "log"
POLL_SECONDS = 0.1
WALK_BYTES = 8 << 20
"""About so far one look goes, when there is much to catch up on."""
_PIECE_BYTES = 256 << 10

_KINDS = {
    records.Kind.ACCEPTED: Kind.BOOKABLE,
    records.Kind.RELEASED: Kind.BOOKABLE,
    records.Kind.PARKED: Kind.PARKED,
    records.Kind.REJECTED: Kind.REJECTED,
    records.Kind.REFUSED: Kind.REFUSED,
    records.Kind.ADOPTED: Kind.ADOPTED,
}
"""The others are the collector's own."""
_REASONED = frozenset((Kind.REJECTED, Kind.REFUSED))


class LogSource:
    """Reads a log directory that it may not write."""

    def __init__(self, directory: Path, positions: dict[str, int]) -> None:
        self.places = (PLACE,)
        self.trouble = ""
        self.lost: dict[str, tuple[int, int]] = {}
        self._directory = directory
        self._offset = positions.get(PLACE)
        """Of the next record; None: wherever the log begins."""
        self._proven = 0
        """Everything before this offset had been synced."""
        self._segment: _Segment | None = None

    def read(self, most_bytes: int, wait_seconds: float) -> list[Arrival]:
        """LedgerError: the log cannot be read, is damaged, or is another one than `positions` is of."""
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                arrivals = self._next(most_bytes)
            except LedgerError:
                self.close()
                raise
            except OSError as error:
                self.close()
                raise LedgerError(_unreadable(self._directory, error)) from error
            left = deadline - time.monotonic()
            if arrivals or left <= 0:
                return arrivals
            time.sleep(min(POLL_SECONDS, left))

    def positions(self) -> dict[str, int]:
        return {} if self._offset is None else {PLACE: self._offset}

    def lag(self) -> int:
        """Bytes. What is being written counts, the mark at the end does not. LedgerError when nobody can tell."""
        try:
            bases = self._bases()
            if not bases:
                return 0
            end = bases[-1] + segment_path(self._directory, bases[-1]).stat().st_size
        except OSError as error:
            raise LedgerError(_unreadable(self._directory, error)) from error
        left = end - (bases[0] if self._offset is None else self._offset)
        return 0 if left <= HEADER_BYTES else left

    def close(self) -> None:
        """Let go of the file; `read` opens it again."""
        if self._segment is not None:
            os.close(self._segment.fd)
            self._segment = None
        self._proven = 0

    def _next(self, most_bytes: int) -> list[Arrival]:
        """What is there now, past all that is no arrival."""
        while (segment := self._proving()) is not None:
            assert self._offset is not None
            found = segment.sound(self._offset, self._proven, most_bytes)
            if not found:
                raise LedgerError(_damaged(segment.path, self._offset))
            self._offset = found[-1].end
            if arrivals := [arrival for record in found if (arrival := arrival_of(record)) is not None]:
                return arrivals
        return []

    def _proving(self) -> _Segment | None:
        """The segment in which the next record lies, if that is proven by now."""
        while (segment := self._segment or self._open()) is not None:
            assert self._offset is not None
            if self._proven > self._offset:
                return segment
            status = segment.path.stat()
            if status.st_ino != segment.inode:
                self.close()  # `log repair` was here, or a restored copy
                continue
            look = (status.st_size, status.st_mtime_ns)
            if look != segment.looked and self._look(segment, segment.base + status.st_size):
                return segment
            segment.looked = look
            following = _following(segments(self._directory), segment.base)
            if following is None:
                return None
            self._proven = following
            if following <= self._offset:
                self.close()
        return None

    def _look(self, segment: _Segment, end: int) -> bool:
        """Whether a mark before `end`, where the file ends now, proves anything new."""
        assert self._offset is not None
        if end < self._offset:
            raise LedgerError(_elsewhere(self._directory, self._offset, f"it ends at {end}"))
        walk = segment.walk(self._offset, end)
        place = walk.unreadable
        if walk.proof <= self._offset and place is not None and segment.mark_behind(place, end):
            # Its writer may have been in the middle of it; of what a mark is behind, it no longer is.
            walk = segment.walk(self._offset, end)
            if walk.unreadable == place == self._offset:
                raise LedgerError(_damaged(segment.path, place))
            if walk.unreadable == place:
                self._proven = place
        self._proven = max(self._proven, walk.proof)
        return self._proven > self._offset

    def _open(self) -> _Segment | None:
        """The segment of the next record. None: there is no log yet."""
        bases = self._bases()
        self.trouble = (
            ""
            if bases
            else f"no log in {self._directory} yet: is that `log.directory` of a collector that runs?"
        )
        if not bases:
            if self._offset:
                raise LedgerError(_elsewhere(self._directory, self._offset, "there is none"))
            return None
        if self._offset is None:
            self._offset = bases[0]
        if self._offset < bases[0]:
            raise LedgerError(_pruned(self._directory, self._offset, bases[0]))
        base = bases[bisect_right(bases, self._offset) - 1]
        path = segment_path(self._directory, base)
        segment = self._segment = _Segment(path, base, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self._proven = _following(bases, base) or 0
        if base < self._offset:
            self._check_position(segment, self._offset)
        return segment

    def _bases(self) -> list[int]:
        try:
            with os.scandir(self._directory):  # what may not be read would look empty
                return segments(self._directory)
        except FileNotFoundError:
            return []

    def _check_position(self, segment: _Segment, offset: int) -> None:
        """A position is at the beginning of a record, or this is not the log that it is of."""
        end = segment.base + os.fstat(segment.fd).st_size
        if offset > end:
            raise LedgerError(_elsewhere(self._directory, offset, f"it ends at {end}"))
        for position, extent in segment.extents(segment.base, end):
            if position == offset:
                return
            if extent is None and not segment.begins_at(offset, end):
                raise LedgerError(_damaged(segment.path, position))
            if extent is None:
                return
            if extent.end > offset:
                raise LedgerError(_elsewhere(self._directory, offset, "no record begins there"))


class _Walk(NamedTuple):
    proof: int
    """Offset of the last mark; 0 if there is none."""
    unreadable: int | None
    """Where no header can be read."""


class _Segment:
    """One file, open. What is read of it at once is bounded, whatever its size."""

    def __init__(self, path: Path, base: int, fd: int) -> None:
        self.path, self.base, self.fd = path, base, fd
        self.inode = os.fstat(fd).st_ino
        self.looked = (-1, -1)
        """Size and time of the last change when there was nothing new."""
        self._searched = (0, 0)
        """(place that cannot be read, offset up to which no mark is behind it)"""

    def extents(self, start: int, end: int) -> Iterator[tuple[int, Extent | None]]:
        """From header to header. The last one is None where there is no header, or reaches behind `end` where the record
        is not whole; less than a header is not there yet."""
        position = start
        data, data_at = b"", start
        while end - position >= HEADER_BYTES:
            if position + HEADER_BYTES + MAX_NOTE_BYTES > data_at + len(data):
                data, data_at = self._bytes(position, min(_PIECE_BYTES, end - position)), position
            extent = extent_at(data, position - data_at, data_at)
            yield position, extent
            if extent is None or extent.end > end:
                return
            position = extent.end

    def walk(self, start: int, end: int) -> _Walk:
        """To the last mark before `end`, but not much farther than WALK_BYTES."""
        proof = 0
        for position, extent in self.extents(start, end):
            if extent is None:
                return _Walk(proof, position)
            if extent.kind is records.Kind.MARK:
                proof = position
                if proof - start > WALK_BYTES:
                    break
        return _Walk(proof, None)

    def begins_at(self, place: int, end: int) -> bool:
        """Whether a record can begin there."""
        return all(extent is not None for _, extent in islice(self.extents(place, end), 1))

    def mark_behind(self, place: int, end: int) -> bool:
        """Whether there is a mark between a place that cannot be read and `end`. Goes on from where it was the last time."""
        searched_for, position = self._searched
        if searched_for != place or position > end:
            position = place
        while end - position >= HEADER_BYTES:
            data = self._bytes(position, min(_PIECE_BYTES, end - position))
            at = data.find(MAGIC)
            while at >= 0:
                extent = extent_at(data, at, position)
                if extent is not None and extent.kind is records.Kind.MARK:
                    return True
                at = data.find(MAGIC, at + 1)
            if len(data) < HEADER_BYTES:
                break
            position += len(data) - HEADER_BYTES + 1
        self._searched = (place, position)
        return False

    def sound(self, start: int, end: int, most_bytes: int) -> list[Record]:
        """The records from `start` up to the first that does not verify: `most_bytes` of them, but one at least."""
        found = _sound(self._bytes(start, min(end - start, most_bytes)), start)
        if not found and most_bytes < end - start:
            found = _sound(self._bytes(start, min(end - start, MAX_RECORD_BYTES)), start)[:1]
        return found

    def _bytes(self, start: int, size: int) -> bytes:
        return os.pread(self.fd, size, start - self.base)


def _sound(data: bytes, base: int) -> list[Record]:
    found, position = [], 0
    while (record := record_at(data, position, base)) is not None:
        found.append(record)
        position = record.end - base
    return found


def arrival_of(record: Record) -> Arrival | None:
    """None: the log's own, or what another collector delivers."""
    kind = _KINDS.get(record.kind)
    if kind is None:
        return None
    reason = bounded_reason(record.note) if kind in _REASONED else ""
    if kind is Kind.REFUSED and record.agent_id == NOBODY and not reason:
        reason = "bytes that were damaged on the collector's disk, behind `log repair`"
    return Arrival(
        kind, record.received_at_unix_ns, record.agent_id, record.epoch, record.seq, record.digest, reason, record.body
    )  # fmt: skip


def _following(bases: list[int], base: int) -> int | None:
    at = bisect_right(bases, base)
    return bases[at] if at < len(bases) else None


def _damaged(segment: Path, offset: int) -> str:
    return (
        f"{segment} is damaged at byte {offset - int(segment.stem)}, inside what had been synced: look with"
        " `weighbridge-collector log verify`, then stop the collector and `weighbridge-collector log repair`; reading goes"
        " on behind it by itself"
    )


def _elsewhere(directory: Path, offset: int, why: str) -> str:
    return (
        f"the log in {directory} was read up to {offset}, and now {why}: it was replaced, or restored from an older copy."
        " If it is the right one, `weighbridge-ledger reread` begins anew with it; what is booked stays booked once"
    )


def _pruned(directory: Path, offset: int, begin: int) -> str:
    return _elsewhere(directory, offset, f"it begins at {begin}") + (
        ". If its collector prunes it (`log.keep`, `log.max_size`), this ledger has to read Kafka: set `source.kafka`"
    )


def _unreadable(directory: Path, error: OSError) -> str:
    fix = (
        "add this user to the group that owns it (weighbridge-collector)"
        if isinstance(error, PermissionError)
        else "mend the disk or mount it"
    )
    return f"log {error.filename or directory}: {error.strerror}; {fix}"
