"""Reading the log, also while it is written: what is not proven yet is not damaged, but not there yet."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from wire.log.records import HEADER_BYTES, MAX_NOTE_BYTES, Bad, Kind, Record, pieces, record_at
from wire.log.segments import segment_path, segments


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
    """Every record from offset `start`, and every damaged place. Marks are the log's own and not shown. A log that is pruned
    meanwhile begins later.
    """
    bases = segments(directory)
    for index, base in enumerate(bases):
        following = bases[index + 1] if index + 1 < len(bases) else None
        if following is not None and following <= start:
            continue
        path = segment_path(directory, base)
        at = max(0, start - base)
        try:
            size = path.stat().st_size
            if end is not None:
                size = min(size, max(0, end - base))
            data = _read(path, at, size)
        except FileNotFoundError:
            if base in segments(directory) or following is None:
                raise
            continue
        for piece in pieces(data, base + at):
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
    found: list[Record | None] = []
    for offset, size in places:
        if not bases or offset < bases[0]:
            found.append(None)
            continue
        base = bases[bisect_right(bases, offset) - 1]
        with segment_path(directory, base).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), HEADER_BYTES + MAX_NOTE_BYTES + size, offset - base)
        found.append(record_at(data, 0, offset))
    return found


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
