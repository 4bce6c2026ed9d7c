"""Who did what to this collector: one line for each administrative act, chained by hashes, appended and never changed.

    <hash> <JSON>      hash = SHA-256 of the JSON's bytes, in hex
    JSON               number 1, 2, 3 ...; at; act; by; the act's own fields; previous = the hash of the line before;
                       torn = SHA-256 of an unfinished line that was found behind that one, if there was one

The line is on disk before the act takes effect, or, where only doing it shows what it is, before anybody is answered.
An act that cannot be written down is not done. Several processes append (the daemon and a person's commands): a lock
on the file puts them in order.

Failure model. A power cut or kill leaves any part of the last line, of which nobody was told. The next writer
leaves these bytes where they are and vouches for them in its own line (`torn`), so nothing is ever cut off and the file may
bear `chattr +a`. Bytes that nobody vouches for were changed by somebody. A chain without a secret cannot tell that its end
is missing or that all of it was written anew: keep its head elsewhere, and ask `verify` for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from collector.errors import CollectorError
from wire.daemon.files import sync_directory

MAX_LINE_BYTES = 16 << 10
NOTHING = "0" * 64
"""`previous` of the first line."""
_HASH_CHARACTERS = 64
_TAIL_BYTES = 4 * MAX_LINE_BYTES
_NO_LOGIN = (1 << 32) - 1


class AuditError(CollectorError):
    """The act could not be written down, so it was not done; or there is nothing to read."""


class Witness(Protocol):
    """Is told of an act; AuditError stops it."""

    def __call__(self, act: str, **fields: object) -> None: ...


def unseen(act: str, **fields: object) -> None:
    """The witness of what no person and no agent does: tests and simulated agents."""


class Line(NamedTuple):
    """A sound one."""

    hash: str
    entry: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.entry["number"])


class AuditVerdict(NamedTuple):
    acts: int
    head: str
    """NUMBER:HASH of the last sound line."""
    broken: str
    """The first line that is not what was written, and why; empty if there is none."""
    torn: list[int]
    """Numbers of the lines before which a power cut left an unfinished one."""
    unfinished_bytes: int
    """At the end: a power cut, or a line that is being written. Nobody was told of it."""

    @property
    def sound(self) -> bool:
        return not self.broken


class Audit:
    """Appends to one file, on behalf of one person or program."""

    def __init__(self, path: Path, by: dict[str, object] | None = None) -> None:
        self._path = path
        self._by = by or person()

    def __call__(self, act: str, **fields: object) -> None:
        """Write an act down, durably. `by` in the fields says who it was, if not whose program this is."""
        try:
            with self._opened() as fd:
                self._append(fd, {"act": act, "by": self._by, **fields})
        except OSError as error:
            raise AuditError(
                f"{self._path}: {error.strerror}; nothing was done: run as the collector's user, or free the disk"
            ) from error

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        directory = self._path.parent
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        is_new = not self._path.exists()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            if is_new:
                if os.geteuid() == 0:
                    # Made by root's command, written by the daemon.
                    owner = directory.stat()
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                sync_directory(directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _append(self, fd: int, said: dict[str, object]) -> None:
        size = os.fstat(fd).st_size
        start = max(0, size - _TAIL_BYTES)
        last, rest = _last_sound(os.pread(fd, size - start, start))
        if last is None and start:
            last, rest = _last_sound(os.pread(fd, size, 0))
        whole = _read(rest)
        if whole is not None:
            last = whole  # Only its end is missing, and gets it now.
        entry: dict[str, object] = {
            "number": last.number + 1 if last else 1,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            **said,
            "previous": last.hash if last else NOTHING,
        }
        if _is_torn(rest) and whole is None:
            entry["torn"] = hashlib.sha256(rest).hexdigest()
        line = _written(entry)
        if len(line) > MAX_LINE_BYTES:
            raise AuditError(f"an act of {len(line)} bytes, at most {MAX_LINE_BYTES}; nothing was done")
        # A line of its own, also where an unfinished one lies before it.
        data = b"\n" + line if rest and not rest.endswith(b"\n") else line
        if os.write(fd, data) < len(data):
            raise AuditError(f"{self._path}: the disk is full; nothing was done: free it")
        os.fsync(fd)


def person() -> dict[str, object]:
    """Who runs this command: the user, and who had logged in before any su or sudo (proc_pid_loginuid(5))."""
    by: dict[str, object] = {"uid": os.getuid()}
    with contextlib.suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text())
        if login != _NO_LOGIN:
            by["login_uid"] = login
    return by


def _written(entry: dict[str, object]) -> bytes:
    text = json.dumps(entry).replace("\x7f", "\\u007f").encode()
    return f"{hashlib.sha256(text).hexdigest()} ".encode() + text + b"\n"


def _read(line: bytes) -> Line | None:
    """A line without its end, if its hash fits."""
    stated, _, text = line.partition(b" ")
    if len(stated) != _HASH_CHARACTERS or hashlib.sha256(text).hexdigest().encode() != stated:
        return None
    return Line(stated.decode(), json.loads(text))


def _last_sound(data: bytes) -> tuple[Line | None, bytes]:
    """The last sound line, and the bytes behind it."""
    end = len(data)
    while (newline := data.rfind(b"\n", 0, end)) >= 0:
        line = _read(data[data.rfind(b"\n", 0, newline) + 1 : newline])
        if line is not None:
            return line, data[newline + 1 :]
        end = newline
    return None, data


def _is_torn(rest: bytes) -> bool:
    """A torn line has no end, or pages that never came. A whole one that does not fit its hash was changed."""
    return bool(rest) and (not rest.endswith(b"\n") or b"\0" in rest)


def lines(path: Path) -> Iterator[Line | tuple[int, bytes]]:
    """Every sound line, and (byte offset, bytes) of each stretch between them that is none."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise AuditError(
            f"{path}: {error.strerror}; no act was written down yet, or name the settings with --config"
        ) from error
    with file:
        rest, at, offset = b"", 0, 0
        for raw in file:
            line = _read(raw[:-1]) if raw.endswith(b"\n") else None
            if line is None:
                at = offset if not rest else at
                rest += raw
            else:
                if rest:
                    yield at, rest
                rest = b""
                yield line
            offset += len(raw)
        if rest:
            yield at, rest


