"""The local durable log: batches verbatim, in segment files, one fdatasync for many.

    <directory>/00000000000000000000.log   named by the offset of its first byte in the whole log
    record = header | note | batch         header: magic, sizes, CRC-32 of header and note, kind, received_at,
                                           agent, epoch, seq, SHA-256 of the batch

Strategy. One thread takes everything that waits, writes it in one go, syncs, and reports. The header has a
CRC, the batch its digest, so a scan verifies every byte.

Invariants. A record is reported durable only after fdatasync returned. The file never has bytes behind the
durable end that somebody was told about.

Failure model. A torn tail (crash in mid-write; nobody was answered) is cut off at open. Damage with valid
records behind it is not a crash: `DamagedLog`, and a person decides. After a failed write or sync the page
cache is not trusted: the file is cut back to the durable end and reopened before anything else is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from collector.errors import CollectorError
from wire.daemon.journal import Journal
from wire.identity import AgentId, digest
from wire.limits import MAX_BATCH_BYTES

MAGIC = b"WBL1"
_HEADER = struct.Struct(">4sIIBxHQ16sQQ32s")
_CRC_AT, _AFTER_CRC = 8, 12
MAX_NOTE_BYTES = 4_096

log = Journal("collector.log")


_PIECES_AT_ONCE = 1_000
"""At most IOV_MAX (1024) go into one pwritev(2)."""


class Kind(IntEnum):
    ACCEPTED = 1
    REJECTED = 2
    """Invalid for ever; its identity is used up."""
    REFUSED = 3
    """Not what was meant, or another's identity: kept as evidence, the identity stays as it was."""
    ADOPTED = 4
    """No batch: the stream goes on at `seq`; what came before was answered elsewhere or never sent."""


_KINDS = frozenset(Kind)


class LogError(CollectorError):
    """The log cannot be used; the message names the fix."""


class DamagedLog(LogError):
    """Bytes in the middle of the log are wrong."""


class LogUnavailable(LogError):
    """The disk refused; nothing of what was given is durable."""


class Record(NamedTuple):
    offset: int
    kind: Kind
    received_at_unix_ns: int
    agent_id: AgentId
    epoch: int
    seq: int
    digest: bytes
    note: bytes
    """Of a rejected batch: "REASON_NAME detail"."""
    body: bytes


def frame(
    kind: Kind,
    received_at_unix_ns: int,
    agent: bytes,
    epoch: int,
    seq: int,
    digest_: bytes,
    note: bytes,
    body: bytes,
) -> tuple[bytes, bytes]:
    """One record as (header and note, body): the body is written from where it lies. `agent` is the 16 bytes of
    the agent's UUID.
    """
    note = note[:MAX_NOTE_BYTES]
    header = _HEADER.pack(
        MAGIC, len(body), 0, kind, len(note), received_at_unix_ns, agent, epoch, seq, digest_
    )
    crc = zlib.crc32(note, zlib.crc32(header[_AFTER_CRC:], len(body)))
    return b"".join((header[:_CRC_AT], crc.to_bytes(4, "big"), header[_AFTER_CRC:], note)), body


Done = Callable[[int | None], object]
"""Called from the log's thread: offset behind the group's last byte, or None if the group is not durable."""


