"""Files and their names, so that they survive a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write beside it, sync, rename, sync the directory: a reader finds the old bytes or the new, never a part.
    OSError leaves the old file as it was. What root writes in somebody's directory is that somebody's: a daemon must be
    able to read what an administrator made for it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            owner = path.parent.stat()
            if os.geteuid() == 0 and owner.st_uid != 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_read_only(where: int | Path) -> bool:
    """Whether the file system of a file takes nothing now, whatever became of it while the file was open.

    A file system that the kernel has made read-only under open files (sysrq u) still takes writes into the page cache,
    and fsync(2) succeeds without writing anything (fs/ext4/fsync.c: `if (sb_rdonly(...)) goto out`).
    """
    return bool(os.statvfs(where).f_flag & os.ST_RDONLY)
