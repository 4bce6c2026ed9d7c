"""How far a file was imported: a small file beside it, `.NAME.import`, gone when the import is through.

Only to save time. Without it an import begins at the start, and what came in before is a duplicate.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import msgspec

from wire.daemon.files import replace_durably

_EVERY_SECONDS = 1.0
_PIECE_BYTES = 1 << 20


class _Mark(msgspec.Struct):
    offset: int
    """Everything before has its answer."""
    digest: str
    """SHA-256 of these bytes: another file of the same name begins anew."""
    refused: int
    """Of the batches before it, how many did not come in."""


class Bookmark:
    """`offset`, `refused`: where an earlier import of this file ended; 0 if there was none, or the file is another."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._path = file.with_name(f".{file.name}.import")
        self._hasher = hashlib.sha256()
        self._hashed = 0
        self._last = time.monotonic()
        self.offset = self.refused = 0
        with contextlib.suppress(OSError, msgspec.DecodeError):
            mark = msgspec.json.decode(self._path.read_bytes(), type=_Mark)
            if self._digest(mark.offset) == mark.digest:
                self.offset, self.refused = mark.offset, mark.refused
        if not self.offset:
            self._hasher, self._hashed = hashlib.sha256(), 0

    def move(self, offset: int, refused: int) -> None:
        """Everything before `offset` has its answer. Written once a second."""
        self.offset, self.refused = offset, refused
        if time.monotonic() - self._last >= _EVERY_SECONDS:
            self._last = time.monotonic()
            self.keep()

    def keep(self) -> None:
        """Write it now. A directory that cannot be written costs the next run only time."""
        with contextlib.suppress(OSError):
            mark = _Mark(self.offset, self._digest(self.offset), self.refused)
            replace_durably(self._path, msgspec.json.encode(mark))

    def remove(self) -> None:
        """The file is through."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _digest(self, offset: int) -> str:
        """Of the file's first bytes."""
        with self._file.open("rb") as file:
            file.seek(self._hashed)
            while self._hashed < offset and (piece := file.read(min(_PIECE_BYTES, offset - self._hashed))):
                self._hasher.update(piece)
                self._hashed += len(piece)
        return self._hasher.hexdigest() if self._hashed == offset else ""
