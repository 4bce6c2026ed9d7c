"""How far the log is confirmed by the brokers, across restarts.

Written after the delivery reports, so it is never ahead. It lies in one sector and is overwritten in place, without
waiting for the disk: a kill loses nothing, a power cut at most what the disk had not written yet. Whatever is
lost costs duplicates with identical bytes, and no usage; without the file all that the log has is published once more.
The log deletes only what is confirmed: what is before its beginning was, whatever is written here.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from collector.errors import CollectorError
from wire.daemon.files import sync_directory
from wire.daemon.journal import Journal

CURSOR_FILE = "kafka.cursor"
LINE_BYTES = 30
"""What lies behind them is nobody's: whatever the file was, `advance` makes it a cursor."""

log = Journal("collector.kafka")


class Cursor:
    """One file; `offset` is in the whole log."""

    def __init__(self, path: Path, log_begin: int, log_end: int) -> None:
        """CollectorError when the file cannot be used. One that cannot be true is as good as none."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            sync_directory(path.parent)
            said = os.pread(self._fd, LINE_BYTES, 0)
        except OSError as error:
            raise CollectorError(f"{path}: {error.strerror}; make it writable for this user") from error
        self.offset = _read(said)
        if said and not 0 <= self.offset <= log_end:
            log.warning("cursor_unusable", path=str(path), said=self.offset, log_end=log_end)
        if not 0 <= self.offset <= log_end:
            self.offset = 0
            # What is longer than a line would show behind every line to come.
            os.ftruncate(self._fd, 0)
        self.offset = max(self.offset, log_begin)

    def advance(self, offset: int) -> None:
        """Everything before `offset` is confirmed. OSError leaves the old one."""
        os.pwrite(self._fd, _line(offset), 0)
        self.offset = offset

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.fdatasync(self._fd)
        os.close(self._fd)


def _line(offset: int) -> bytes:
    """Of one length always, so that a shorter one leaves no rest."""
    said = b"%020d" % offset
    return b"%s %08x\n" % (said, zlib.crc32(said))


def _read(said: bytes) -> int:
    """-1 if it is not what `advance` wrote."""
    digits = said[:20]
    return int(digits) if digits.isdigit() and said == _line(int(digits)) else -1
