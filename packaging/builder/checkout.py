"""What is packaged: this checkout, for one minor version of Python and one architecture."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import agent

ROOT = Path(__file__).parent.parent.parent
PACKAGING = ROOT / "packaging"
MAINTAINER = "Weighbridge maintainers <maintainers@weighbridge.example>"
HOMEPAGE = "https://weighbridge.example"

_DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


class PackagingError(Exception):
    """What keeps the packages from being built, and how to mend it."""


@dataclass(frozen=True, slots=True)
class Target:
    """`python` is a minor version such as 3.11; `machine` is as uname(1) says; `revision` counts packagings of a version."""

    python: str
    revision: int
    epoch_seconds: int
    machine: str = platform.machine()

    @property
    def version(self) -> str:
        return agent.__version__

    @property
    def architecture(self) -> str:
        """As Debian and nfpm call it."""
        if self.machine not in _DEBIAN_NAMES:
            raise PackagingError(f"no packages for {self.machine}: build on {' or '.join(_DEBIAN_NAMES)}")
        return _DEBIAN_NAMES[self.machine]

    def release(self, kind: str) -> str:
        """Names the Python that the package is made for; sorts after the package for an earlier one."""
        return f"{self.revision}{'+' if kind == 'deb' else '.'}py{self.python}"


def source_date() -> int:
    """When the commit was made, in seconds since 1970: every time in a package is this one."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise PackagingError(f"no git history here: set SOURCE_DATE_EPOCH ({done.stderr.strip()})")
    return int(done.stdout)
