"""Namespaces of our own to build and run containers in: whatever is mounted, started or written there ends with them.

There is a disk in memory, mounted at a directory that looks empty from outside, and a network that is a loopback. The first
process takes all others with it when it ends, and it ends with whoever started it; a kill -9 leaves an empty directory. The
kernel, its /proc and its cgroups are this machine's.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

START = """
set -e
ip link set lo up
# What container tools keep beside the places that they are told to use.
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs -o mode=755,size=2g tmpfs "$1"
# Of a hybrid host the v2 hierarchy: container tools, and clusters, want nothing else.
[ ! -d /sys/fs/cgroup/unified ] || mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup
mkdir "$1/shared"
mount --bind "$1/shared" "$1/shared"
mount --make-shared "$1/shared"
echo
exec sleep infinity
"""


class Apart:
    """`directory` is where it is inside; `shared` below it passes mounts on, as a host's / does."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="weighbridge-apart-"))
        self.shared = self.directory / "shared"
        self._holder: subprocess.Popen[str] | None = None
        self._first = 0

    def __enter__(self) -> Self:
        dying = ["setpriv", "--pdeathsig", "KILL"]
        own = [*dying, "unshare", "--mount", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._holder = subprocess.Popen(
            [*own, "bash", "-c", START, "apart", str(self.directory)], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "\n":
            self.__exit__()
            raise OSError("namespaces of our own could not be made: see standard error")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self._first = int(children.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder is not None
        self._holder.kill()
        self._holder.communicate()
        self.directory.rmdir()

    def seen(self, path: Path) -> Path:
        """Where a path of the inside is seen from outside."""
        return Path(f"/proc/{self._first}/root") / path.relative_to("/")

    def enter(self, command: Sequence[str | Path]) -> list[str]:
        return ["nsenter", "--target", str(self._first), "--mount", "--net", "--pid", *map(str, command)]

    def run(
        self,
        command: Sequence[str | Path],
        seconds: float = 120,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.enter(command),
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def start(self, command: Sequence[str | Path], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """A process that stays."""
        return subprocess.Popen(self.enter(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
