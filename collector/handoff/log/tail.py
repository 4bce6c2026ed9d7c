"""Following the log from within the collector, which knows how far it is durable."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from collector.handoff.log.files import DamagedLog, damage_text
from collector.handoff.log.recent import Recent
from wire.log.records import MAX_RECORD_BYTES, Record, record_at
from wire.log.segments import segment_path, segments


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
