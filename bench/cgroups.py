"""Cgroups of our own below the v2 root, with processes in them, for the demo, the tests and the benchmarks.

Nothing but what was made here is touched, and all of it is gone afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

V2_ROOTS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))


def v2_root() -> Path | None:
    """Mount point of the v2 hierarchy, or None."""
    return next((root for root in V2_ROOTS if (root / "cgroup.procs").is_file()), None)


class Cgroup:
    """One cgroup made here; its children are cgroups made here too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.cgroup_id = path.stat().st_ino

    @property
    def name(self) -> str:
        """Path below the hierarchy's root."""
        root = v2_root()
        assert root is not None
        return "/" + str(self.path.relative_to(root))

    def child(self, name: str) -> Cgroup:
        return Cgroup(self.path / name)

    def run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process that is born into this cgroup's life before it does any work."""
        procs = str(self.path / "cgroup.procs")
        joined = ["/bin/sh", "-c", f'echo $$ > "{procs}" && exec "$@"', "sh", *command]
        return subprocess.Popen(joined, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def cpu_usage_ns(self) -> int:
        """usage_usec of cpu.stat, in nanoseconds."""
        words = (self.path / "cpu.stat").read_text().split()
        return int(words[words.index("usage_usec") + 1]) * 1_000

    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def wait_empty(self, seconds: float = 10.0) -> None:
        """Until no process is left in it."""
        deadline = time.monotonic() + seconds
        while "populated 1" in (self.path / "cgroup.events").read_text():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path} is still populated")
            time.sleep(0.01)

    def remove(self) -> None:
        """End what runs in it, then remove it and what was made below."""
        if not self.path.exists():
            return
        for directory, _, _ in os.walk(self.path, topdown=False):
            folder = Path(directory)
            for _ in range(500):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


@contextlib.contextmanager
def slice_of_our_own(name: str) -> Iterator[Cgroup]:
    """A cgroup at the root of the v2 hierarchy. OSError where this user may not make one."""
    root = v2_root()
    if root is None:
        raise FileNotFoundError("no cgroup v2 hierarchy is mounted")
    cgroup = Cgroup(root / f"{name}-{os.getpid()}.slice")
    try:
        available = (cgroup.path / "cgroup.controllers").read_text().split()
        for controller in {"memory", "io", "pids", "cpu"}.intersection(available):
            with contextlib.suppress(OSError):
                (cgroup.path / "cgroup.subtree_control").write_text(f"+{controller}")
        yield cgroup
    finally:
        cgroup.remove()


def burner(share: float) -> list[str]:
    """A process that uses about `share` of one CPU, steadily."""
    code = (
        "import time\n"
        "while True:\n"
        f"    end = time.perf_counter() + {share} * 0.1\n"
        "    while time.perf_counter() < end: pass\n"
        f"    time.sleep({1 - share} * 0.1)\n"
    )
    return [sys.executable, "-S", "-c", code]


def holder(mebibytes: int) -> list[str]:
    """A process that holds memory and does nothing."""
    code = f"import time; block = bytearray({mebibytes} << 20); block[::4096] = bytes(len(block[::4096])); time.sleep(86400)"
    return [sys.executable, "-S", "-c", code]


def spawner(seconds_between: float) -> list[str]:
    """A process that starts one short job after another."""
    script = f"while :; do /bin/sh -c 'i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done'; sleep {seconds_between}; done"
    return ["/bin/sh", "-c", script]
