"""The one who appends. One thread takes everything that waits, writes it in one go, syncs, and reports."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from collector.handoff.log.files import (
    DamagedLog,
    LogError,
    damage_text,
    lock,
    sync_directory,
    torn_path,
)
from collector.handoff.log.prune import Keep, Segment, beginning
from collector.handoff.log.recent import Recent
from wire.daemon.files import is_read_only, replace_durably
from wire.daemon.journal import Journal
from wire.log.records import HEADER_BYTES, Bad, Kind, mark, pieces
from wire.log.segments import segment_path, segments

SEAL_AFTER_SECONDS = 1.0
"""With nothing to write for so long, the last group gets its proof: one more sync, but none under load."""
KEPT_TORN_TAILS = 16
FORGET_BYTES = 8 << 20
"""Of a log whose reader is given it in memory, about so much stays in the page cache: it would only push out what others
read, and finding new pages costs more than writing them (docs/decisions/0026)."""
_PIECES_AT_ONCE = 1_000
"""At most IOV_MAX (1024) go into one pwritev(2)."""

log = Journal("collector.log")

Done = Callable[[int | None], object]
"""Called from the log's thread: offset behind the group's last byte, or None if the group is not durable."""


class DurableLog:
    """Appends. One per directory and process."""

    def __init__(
        self,
        directory: Path,
        segment_bytes: int,
        min_free_bytes: int,
        synced_end: int = 0,
        recent: Recent | None = None,
    ) -> None:
        """Lock, open, cut a torn tail off. `synced_end`: an offset that somebody else knows to be durable, a
        proof beside the log's own. `recent`: where to leave what is written for a reader. DamagedLog, LogError name
        what to do.
        """
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._min_free_bytes = min_free_bytes
        self._recent = recent
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock_fd = lock(directory)
        except OSError as error:
            raise LogError(
                f"log directory {directory}: {error.strerror}; make it writable for this user or set `log.directory`"
            ) from error
        self.torn_bytes = 0
        self.begin: int
        """Offset of the first byte that is still there."""
        self._fd = -1
        self._base: int
        self._size: int
        self._sealed: bool
        """Whether the last thing in the log is a mark."""
        self._forgotten = 0
        """Up to here the page cache was told that nobody will read this segment soon."""
        self._waiting: list[tuple[list[bytes], Done]] = []
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self.trouble = ""
        self._busy_since: float | None = None
        try:
            self._open_tail(synced_end)
        except OSError as error:
            self._let_go()
            raise LogError(_unwilling(directory, error.strerror or str(error))) from error
        except BaseException:
            self._let_go()
            raise
        self._thread = threading.Thread(target=self._run, name="durable-log", daemon=True)
        self._thread.start()

    @property
    def end(self) -> int:
        """Offset behind the last durable byte."""
        return self._base + self._size

    @property
    def alive(self) -> bool:
        """Whether the thread that writes still runs."""
        return self._thread.is_alive()

    @property
    def free_bytes(self) -> int:
        """What its disk has left before appends are refused; below zero they are."""
        return shutil.disk_usage(self.directory).free - self._min_free_bytes

    @property
    def refusal(self) -> str:
        """Why appends are refused, or would be if there were any; empty: they are not."""
        if self.trouble:
            return self.trouble
        try:
            if is_read_only(self.directory):
                return _unwilling(self.directory, os.strerror(errno.EROFS))
            return "" if self.free_bytes > 0 else _unwilling(self.directory, self._no_room)
        except OSError as error:
            return _unwilling(self.directory, error.strerror or str(error))

    @property
    def _no_room(self) -> str:
        return f"less than {self._min_free_bytes} bytes free (`log.min_free`)"

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    @property
    def busy_seconds(self) -> float:
        """How long the disk has been at the present write; 0 if there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def append(self, frames: list[bytes], done: Done) -> None:
        """Queue the pieces of records, as `frame` makes them. Groups become durable in the order of the calls; an empty
        one is a barrier."""
        with self._wake:
            self._waiting.append((frames, done))
            self._queued_bytes += sum(map(len, frames))
            self._wake.notify()

    def append_and_wait(self, frames: list[bytes]) -> int | None:
        """`append`, for a caller that has nothing else to do: what `done` would have been told."""
        told: list[int | None] = []
        ready = threading.Event()

        def done(end: int | None) -> None:
            told.append(end)
            ready.set()

        self.append(frames, done)
        ready.wait()
        return told[0]

    def prune(self, keep: Keep, needed_from: Callable[[], int]) -> None:
        """Delete from the beginning what is beyond `keep`. `needed_from`: the offset from which on the log is needed, also
        by whoever starts after a power cut; asked only when something would go. OSError leaves the rest.
        """
        found = [_segment(self.directory, base) for base in segments(self.directory)]
        now_unix_ns = time.time_ns()
        if beginning(found, keep, self.end, now_unix_ns) == self.begin:
            return
        begin = beginning(found, keep, needed_from(), now_unix_ns)
        going = [segment for segment in found if segment.base < begin]
        for segment in going:
            segment_path(self.directory, segment.base).unlink()
            # Were a later one gone while this one is still there, the log would have a hole.
            sync_directory(self.directory)
            self.begin = segment.base + segment.size
        if going:
            log.info("log_pruned", segments=len(going), bytes=sum(s.size for s in going), begin=self.begin)

    def close(self) -> None:
        """Write what waits, seal it, then stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        os.close(self._lock_fd)

    def _run(self) -> None:
        while True:
            groups = self._next_groups()
            if groups or not self._at_rest:
                self._busy_since = time.monotonic()
                self._commit(groups)
                self._busy_since = None
            if self._closing and not groups and not self._waiting:
                return

    @property
    def _at_rest(self) -> bool:
        """Whether there is nothing to do unless somebody appends. After a failure there is: who stands behind a balancer
        that waits for it to recover would get nothing to try it with.
        """
        return self._sealed and not self.trouble

    def _next_groups(self) -> list[tuple[list[bytes], Done]]:
        """What waits, once something does; nothing when it is time for a seal, for another try, or for the end."""
        with self._wake:
            while not (self._waiting or self._closing):
                if not self._wake.wait(None if self._at_rest else SEAL_AFTER_SECONDS):
                    break
            groups, self._waiting = self._waiting, []
            self._queued_bytes = 0
        return groups

    def _commit(self, groups: list[tuple[list[bytes], Done]]) -> None:
        """Make groups durable in one sync and report it; without groups, seal what is there."""
        durable: int | None = None
        try:
            durable = self._write(
                [piece for frames, _ in groups for piece in frames if piece], seal=not groups
            )
            if self.trouble:
                log.info("log_recovered", directory=str(self.directory))
            self.trouble = ""
        except OSError as error:
            trouble = _unwilling(self.directory, error.strerror or str(error))
            if trouble != self.trouble:
                log.error("log_unavailable", code="METER-001", trouble=trouble)
            self.trouble = trouble
            self._back_to_durable_end()
        for frames, done in groups:
            if durable is not None:
                durable += sum(map(len, frames))
            done(durable)

    def _write(self, parts: list[bytes], *, seal: bool) -> int:
        """Write and sync behind a mark; returns the offset where the pieces begin."""
        if self._fd < 0:
            self._reopen()
        if not parts and not seal:
            return self.end
        group = [mark(self.end), *parts]
        size = sum(map(len, group))
        if self.free_bytes < size:
            raise OSError(errno.ENOSPC, self._no_room)
        if self._size >= self._segment_bytes:
            self._next_segment()
        at = self._size
        for first in range(0, len(group), _PIECES_AT_ONCE):
            some = group[first : first + _PIECES_AT_ONCE]
            wanted = sum(map(len, some))
            written = os.pwritev(self._fd, some, at)
            if written < wanted:
                self._write_rest(b"".join(some)[written:], at + written)
            at += wanted
        os.fdatasync(self._fd)
        if is_read_only(self._fd):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        begin = self.end
        self._size += size
        self._sealed = seal
        if self._recent is not None:
            self._recent.add(begin, group)
            if self._size - self._forgotten >= FORGET_BYTES:
                self._forget()
        return begin + HEADER_BYTES

    def _forget(self) -> None:
        with contextlib.suppress(OSError):  # advice, and what was written is durable either way
            size = self._size - self._forgotten
            os.posix_fadvise(self._fd, self._forgotten, size, os.POSIX_FADV_DONTNEED)
        self._forgotten = self._size

    def _write_rest(self, data: bytes, at: int) -> None:
        """What a short write left over: a full disk says so at the next try."""
        view = memoryview(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, view[written:], at + written)

    def _next_segment(self) -> None:
        base = self._base + self._size
        # Behind the durable end nothing is anybody's: what an earlier, failed try left there is cut off.
        fd = os.open(
            segment_path(self.directory, base), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640
        )
        try:
            sync_directory(self.directory)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._base, self._size = fd, base, 0
        self._forgotten = 0

    def _back_to_durable_end(self) -> None:
        """After a failure: forget the descriptor and its page cache, cut back when the disk allows."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        time.sleep(0.05)

    def _reopen(self) -> None:
        fd = os.open(segment_path(self.directory, self._base), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(fd, self._size)
            os.fdatasync(fd)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def _open_tail(self, synced_end: int) -> None:
        bases = segments(self.directory)
        self.begin = bases[0] if bases else 0
        if not bases:
            self._base = self._size = 0
            self._sealed = True
            self._fd = os.open(
                segment_path(self.directory, 0), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640
            )
            sync_directory(self.directory)
            return
        self._base = bases[-1]
        path = segment_path(self.directory, self._base)
        data = path.read_bytes()
        sound = self._base
        last = Kind.MARK
        for piece in pieces(data, self._base):
            if isinstance(piece, Bad):
                if piece.proven or piece.offset < synced_end:
                    raise DamagedLog(damage_text(path, piece.offset))
                break
            sound, last = piece.end, piece.kind
        self._size = sound - self._base
        self._sealed = last is Kind.MARK
        self.torn_bytes = len(data) - self._size
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if self.torn_bytes:
            self._cut(data[self._size :])
        # What a killed writer left unsynced will be answered as a duplicate: first make it durable.
        os.fdatasync(self._fd)

    def _cut(self, torn: bytes) -> None:
        """Cut off a group that was never acknowledged, once its copy is durable."""
        copy = torn_path(self.directory, self.end)
        replace_durably(copy, torn, 0o640)
        os.ftruncate(self._fd, self._size)
        log.warning(
            "torn_tail_cut",
            segment=segment_path(self.directory, self._base).name,
            at=self._size,
            bytes=len(torn),
            copy=str(copy),
        )
        kept = sorted(self.directory.glob("[0-9]*.torn"), key=lambda path: path.stat().st_mtime_ns)
        for oldest in kept[:-KEPT_TORN_TAILS]:
            oldest.unlink()


def _segment(directory: Path, base: int) -> Segment:
    status = segment_path(directory, base).stat()
    return Segment(base, status.st_size, status.st_mtime_ns)


def _unwilling(directory: Path, why: str) -> str:
    """What is wrong with the disk, and the fix."""
    return f"{directory}: {why}; free its disk or mount it writable"