class DurableLog:
    """Appends. One per directory and process."""

    def __init__(self, directory: Path, segment_bytes: int, min_free_bytes: int) -> None:
        """Open, cut a torn tail off, lock. DamagedLog, LogError name what to do."""
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._min_free_bytes = min_free_bytes
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock_fd = _lock(directory)
        except OSError as error:
            raise LogError(
                f"log directory {directory}: {error.strerror}; make it writable for this user or set `log.directory`"
            ) from error
        self.torn_bytes = 0
        self._fd = -1
        self._base: int
        self._size: int
        self._waiting: list[tuple[list[bytes], Done]] = []
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self.trouble = ""
        try:
            self._open_tail()
        except OSError as error:
            os.close(self._lock_fd)
            raise LogError(f"{directory}: {error.strerror}; free its disk or mount it writable") from error
        except BaseException:
            os.close(self._lock_fd)
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
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def append(self, frames: list[bytes], done: Done) -> None:
        """Queue the pieces of records. Groups become durable in the order of the calls; an empty one is a barrier."""
        with self._wake:
            self._waiting.append((frames, done))
            self._queued_bytes += sum(map(len, frames))
            self._wake.notify()

    def close(self) -> None:
        """Write what waits, then stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        os.close(self._lock_fd)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    return
                groups, self._waiting = self._waiting, []
                self._queued_bytes = 0
            durable: int | None = None
            try:
                end_before = self.end
                self._write([piece for frames, _ in groups for piece in frames if piece])
                durable = end_before
                if self.trouble:
                    log.info("log_recovered", directory=str(self.directory))
                self.trouble = ""
            except OSError as error:
                trouble = f"{self.directory}: {error.strerror or error}"
                if trouble != self.trouble:
                    log.error("log_unavailable", code="METER-001", trouble=trouble)
                self.trouble = trouble
                self._back_to_durable_end()
            for frames, done in groups:
                if durable is not None:
                    durable += sum(map(len, frames))
                done(durable)

    def _write(self, pieces: list[bytes]) -> None:
        if self._fd < 0:
            self._reopen()
        if not pieces:
            return
        size = sum(map(len, pieces))
        if shutil.disk_usage(self.directory).free < self._min_free_bytes + size:
            raise OSError(28, f"less than {self._min_free_bytes} bytes free (`log.min_free`)")
        if self._size >= self._segment_bytes:
            self._next_segment()
        at = self._size
        for first in range(0, len(pieces), _PIECES_AT_ONCE):
            some = pieces[first : first + _PIECES_AT_ONCE]
            wanted = sum(map(len, some))
            written = os.pwritev(self._fd, some, at)
            if written < wanted:
                self._write_rest(b"".join(some)[written:], at + written)
            at += wanted
        os.fdatasync(self._fd)
        self._size += size

    def _write_rest(self, data: bytes, at: int) -> None:
        """What a short write left over: a full disk says so at the next try."""
        view = memoryview(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, view[written:], at + written)

    def _next_segment(self) -> None:
        base = self._base + self._size
        # Behind the durable end nothing is anybody's: what an earlier, failed try left there is cut off.
        fd = os.open(self._path(base), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            self._sync_directory()
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._base, self._size = fd, base, 0

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
        fd = os.open(self._path(self._base), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.ftruncate(fd, self._size)
            os.fdatasync(fd)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def _open_tail(self) -> None:
        bases = segments(self.directory)
        if not bases:
            self._base = self._size = 0
            self._fd = os.open(self._path(0), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            self._sync_directory()
            return
        self._base = bases[-1]
        path = self._path(self._base)
        size = path.stat().st_size
        sound = self._base
        for record in _records_of(path, self._base, 0, size):
            if isinstance(record, _Bad):
                if record.valid_behind:
                    raise DamagedLog(
                        f"{path} is damaged at byte {record.offset - self._base}, with good records behind it: look"
                        " with `weighbridge-collector log verify`, then `weighbridge-collector log repair`"
                    )
                break
            sound = record.offset + _HEADER.size + len(record.note) + len(record.body)
        self._size = sound - self._base
        self.torn_bytes = size - self._size
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if self.torn_bytes:
            os.ftruncate(self._fd, self._size)
            os.fdatasync(self._fd)
            log.warning("torn_tail_cut", segment=path.name, bytes=self.torn_bytes)

    def _path(self, base: int) -> Path:
        return self.directory / f"{base:020d}.log"

    def _sync_directory(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Damage(NamedTuple):
    """A place a scan could not read."""

    segment: str
    offset: int
    valid_behind: bool


def segments(directory: Path) -> list[int]:
    """First offsets of the segments, ascending."""
    return sorted(int(path.stem) for path in directory.glob("[0-9]*.log") if path.stem.isdigit())


def scan(directory: Path, start: int = 0, end: int | None = None) -> Iterator[Record | Damage]:
    """Every record from offset `start`, and every damaged place. Reads a log that is being written: a last,
    incomplete record is not damage but not there yet.
    """
    bases = segments(directory)
    for index, base in enumerate(bases):
        following = bases[index + 1] if index + 1 < len(bases) else None
        if following is not None and following <= start:
            continue
        path = directory / f"{base:020d}.log"
        size = path.stat().st_size
        if end is not None:
            size = min(size, max(0, end - base))
        for record in _records_of(path, base, max(0, start - base), size):
            if isinstance(record, _Bad):
                if record.valid_behind or following is not None:
                    yield Damage(path.name, record.offset, record.valid_behind)
            else:
                yield record
        if following is not None and following != base + size:
            yield Damage(path.name, base + size, True)


def repair(directory: Path) -> list[str]:
    """Rewrite damaged segments without their damaged places; the originals stay as *.damaged. Says what it did.
    LogError while a collector runs.
    """
    lock_fd = _lock(directory)
    try:
        return _repair(directory)
    finally:
        os.close(lock_fd)


def _lock(directory: Path) -> int:
    """Hold the log: one writer at a time."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise LogError(f"{directory} is in use by another collector; stop it first") from None
    return fd


