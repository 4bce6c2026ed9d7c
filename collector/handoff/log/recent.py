"""What was written last, still in memory: whoever follows the log closely need not read it back.

Only a shortcut. It holds what the log has synced, in the log's order, byte for byte, and a reader that finds nothing here
reads the disk. What is taken is gone; when nobody takes it, it is given up at the bound.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from wire.log.records import Record, body_size_of, record_of

Pieces = Sequence[bytes]
"""Of records, as `frame` makes them: a head, and the body behind it if there is one."""


class Recent:
    """One writer, one reader."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._begin = self._end = 0
        """Offsets of what is held."""
        self._pieces: deque[bytes] = deque()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._end - self._begin

    def add(self, offset: int, pieces: Pieces) -> None:
        """These are durable now, from `offset` on."""
        size = sum(map(len, pieces))
        with self._lock:
            if offset != self._end or offset + size - self._begin > self._most:
                self._pieces.clear()
                self._begin = offset
            self._end = offset + size
            if size <= self._most:
                self._pieces.extend(pieces)
            else:
                self._begin = self._end

    def take(self, offset: int, end: int, most_bytes: int) -> list[Record]:
        """Records from `offset` on, none behind `end`, `most_bytes` at most but one if it is there; empty: look on disk."""
        taken: list[tuple[int, bytes, bytes]] = []
        size = 0
        with self._lock:
            if self._begin > offset:
                return []
            while self._pieces:
                body_size = body_size_of(self._pieces[0])
                record_size = len(self._pieces[0]) + body_size
                if self._begin + record_size > end or (taken and size + record_size > most_bytes):
                    break
                head = self._pieces.popleft()
                body = self._pieces.popleft() if body_size else b""
                if self._begin >= offset:
                    taken.append((self._begin, head, body))
                    size += record_size
                self._begin += record_size
        if not taken or taken[0][0] != offset:
            return []
        return [record_of(at, head, body) for at, head, body in taken]
