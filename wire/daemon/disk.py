"""A start on a disk that is full or read-only. A restart would not mend it, so the daemon waits, and says for what."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wire.daemon.files import is_read_only
from wire.daemon.journal import Journal

TRY_AGAIN_SECONDS = 5.0
READ_ONLY_PATIENCE_SECONDS = 60.0
"""A service sees the mounts of its start: one that was read-only then stays so for it, whoever mounts it anew."""
PROBE_BYTES = 256 << 10
"""More than what a daemon writes before it minds for itself how much is free (the collector's `log.min_free`)."""
_PASSES = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))
"""What a disk may say that says something else tomorrow. All else is for those who open files there to name."""

log = Journal("disk")


async def wait_for_disk(
    directories: Sequence[Path],
    waiting: Callable[[str], object],
    what: str,
    own_error: Callable[[str], Exception],
) -> None:
    """Until each directory takes a small file. `waiting` is told why not, again and again; the journal once, as
    `WHAT_unavailable`. `own_error` is raised where only another start can find the disk writable.
    """
    told = ""
    begun = time.monotonic()
    while trouble := await asyncio.to_thread(_refusal, directories):
        if trouble != told:
            log.error(f"{what}_unavailable", code="METER-001", trouble=trouble)
            told = trouble
        waiting(trouble)
        read_only = any(is_read_only(path) for path in directories if path.exists())
        if read_only and time.monotonic() - begun > READ_ONLY_PATIENCE_SECONDS:
            raise own_error(trouble)
        await asyncio.sleep(TRY_AGAIN_SECONDS)
    if told:
        log.info(f"{what}_recovered")


def _refusal(directories: Sequence[Path]) -> str:
    for directory in directories:
        scratch = directory / f".{os.getpid()}.probe"
        try:
            with scratch.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in _PASSES:
                return f"{directory}: {error.strerror}; free its disk or mount it writable"
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()
    return ""
