"""Locked wheels: chosen by the lock's markers, fetched by pip, checked and unpacked here.

A wheel is a zip. Unpacking it ourselves keeps pip's traces (RECORD, INSTALLER, launchers with the build's paths) out of
the packages, so that two builds are the same to the bit.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from checkout import ROOT, PackagingError, Target
from packaging.markers import Marker

OLDEST_GLIBC_MINOR = 34
"""Of RHEL 9; Ubuntu 22.04 has 2.35, Debian 12 2.36."""
MOST_BYTES_UNPACKED = 768 << 20
"""ClickHouse is 556 MB of them; agent and collector have not a tenth."""

_NOT_NEEDED = {".pyi", ".pyx", ".pxd", ".c", ".h", ".typed"}
_NOT_NEEDED_FILES = {"chdb/libpybind11nonlimitedapi_stubs.so"}
"""A second copy, from before the wheel was made portable: nothing loads it, and it looks for libraries in a path of the
machine that built it."""
_NOT_NEEDED_DIRECTORIES = {"test", "tests", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Locked:
    """One line of a lock."""

    name: str
    version: str
    hashes: frozenset[str]

    def line(self) -> str:
        return f"{self.name}=={self.version} {' '.join(f'--hash=sha256:{h}' for h in sorted(self.hashes))}"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on disk, whose hash is in the lock."""

    file: Path
    sha256: str
    locked: Locked

    def about(self) -> dict[str, bytes]:
        """What the wheel says of itself (METADATA, licences, parts of its own): path below its dist-info -> content."""
        with zipfile.ZipFile(self.file) as archive:
            inside = [re.fullmatch(r"[^/]+\.dist-info/(.*[^/])", name) for name in archive.namelist()]
            return {found[1]: archive.read(found[0]) for found in inside if found}

    def metadata(self) -> Message:
        return HeaderParser().parsestr(self.about()["METADATA"].decode())


def environment(target: Target) -> dict[str, str]:
    """Of markers, for the first patch release of this Python: what serves that one serves all later ones."""
    return {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{target.python}.0",
        "python_version": target.python,
        "sys_platform": "linux",
    }


def locked_for(part: str, target: Target) -> list[Locked]:
    """What the lock asks for."""
    text = (ROOT / "requirements" / f"{part}.txt").read_text().replace("\\\n", " ")
    found = []
    for line in re.sub(r"#.*", "", text).splitlines():
        if not line.strip():
            continue
        match = re.match(
            r"([A-Za-z0-9._-]+)==(\S+)\s*(?:;(.*?))?((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*$", line
        )
        if not match:
            raise PackagingError(f"requirements/{part}.txt: not a locked requirement: {line[:100]}")
        name, version, marker, hashes = match.groups()
        if not marker or Marker(marker).evaluate(environment(target)):
            found.append(Locked(name, version, frozenset(re.findall(r"[0-9a-f]{64}", hashes))))
    return found


def wheels_for(part: str, target: Target, store: Path) -> list[Wheel]:
    """The wheels, out of the store or from the registry into it."""
    wanted = locked_for(part, target)
    lines = "".join(f"{locked.line()}\n" for locked in wanted)
    key = hashlib.sha256(f"{target.machine} {lines}".encode()).hexdigest()[:16]
    directory = store / f"{part}-{target.python}-{key}"
    if not directory.is_dir():
        _fetch(lines, target, directory)
    by_hash = {
        hashlib.sha256(file.read_bytes()).hexdigest(): file for file in sorted(directory.glob("*.whl"))
    }
    found = []
    for locked in wanted:
        digests = locked.hashes & by_hash.keys()
        if len(digests) != 1:
            raise PackagingError(f"{directory}: {len(digests)} wheels of {locked.name}; delete the directory")
        (digest,) = digests
        found.append(Wheel(by_hash[digest], digest, locked))
    return found


def _fetch(lines: str, target: Target, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(lines)
        platforms = [
            f"--platform=manylinux_2_{minor}_{target.machine}" for minor in range(OLDEST_GLIBC_MINOR, 16, -1)
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--only-binary=:all:", "--require-hashes", f"--python-version={target.python}"]
        command += ["--implementation=cp", *platforms, f"--platform=manylinux2014_{target.machine}"]
        command += ["--dest", str(Path(scratch, "wheels")), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PackagingError(f"pip download for Python {target.python}: {done.stderr.strip()[-2000:]}")
        Path(scratch, "wheels").rename(directory)


def unpack(wheels: Iterable[Wheel], into: Path) -> None:
    """What runs, and each wheel's name, version and licences; no tests, stubs or sources in C."""
    room = MOST_BYTES_UNPACKED
    for wheel in wheels:
        with zipfile.ZipFile(wheel.file) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                room -= member.file_size
                if path.is_absolute() or ".." in path.parts or room < 0:
                    raise PackagingError(
                        f"{wheel.file.name}: {member.filename}: not a path or size to unpack"
                    )
                if path.parts[0].endswith(".data"):
                    raise PackagingError(
                        f"{wheel.file.name}: installs {member.filename}, which has no place here"
                    )
                if member.is_dir() or not _is_needed(path):
                    continue
                out = into / path
                out.parent.mkdir(parents=True, exist_ok=True)
                if out.exists():
                    raise PackagingError(f"{wheel.file.name}: {path} is in another wheel, too")
                with archive.open(member) as source, out.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _is_needed(path: PurePosixPath) -> bool:
    if path.parts[0].endswith(".dist-info"):
        return path.name == "METADATA"
    if path.as_posix() in _NOT_NEEDED_FILES:
        return False
    return path.suffix not in _NOT_NEEDED and not _NOT_NEEDED_DIRECTORIES.intersection(path.parts[:-1])
