"""The kernel probes, loaded into a bpffs of their own for a test or a benchmark, and unloaded whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

LOADER = Path(__file__).parent.parent / "bpf/build/weighbridge-probes"


class LoadedProbes:
    """A place for pins, and the loader to call on it."""

    def __init__(self, directory: Path, group: str = "root") -> None:
        self.directory = directory
        self.group = group

    def command(self, *words: str) -> str:
        """Run one command of the loader; what it said."""
        done = subprocess.run(
            [str(LOADER), *words, "--directory", str(self.directory)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"weighbridge-probes {' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout + done.stderr

    def load(self, *options: str) -> None:
        self.command("load", "--group", self.group, *options)

    def unload(self) -> None:
        self.command("unload")


@contextlib.contextmanager
def probes_of_our_own(directory: Path, *options: str, group: str = "root") -> Iterator[LoadedProbes]:
    """Needs root."""
    directory.mkdir(parents=True, exist_ok=True)
    loaded = LoadedProbes(directory, group)
    try:
        loaded.load(*options)
        yield loaded
    finally:
        with contextlib.suppress(RuntimeError):
            loaded.unload()
        if directory.is_mount():
            subprocess.run(["umount", str(directory)], check=True)
