"""The packages of this checkout for a machine: built once for the same sources, two revisions, and compiled beforehand.

A package compiles its modules when it is installed. An emulated machine would take minutes for what takes this host
seconds, so that step of its scripts is done with what this host has compiled, if its Python is the machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.machines.cache import Cache, build_step, key_of
from tests.acceptance.machines.machine import Machine
from tests.packaging.built import PARTS, build

ROOT = Path(__file__).parent.parent.parent
GUEST_PYTHON = "3.11"
SOURCES = (
    "agent",
    "collector",
    "wire",
    "packaging",
    "systemd",
    "requirements",
    "docs",
    "bpf/build",
    "bpf/bcc",
)
IN_MACHINE = "/var/tmp/packages"
OLD, NEW = "1", "2"
"""Revisions of the same version."""
COMPILER = f"""#!/bin/sh
# In the place of Python while dpkg runs. The standard library's own cache goes along, as sys.pycache_prefix wants it.
for word; do
    case $word in /usr/lib/weighbridge/*)
        part=${{word##*/}}; mkdir -p /var/cache/weighbridge; cp -a "{IN_MACHINE}/compiled/$part" /var/cache/weighbridge/
        cd /; find usr/lib/python{GUEST_PYTHON} -name '*.pyc' | tar -c -T - --transform 's,__pycache__/,,' |
            tar -x -C "/var/cache/weighbridge/$part"
        exit ;;
    esac
done
exit 1
"""


@contextmanager
def packages() -> Iterator[Path]:
    """A directory with `1/*.deb`, `2/*.deb` and `compiled/`."""
    files = sorted(
        file
        for source in SOURCES
        for file in (ROOT / source).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    names = "\n".join(str(file.relative_to(ROOT)) for file in files)
    with Cache().entry("packages", key_of(COMPILER, names, *files), _build) as directory:
        yield directory


def put_packages(machine: Machine) -> None:
    with packages() as directory:
        machine.put(directory, IN_MACHINE)


def dpkg(machine: Machine, words: str, seconds: int = 300) -> str:
    """`dpkg` with these words, in the directory of the packages."""
    return machine.run(with_compiled(f"dpkg {words}"), seconds=seconds).output


def with_compiled(command: str) -> str:
    """A shell command under which packages find their modules compiled."""
    python = f"/usr/bin/python{GUEST_PYTHON}"
    if sys.version_info[:2] != tuple(map(int, GUEST_PYTHON.split("."))):
        return f"cd {IN_MACHINE}; {command}"
    return f"cd {IN_MACHINE}; mount --bind compiler {python}; trap 'umount {python}' EXIT\n{command}\n"


def _build(directory: Path) -> None:
    for revision in (OLD, NEW):
        build(directory / revision, "--format", "deb", "--revision", revision)
    compiler = directory / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    for part in PARTS:
        (deb,) = (directory / NEW).glob(f"weighbridge-{part}_*.deb")
        unpacked, cache = directory / "unpacked", directory / "cache"
        subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
        python = [sys.executable, "-IS", "-X", f"pycache_prefix={cache}", "-m", "compileall", "-q"]
        source = unpacked / f"usr/lib/weighbridge/{part}"
        how = ["--invalidation-mode", "checked-hash", "-s", unpacked, source]
        build_step([*python, *how])
        target = directory / f"compiled/{part}/usr/lib/weighbridge/{part}"
        target.parent.mkdir(parents=True)
        os.rename(f"{cache}{source}", target)
        for scratch in (unpacked, cache):
            subprocess.run(["rm", "-rf", scratch], check=True)
