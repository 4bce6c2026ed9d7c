"""One process at a time has a ledger open: whoever holds flock(2) on STATE_DIR/lock. ClickHouse inside a program takes a
second one for damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from ledger.errors import LedgerAway, LedgerError

MAX_HOLDER_BYTES = 200


class Lock:
    """Held from `take` to `close`, or to the end of the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def take(self, holder: str) -> None:
        """Without waiting. `holder`: what others are told of who has it. LedgerAway while another has it; LedgerError
        if there can be no lock at all."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LedgerError(
                f"{self._path}: {error.strerror}; set `state_dir` to a directory that this user may write"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = _printable(os.pread(fd, MAX_HOLDER_BYTES, 0))
            os.close(fd)
            raise LedgerAway(
                f"{self._path.parent}: open in {said or 'another process'}; wait for it, or end it"
            ) from None
        self._fd = fd
        # Only for people: on a full disk it says nothing, and holds all the same.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} ({holder})\n".encode()[:MAX_HOLDER_BYTES], 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _printable(data: bytes) -> str:
    return "".join(c for c in data.decode(errors="replace") if c.isprintable())
