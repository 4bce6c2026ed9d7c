"""What the compiled parts of a tree need of the system, as the two package managers say it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from checkout import PackagingError

_DEBIAN_PACKAGES = {
    **dict.fromkeys(
        ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2",
         "ld-linux-aarch64.so.1", "libresolv.so.2"),
        "libc6",
    ),
    "libgcc_s.so.1": "libgcc-s1",
    "libstdc++.so.6": "libstdc++6",
    "libz.so.1": "zlib1g",
}  # fmt: skip


class Needs:
    """Of all ELF files below a directory: shared libraries that it does not bring along, and the versions of glibc."""

    def __init__(self, tree: Path) -> None:
        self.libraries: set[str] = set()
        self.symbol_versions: set[tuple[str, str]] = set()
        own = set()
        for file in elf_files(tree):
            own.add(file.name)
            command = ["readelf", "--wide", "--dynamic", "--version-info", str(file)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.libraries |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
            library = ""
            for name, version in re.findall(r"File: (\S+)|Name: (\S+)\s+Flags:", text):
                library = name or library
                if version:
                    self.symbol_versions.add((library, version))
        self.libraries -= own

    def debian(self) -> list[str]:
        """Packages for Depends."""
        unknown = self.libraries - _DEBIAN_PACKAGES.keys()
        if unknown:
            raise PackagingError(f"no known package brings {', '.join(sorted(unknown))}: name it in elf.py")
        glibc = ".".join(map(str, self._glibc()))
        packages = sorted({_DEBIAN_PACKAGES[library] for library in self.libraries})
        return [f"libc6 (>= {glibc})" if package == "libc6" else package for package in packages]

    def rpm(self) -> list[str]:
        """Capabilities, as rpm's own generator names them."""
        glibc = ".".join(map(str, self._glibc()))
        return [
            *(f"{library}()(64bit)" for library in sorted(self.libraries)),
            f"libc.so.6(GLIBC_{glibc})(64bit)",
        ]

    def _glibc(self) -> tuple[int, ...]:
        versions = (
            version.removeprefix("GLIBC_")
            for _, version in self.symbol_versions
            if version.startswith("GLIBC_")
        )
        return max(tuple(map(int, version.split("."))) for version in versions if version != "PRIVATE")


def elf_files(tree: Path) -> Iterator[Path]:
    """In a fixed order."""
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path
