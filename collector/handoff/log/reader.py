"""Reading the log, also while it is written: what is not proven yet is not damaged, but not there yet."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from collector.handoff.log.files import DamagedLog, damage_text, segment_path, segments
from collector.handoff.log.recent import Recent
from collector.handoff.log.records import (
    HEADER_BYTES,
    MAX_NOTE_BYTES,
    MAX_RECORD_BYTES,
    Bad,
    Kind,
    Record,
    pieces,
    record_at,
)


class Damage(NamedTuple):
    """A place that had been synced and cannot be read."""

    segment: str
    offset: int
    """In the whole log."""

    @property
    def place(self) -> str:
        """For people: the byte within the segment."""
        return f"{self.segment} at byte {self.offset - int(Path(self.segment).stem)}"


def scan(directory: Path, start: int = 0, end: int | None = None) -> Iterator[Record | Damage]:
    """Every record from offset `start`, and every damaged place. Marks are the log's own and not shown."""
    bases = segments(directory)
    for index, base in enumerate(bases):
        following = bases[index + 1] if index + 1 < len(bases) else None
        if following is not None and following <= start:
            continue
        path = segment_path(directory, base)
        size = path.stat().st_size
        if end is not None:
            size = min(size, max(0, end - base))
        at = max(0, start - base)
        for piece in pieces(_read(path, at, size), base + at):
            if isinstance(piece, Bad):
                if piece.proven or following is not None:
                    yield Damage(path.name, piece.offset)
            elif piece.kind is not Kind.MARK:
                yield piece
        if following is not None and following != base + size:
            yield Damage(path.name, base + size)


def records_at(directory: Path, places: Iterable[tuple[int, int]]) -> list[Record | None]:
    """The records at (offset, size of the batch); None where there is none that verifies. OSError is the disk's."""
    bases = segments(directory)
    found = []
    for offset, size in places:
        base = bases[bisect_right(bases, offset) - 1]
        with segment_path(directory, base).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), HEADER_BYTES + MAX_NOTE_BYTES + size, offset - base)
        found.append(record_at(data, 0, offset))
    return found


class Tail:
    """Reads on from an offset to wherever somebody knows the log to be durable, in parts of bounded size."""

    def __init__(self, directory: Path, offset: int, recent: Recent | None = None) -> None:
        """`recent`: what the writer still has in memory, which is not read back."""
        self.offset = offset
        """Of the next record."""
        self._recent = recent
        self._directory = directory
        self._base = -1
        self._fd = -1

    def read(self, end: int, most_bytes: int) -> list[Record]:
        """The next whole records before `end`, marks too: about `most_bytes` of them, but one at least unless there is
        none. DamagedLog when what is there cannot be read; OSError is the disk's.
        """
        if self.offset >= end:
            return []
        if self._recent is not None and (records := self._recent.take(self.offset, end, most_bytes)):
            self.offset = records[-1].end
            return records
        data = self._bytes(min(end - self.offset, most_bytes))
        if not data:
            self._close()  # the segment is at its end, and the next one is named by this offset
            data = self._bytes(min(end - self.offset, most_bytes))
        records = list(_sound(data, self.offset))
        if not records and len(data) < end - self.offset:
            data = self._bytes(min(end - self.offset, MAX_RECORD_BYTES))
            records = list(_sound(data, self.offset))
        if not records:
            raise DamagedLog(damage_text(segment_path(self._directory, self._base), self.offset))
        self.offset = records[-1].end
        return records

    def close(self) -> None:
        self._close()

    def _bytes(self, size: int) -> bytes:
        if self._fd < 0:
            bases = segments(self._directory)
            self._base = bases[bisect_right(bases, self.offset) - 1]
            self._fd = os.open(segment_path(self._directory, self._base), os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._fd, size, self.offset - self._base)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _sound(data: bytes, base: int) -> Iterator[Record]:
    """The records from the beginning of `data` up to the first that is not whole."""
    position = 0
    while (record := record_at(data, position, base)) is not None:
        yield record
        position = record.end - base


def unfinished_bytes(directory: Path) -> int:
    """Bytes at the end that no proof covers and that cannot be read: a group being written, or torn by a crash."""
    bases = segments(directory)
    if not bases:
        return 0
    path = segment_path(directory, bases[-1])
    size = path.stat().st_size
    for piece in pieces(_read(path, 0, size), bases[-1]):
        if isinstance(piece, Bad) and not piece.proven:
            return bases[-1] + size - piece.offset
    return 0


def _read(path: Path, at: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(max(0, end - at))