def _repair(directory: Path) -> list[str]:
    done = []
    for base in segments(directory):
        path = directory / f"{base:020d}.log"
        size = path.stat().st_size
        pieces = list(_records_of(path, base, 0, size))
        bad = [piece for piece in pieces if isinstance(piece, _Bad)]
        if not any(piece.valid_behind for piece in bad):
            continue
        data = bytearray(path.read_bytes())
        for piece in bad:
            # Offsets name records, so what is good keeps its place and the hole becomes a rejected filler.
            start, stop = piece.offset - base, piece.resume - base
            if stop - start >= _HEADER.size:
                hole = bytes(data[start + _HEADER.size : stop])
                filler = frame(Kind.REFUSED, 0, bytes(16), 0, 0, digest(hole), b"", hole)
                data[start:stop] = b"".join(filler)
        # The original keeps its bytes under a second name before the mended file takes the first.
        mended = path.with_suffix(".log.mended")
        with mended.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(path, path.with_suffix(".log.damaged"))
        mended.replace(path)
        done.append(
            f"{path.name}: {len(bad)} damaged places replaced by fillers; original kept as {path.name}.damaged"
        )
    return done


class _Bad(NamedTuple):
    offset: int
    valid_behind: bool
    resume: int


def _records_of(path: Path, base: int, at: int, size: int) -> Iterator[Record | _Bad]:
    """The records of one segment; damage is skipped to the next record that verifies."""
    with path.open("rb") as file:
        file.seek(at)
        data = file.read(size - at) if size > at else b""
    position = 0
    while position < len(data):
        record = _record_at(data, position, base + at)
        if record is not None:
            yield record
            position += _HEADER.size + len(record.note) + len(record.body)
            continue
        resume = data.find(MAGIC, position + 1)
        while resume >= 0 and _record_at(data, resume, base + at) is None:
            resume = data.find(MAGIC, resume + 1)
        yield _Bad(base + at + position, resume >= 0, base + at + (resume if resume >= 0 else len(data)))
        if resume < 0:
            return
        position = resume


def _record_at(data: bytes, position: int, base: int) -> Record | None:
    """The record at a position if every byte of it verifies."""
    if len(data) - position < _HEADER.size:
        return None
    magic, body_size, crc, kind, note_size, received, agent, epoch, seq, wanted = _HEADER.unpack_from(
        data, position
    )
    body_at = position + _HEADER.size + note_size
    if magic != MAGIC or note_size > MAX_NOTE_BYTES or body_size > 4 * MAX_BATCH_BYTES or kind not in _KINDS:
        return None
    if body_at + body_size > len(data):
        return None
    note = data[position + _HEADER.size : body_at]
    if zlib.crc32(note, zlib.crc32(data[position + _AFTER_CRC : position + _HEADER.size], body_size)) != crc:
        return None
    body = data[body_at : body_at + body_size]
    if digest(body) != wanted:
        return None
    return Record(
        base + position,
        Kind(kind),
        received,
        AgentId(str(uuid.UUID(bytes=agent))),
        epoch,
        seq,
        wanted,
        note,
        body,
    )


def durable_bytes(directory: Path) -> int:
    """Size of the log on disk."""
    return sum(path.stat().st_size for path in directory.glob("[0-9]*.log"))
