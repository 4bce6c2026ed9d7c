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
PARTS = ("agent", "collector")


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of a package."""

    mode: int
    owner: str
    modified_unix: int
    content: bytes | None


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
    """A directory of packages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said = build(directory)

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
        archive = subprocess.check_output(["dpkg-deb", "--fsys-tarfile", self.deb(part)])
        found = {}
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                content = file.read() if file else None
                found["/" + member.name.removeprefix("./").rstrip("/")] = Entry(
                    member.mode, f"{member.uname}:{member.gname}", int(member.mtime), content
                )
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