def verify(path: Path, head: str = "") -> AuditVerdict:
    """Read the whole chain. `head`: NUMBER:HASH of a line that is known to have been in it."""
    wanted_number, _, wanted_hash = head.partition(":")
    acts, previous, broken, seen_head = 0, NOTHING, "", not head
    torn: list[int] = []
    stray: tuple[int, bytes] | None = None
    for line in lines(path):
        if not isinstance(line, Line):
            stray = line
            continue
        broken = broken or _wrong(line, acts + 1, previous, stray)
        if stray is not None:
            torn.append(line.number)
        acts, previous, stray = acts + 1, line.hash, None
        seen_head = seen_head or (str(line.number), line.hash) == (wanted_number, wanted_hash)
    if stray is not None and not _is_torn(stray[1]):
        broken = broken or f"line {acts + 1}, byte {stray[0]}: changed since it was written"
    if not seen_head:
        broken = broken or f"head {head} is not in it: its end was cut off, or all of it was written anew"
    return AuditVerdict(acts, f"{acts}:{previous}", broken, torn, len(stray[1]) if stray else 0)


def _wrong(line: Line, number: int, previous: str, stray: tuple[int, bytes] | None) -> str:
    """Why this line does not follow what came before it; empty if it does."""
    if stray is not None:
        at, found = stray
        # What follows an unfinished line begins on a line of its own.
        vouched = line.entry.get("torn")
        if vouched not in (hashlib.sha256(found).hexdigest(), hashlib.sha256(found[:-1]).hexdigest()):
            return f"line {number}, byte {at}: changed since it was written"
    elif "torn" in line.entry:
        return f"line {number}: the unfinished line before it is gone"
    if line.entry["previous"] != previous or line.number != number:
        return f"line {number}: is number {line.number} and does not follow the line before it"
    return ""
