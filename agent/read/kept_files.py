"""Small kernel files that are read again and again: kept open and read by pread.

A file that is not there is asked for again soon, since a runtime makes a container's cgroups one after the other, and then
ever more seldom, since a controller may be enabled later, but hardly ever is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

READ_BYTES = 8_192
MAX_FILE_BYTES = 1 << 20
RETRY_MISSING_EVERY = 30
"""Readings between two looks for a file that was never there. It begins with one, and doubles up to this."""

GONE = frozenset((errno.ENODEV, errno.ENOENT))
_ABSENT = GONE | {errno.EOPNOTSUPP, errno.EINVAL}


class Gone(Exception):
    """The cgroup ended while it was being read."""


class File:
    """One kernel file and its kept descriptor, -1 when it is not open."""

    __slots__ = ("fd", "missing_until", "path", "retry_after")

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self.missing_until = 0
        self.retry_after = 1
        """Readings to the next look, if it is not there."""


class KeptFiles:
    """The descriptors of one reader, at most `max_open`; beyond that files are opened for each read."""

    def __init__(self, tree: str, max_open: int) -> None:
        self._prefix = f"{tree}/"
        self._max_open = max_open
        self.open = 0
        self.round = 0
        self.complete = True
        """False once a file of this round could not be read for another reason than that it is not there."""

    def begin(self) -> None:
        """The next reading."""
        self.round += 1
        self.complete = True

    def there(self, file: File | None) -> bool:
        """Whether a controller's first file is worth a look: its others are absent where it is."""
        return file is not None and file.missing_until <= self.round

    def text(self, file: File | None) -> bytes | None:
        """The file's text; None when it cannot be read now. Raises Gone when the *tree's* cgroup has ended:
        a cgroup missing from another hierarchy costs its fields only, since ended units never come back.
        """
        if file is None or file.missing_until > self.round:
            return None
        try:
            if file.fd >= 0:
                data = os.pread(file.fd, READ_BYTES, 0)
                return data if len(data) < READ_BYTES else _whole(file.fd)
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._refused(file, error)
            if file.fd < 0:
                file.missing_until = self.round + file.retry_after
                file.retry_after = min(2 * file.retry_after, RETRY_MISSING_EVERY)
            return None
        try:
            data = _whole(fd)
        except OSError as error:
            os.close(fd)
            self._refused(file, error)
            return None
        file.missing_until = 0
        file.retry_after = 1
        if self.open < self._max_open:
            file.fd = fd
            self.open += 1
        else:
            os.close(fd)
        return data

    def close(self, files: Iterable[File | None]) -> None:
        for file in files:
            if file is not None and file.fd >= 0:
                os.close(file.fd)
                file.fd = -1
                self.open -= 1

    def _refused(self, file: File, error: OSError) -> None:
        if error.errno == errno.ENODEV and file.path.startswith(self._prefix):
            raise Gone from None
        if error.errno not in _ABSENT:
            self.complete = False


def _whole(fd: int) -> bytes:
    data = os.pread(fd, READ_BYTES, 0)
    while len(data) % READ_BYTES == 0 and data and len(data) < MAX_FILE_BYTES:
        more = os.pread(fd, READ_BYTES, len(data))
        if not more:
            break
        data += more
    return data
