"""What is beside the segments in the log's directory, and the lock that lets one write at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from collector.errors import CollectorError


class LogError(CollectorError):
    """The log cannot be used; the message names the fix."""


class DamagedLog(LogError):
    """Bytes that were synced have changed since."""


def torn_path(directory: Path, offset: int) -> Path:
    """Where the bytes are kept that a start cut off at `offset`."""
    return directory / f"{offset:020d}.torn"


def damage_text(segment: Path, offset: int) -> str:
    """What a person is told of a place that was synced and has changed since; `offset` in the whole log."""
    return (
        f"{segment} is damaged at byte {offset - int(segment.stem)}, inside what had been synced: look with"
        " `weighbridge-collector log verify`, then `weighbridge-collector log repair`"
    )


def lock(directory: Path) -> int:
    """A descriptor that holds the log until it is closed. LogError while somebody else holds it."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise LogError(f"{directory} is in use by another collector; stop it first") from None
    return fd


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
