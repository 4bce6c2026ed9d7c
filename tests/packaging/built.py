"""The packages of this checkout, built as `./dev package` builds them, and what is in them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WHEELS = ROOT / ".cache/wheels"
PARTS = ("agent", "collector", "ledger")
LIGHT = ("agent", "collector")
"""For tests that copy packages about: the ledger's is 170 MB, and has nothing of its own that they look at."""


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of a package."""

    mode: int
    owner: str
    modified_unix: int
    file: Path | None
    """Where it was unpacked, if it is a file."""

    @property
    def content(self) -> bytes | None:
        """Read anew each time: the ledger's engine has half a gigabyte."""
        return self.file.read_bytes() if self.file else None


def build(out: Path, *words: str, checkout: Path = ROOT, epoch: int | None = None) -> list[str]:
    """What the builder said, a line each."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    if epoch is not None:
        environment["SOURCE_DATE_EPOCH"] = str(epoch)
    command = [sys.executable, "packaging/builder", "--out", str(out), "--wheels", str(WHEELS), *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class Built:
    """A directory of packages; `unpacked` takes what is in them."""

    def __init__(self, directory: Path, unpacked: Path) -> None:
        self.directory = directory
        self.said = build(directory)
        self._unpacked = unpacked

    def deb(self, part: str) -> Path:
        (found,) = self.directory.glob(f"weighbridge-{part}_*.deb")
        return found

    def rpm(self, part: str) -> Path:
        (found,) = self.directory.glob(f"weighbridge-{part}-*.rpm")
        return found

    def control(self, part: str, field: str) -> str:
        return subprocess.check_output(["dpkg-deb", "--field", self.deb(part), field], text=True).strip()

    def conffiles(self, part: str) -> list[str]:
        return subprocess.check_output(["dpkg-deb", "--info", self.deb(part), "conffiles"], text=True).split()

    def scripts(self, part: str) -> dict[str, str]:
        """Files of the deb's control archive that are programs."""
        archive = subprocess.check_output(["dpkg-deb", "--ctrl-tarfile", self.deb(part)])
        with tarfile.open(fileobj=BytesIO(archive)) as control:
            found = {
                member.name.lstrip("./"): control.extractfile(member)
                for member in control
                if member.mode & 0o100
            }
            return {name: file.read().decode() for name, file in found.items() if file}

    @functools.cache  # noqa: B019 - one object a run
    def entries(self, part: str) -> dict[str, Entry]:
        """Of the deb: absolute path -> entry."""
        tree = self._unpacked / part
        tree.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--extract", self.deb(part), tree], check=True)
        found = {}
        listing = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", self.deb(part)], stdout=subprocess.PIPE)
        with listing, tarfile.open(fileobj=listing.stdout, mode="r|") as tar:
            for member in tar:
                path = member.name.removeprefix("./").rstrip("/")
                found[f"/{path}"] = Entry(
                    member.mode,
                    f"{member.uname}:{member.gname}",
                    int(member.mtime),
                    tree / path if member.isfile() else None,
                )
        assert listing.returncode == 0
        return found

    def rpm_entries(self, part: str) -> dict[str, tuple[int, str, str]]:
        """Absolute path -> permissions, owner, SHA-256 (empty: no file)."""
        line = "[%{FILENAMES} %{FILEMODES:octal} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILEDIGESTS}\n]"
        text = subprocess.check_output(["rpm", "-qp", "--queryformat", line, self.rpm(part)], text=True)
        found = {}
        for row in text.splitlines():
            path, mode, owner, *digest = row.split(" ")
            found[path] = (int(mode, 8) & 0o7777, owner, digest[0] if digest else "")
        return found
