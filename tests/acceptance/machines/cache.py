"""What is slow to build is built once, in ${XDG_CACHE_HOME:-~/.cache}/weighbridge/machines, and kept.

An entry is a directory named by what it was made from. It appears by one rename, when it is complete. Whoever uses
it holds a shared lock; whoever builds or removes it an exclusive one. A lock dies with its process, so a run
that was killed blocks nobody, and what it left behind is swept by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

KEPT_OF_A_KIND = 3
"""Checkouts with different recipes share the cache; entries used longest ago beyond these go."""
BUILD_SECONDS = 900
LOOK_SECONDS = 0.2


class Unavailable(Exception):
    """This host cannot have such machines; the message says why and what would help."""


def key_of(*parts: str | Path) -> str:
    """Name of an entry: a hash of texts and of files' contents."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()[:16]


class Cache:
    def __init__(self) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.directory = Path(base) / "weighbridge/machines"
        (self.directory / "runs").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def entry(self, kind: str, key: str, build: Callable[[Path], None]) -> Iterator[Path]:
        """The directory of one entry, built if it is not there, and kept while it is in use."""
        path = self.directory / f"{kind}-{key}"
        with self._lock_file(path).open("w") as lock:
            while True:
                _lock(lock.fileno(), fcntl.LOCK_SH)
                if path.is_dir():
                    break
                # Whoever waited for it alone would wait until all who use what another has built are done.
                if _try_lock(lock.fileno(), fcntl.LOCK_EX):
                    if not path.is_dir():
                        self._build(path, build)
                else:
                    time.sleep(random.uniform(0, LOOK_SECONDS))
            os.utime(path)
            yield path

    @contextlib.contextmanager
    def run_directory(self) -> Iterator[Path]:
        """A directory for one machine's life, gone afterwards; those of killed runs go now."""
        runs = self.directory / "runs"
        for left in runs.iterdir():
            if self._remove_unless_used(left):
                self._lock_file(left).unlink(missing_ok=True)
        path = runs / uuid.uuid4().hex
        # Locked before it is there, or another run's sweep could take it for a killed one's.
        with self._lock_file(path).open("w") as lock:
            _lock(lock.fileno(), fcntl.LOCK_SH)
            try:
                path.mkdir()
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                self._lock_file(path).unlink(missing_ok=True)

    def _build(self, path: Path, build: Callable[[Path], None]) -> None:
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            build(partial)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        kind = path.name.partition("-")[0]
        entries = [entry for entry in self.directory.glob(f"{kind}-*") if entry != path]
        entries.sort(key=_used_at, reverse=True)
        for old in entries[KEPT_OF_A_KIND - 1 :]:
            self._remove_unless_used(old)

    def _remove_unless_used(self, path: Path) -> bool:
        with self._lock_file(path).open("w") as lock:
            if not _try_lock(lock.fileno(), fcntl.LOCK_EX):
                return False
            shutil.rmtree(path, ignore_errors=True)
            return True

    def _lock_file(self, path: Path) -> Path:
        locks = self.directory / "locks"
        locks.mkdir(exist_ok=True)
        return locks / path.stem  # what is being built has the lock of what it becomes


def _used_at(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # another run has just removed it
        return 0.0


def _lock(fd: int, how: int) -> None:
    """flock(2) with an end to its patience."""
    deadline = time.monotonic() + BUILD_SECONDS
    while not _try_lock(fd, how):
        if time.monotonic() > deadline:
            raise Unavailable(f"another run has been building a machine for {BUILD_SECONDS} s")
        time.sleep(LOOK_SECONDS)


def _try_lock(fd: int, how: int) -> bool:
    """Whether it is held now; if not, what was held is not any more."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def build_step(command: Sequence[str | Path]) -> None:
    """Run one building script to its end, or end it with all it started. Unavailable if it fails."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=BUILD_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        last_words = output.decode(errors="replace")[-2_000:]
        raise Unavailable(f"{Path(command[0]).name} ended with {process.returncode}:\n{last_words}")
