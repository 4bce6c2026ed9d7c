"""The initrd: busybox, the modules that reach the disk, and the guest's part of the rig, as a cpio archive."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

GUEST = Path(__file__).parent / "guest"


def guest_files() -> list[Path]:
    """What lies in the guest besides Debian, in a stable order."""
    return sorted(path for path in GUEST.iterdir() if path.is_file())


def initrd(image: Path, kernel: str) -> bytes:
    """With the modules of one of the image's kernels. An uncompressed "newc" archive
    (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    members = list(_members(image, kernel))
    return b"".join(_member(number, *member) for number, member in enumerate(members, start=1))


def _members(image: Path, kernel: str) -> Iterator[tuple[str, int, bytes]]:
    for name in ("bin", "dev", "proc", "sys", "mnt", "modules", "rig"):
        yield name, stat.S_IFDIR | 0o755, b""
    yield "bin/busybox", stat.S_IFREG | 0o755, (image / "busybox").read_bytes()
    yield "bin/sh", stat.S_IFLNK | 0o777, b"busybox"
    for module in sorted((image / kernel / "modules").iterdir()):
        yield f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes()
    for file in guest_files():
        yield f"rig/{file.name}", stat.S_IFREG | 0o755, file.read_bytes()
    yield "init", stat.S_IFREG | 0o755, (GUEST / "init").read_bytes()
    yield "TRAILER!!!", 0, b""


def _member(number: int, name: str, mode: int, content: bytes) -> bytes:
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
