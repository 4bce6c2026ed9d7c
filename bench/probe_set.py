"""The kernel probes of this checkout, loaded into a bpffs of our own, for tests and benchmarks; gone afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOADER = Path(__file__).parent.parent / "bpf" / "build" / "weighbridge-probes"


class ProbeSet:
    """A directory for pins and the loader to fill it."""

    def __init__(self, directory: Path, group: str = "root") -> None:
        self.directory = directory
        self.group = group
        self.pins = directory / "v1"

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The loader, whatever comes of it."""
        words = [str(LOADER), command, "--directory", str(self.directory), "--group", self.group, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    def load(self, *arguments: str) -> str:
        """Load or replace; what the loader had to say."""
        done = self.run("load", *arguments)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stderr

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return status

    def walk(self) -> None:
        """Have the snapshot written anew."""
        fd = os.open(self.pins / "walk", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.read(fd, 1) != b"\n":
                raise RuntimeError("the walk was not made")
        finally:
            os.close(fd)


@contextlib.contextmanager
def directory_for_pins(parent: Path) -> Iterator[ProbeSet]:
    """A place to load into. Whatever is pinned there is removed at the end, and the bpffs unmounted."""
    directory = parent / "bpf"
    try:
        yield ProbeSet(directory)
    finally:
        if os.path.ismount(directory):
            # Not the two files that every bpffs has of its own.
            for folder in directory.glob("v*"):
                for pin in folder.iterdir():
                    pin.unlink()
                folder.rmdir()
            subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def loaded(parent: Path, *arguments: str) -> Iterator[ProbeSet]:
    """As `directory_for_pins`, with the probes loaded."""
    with directory_for_pins(parent) as probes:
        probes.load(*arguments)
        yield probes
